"""The whole demo: set up, let everybody work, wait until it is quiet, end the service, prove, clean up."""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, TypeVar

import aiohttp
import asyncpg
from rich.console import Console

from consumer import logs
from consumer.demo import proof
from consumer.demo.customers import Customers
from consumer.demo.evidence import Check, Evidence, read_audits, read_campaigns
from consumer.demo.place import DemoFailed, Place, finish, private_folder, settle_in, start
from consumer.demo.process import ServiceProcess
from consumer.demo.servers import ServerFailed
from consumer.demo.subscriber import Subscriber
from consumer.demo.upstream import SENDERS, Engine, Mailbox
from consumer.demo.view import PLAIN_WIDTH, View, show_proof
from consumer.demo.world import Campaign, load, make_world

T = TypeVar("T")

INTERRUPTED: Final = 130
WHOLE_S: Final = 58.0  # after set-up
SHORTEST_SETTLE_S: Final = 10.0
SAMPLE_S: Final = 0.5
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def show(*, kafka: str | None, database_url: str | None, seconds: float) -> int:
    """Run the demo; returns the exit code: 0 everything true, 1 something false or failed, 130 interrupted."""
    return asyncio.run(Demo(kafka, database_url, seconds).run())


class Demo:
    """One run. Everything it makes goes onto `_stack` before or as it is made, and is undone from there."""

    def __init__(self, kafka: str | None, database_url: str | None, seconds: float) -> None:
        self._kafka = kafka
        self._database_url = database_url
        self._seconds = seconds
        self._stack = AsyncExitStack()
        self._is_cleaning = False
        self._service: ServiceProcess | None = None
        terminal = Console()
        self._console = terminal if terminal.is_terminal else Console(width=PLAIN_WIDTH)

    async def run(self) -> int:
        """Play and clean up; a signal ends the play at any moment, never the cleaning."""
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup
            loop.add_signal_handler(number, stopped.set)
        play = asyncio.create_task(self._play_and_clean(), name="play")
        stop = asyncio.create_task(stopped.wait(), name="stop")
        await asyncio.wait([play, stop], return_when=asyncio.FIRST_COMPLETED)
        if stopped.is_set():
            print("\nstopping everything ...", file=sys.stderr, flush=True)
            if not self._is_cleaning:
                play.cancel()
            await asyncio.wait([play])
        stop.cancel()
        if stopped.is_set():
            print("interrupted: everything was stopped and removed", file=sys.stderr)
            return INTERRUPTED
        return play.result()

    async def _play_and_clean(self) -> int:
        failed = 0
        try:
            failed = await self._play()
        except* (DemoFailed, ServerFailed) as failures:
            print(f"campaign-stats: {_first(failures)}", file=sys.stderr)
            failed = 1
        finally:
            self._is_cleaning = True
            await self._stack.aclose()
        return failed

    def _say(self, text: str) -> None:
        print(text, flush=True)

    async def _play(self) -> int:
        folder = private_folder(self._stack)
        log = self._stack.enter_context((folder / "demo.log").open("w"))
        self._stack.callback(logging.disable)  # late words of a client must not look for the closed file
        logs.configure(log, "WARNING")  # what our own Kafka clients say belongs into no live view
        place = await settle_in(self._stack, folder, self._kafka, self._database_url, self._say)
        world = make_world()
        self._say(f"loading {len(world)} campaigns with {sum(len(c.rows) for c in world)} prospects")
        await load(place.database_url, world)
        self._say("starting the service")
        self._service = ServiceProcess(place)
        await start(self._service, self._service.start, self._stack)
        begun = time.monotonic()
        checks, reference = await self._work(place, self._service, world)
        show_proof(self._console, checks, reference, time.monotonic() - begun)
        if all(check.holds for check in checks):
            return 0
        for line in self._service.complaints():
            print(f"the service said: {line}", file=sys.stderr)
        return 1

    async def _work(self, place: Place, service: ServiceProcess, world: Sequence[Campaign]) -> tuple[list[Check], str]:
        begun = time.monotonic()
        stack = self._stack
        pool = await asyncpg.create_pool(place.database_url, min_size=1, max_size=SENDERS + 3)
        stack.callback(pool.terminate)
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)))
        mailbox = Mailbox(place)
        stack.push_async_callback(mailbox.close)
        engine = Engine(pool, world, mailbox)
        customers = Customers(pool, world, engine, mailbox, self._seconds)

        def react(campaign: Any) -> None:
            engine.stop_sending(campaign)
            customers.hear_of_pause(campaign)

        subscriber = Subscriber(place, react)
        stack.push_async_callback(subscriber.close)
        await subscriber.start()
        view = View(self._console, engine.tally, subscriber, {c.id: c.name for c in world}, self._seconds)

        async def sample() -> None:
            while True:
                if (code := service.ended()) is not None:
                    raise DemoFailed("\n".join([f"the service ended with code {code}", *service.complaints()]))
                view.metrics = await service.metrics(http) or view.metrics
                await asyncio.sleep(SAMPLE_S)

        async def upstream_then_quiet() -> Check:
            async with asyncio.TaskGroup() as group:
                working = [group.create_task(engine.run()), group.create_task(customers.run())]
                posting = group.create_task(mailbox.run())
                await asyncio.sleep(self._seconds)
                engine.stopping = customers.stopping = True
                await asyncio.wait(working)
                posting.cancel()
            await mailbox.flush(everything=True)
            view.phase = "the upstream has stopped, waiting until all is quiet"
            left_s = max(SHORTEST_SETTLE_S, WHOLE_S - (time.monotonic() - begun))
            return await _until_quiet(pool, subscriber, lambda: view.metrics, left_s)

        others: list[Coroutine[Any, Any, None]] = [sample(), subscriber.run(), view.run()]
        quiet = await _beside(upstream_then_quiet(), others)
        if not self._console.is_terminal:
            view.lines()
        await finish(asyncio.to_thread(service.stop))
        quiet.expect(service.exit_code == 0, f"SIGTERM ended the service with code {service.exit_code}")
        await _beside(_until_read(subscriber), [subscriber.run()])

        connection = await asyncpg.connect(place.database_url)
        try:
            evidence = Evidence(
                campaigns=await read_campaigns(connection),
                audits=await read_audits(connection),
                events=subscriber.events,
                dead_letters=subscriber.dead_letters,
                asked=customers.asked,
                garbage=customers.garbage,
                resumed=customers.resumed,
                paused_before=frozenset(c.id for c in world if c.status == "paused"),
                wrong_before=frozenset(c.id for c in world if c.wrong_by),
            )
        finally:
            await connection.close(timeout=5)
        reference = evidence.campaigns.get(proof.REFERENCE)
        return [*proof.prove(evidence), quiet], proof.as_json(reference.stats) if reference else "missing"


def _first(failures: BaseException) -> BaseException:
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]
    return failures


async def _until_quiet(
    pool: "asyncpg.Pool[asyncpg.Record]", subscriber: Subscriber, metrics: Callable[[], Any], deadline_s: float
) -> Check:
    """Wait until nothing is left to do: read, recounted, swept once more from end to end, published, heard."""
    check = Check("the service came to rest and ended when told to (looks)")
    begun = time.monotonic()
    stopped_at = await pool.fetchval("SELECT clock_timestamp()")
    while time.monotonic() < begun + deadline_s:
        rest = await pool.fetchval(
            """SELECT (SELECT count(*) FROM campaign_stats.outbox) + (SELECT count(*) FROM campaign_stats.deferred)
                    + (SELECT count(*) FROM campaign_stats.sweep
                        WHERE lap_started IS NULL OR lap_started < $1 OR lap_finished < lap_started)""",
            stopped_at,
        )
        lag_is_fresh = time.monotonic() > begun + 3.0  # the service looks at its lag every two seconds
        if rest == 0 and lag_is_fresh and metrics()["lag_records"] == 0 and await subscriber.has_read_all():
            check.expect(True, "")
            return check
        await asyncio.sleep(0.2)
    check.expect(False, f"there was work left {deadline_s:.0f} s after the upstream had stopped")
    return check


async def _until_read(subscriber: Subscriber) -> None:
    while not await subscriber.has_read_all():  # noqa: ASYNC110  # only the broker knows
        await asyncio.sleep(0.05)


async def _beside(work: Coroutine[Any, Any, T], others: Sequence[Coroutine[Any, Any, None]]) -> T:
    """The result of `work`, while `others`, which never end by themselves, run; if one of them fails, so does this."""
    main = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(other) for other in others]
    try:
        await asyncio.wait([main, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        return await main
    finally:
        for task in (main, *tasks):
            task.cancel()
        await asyncio.gather(main, *tasks, return_exceptions=True)
