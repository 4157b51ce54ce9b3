"""The service with a fault built in, for tests only: `python -m tests.faults.rigged run`.

FAULT_POINT names a place on the way of the data (POINTS), FAULT_PASSES at which passing of it (1 = the first) the
process gets FAULT_SIGNAL (9, SIGKILL, if not said). FAULT_BREAKAGE names a deliberate breakage of the service
(BREAKAGES): the tests prove with it that they would notice. FAULT_SESSION_MS shortens the patience of the group, so
that a killed member is missed sooner.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, Final
from uuid import uuid4

from consumer.__main__ import stop_is_no_failure

if __name__ == "__main__":
    stop_is_no_failure()  # as early as the real one

import orjson

from consumer import cli, health, migrations, outcome, pipeline, questions, redrive, repairs, replay
from consumer import turn as turn_module
from consumer.broker import Publisher
from consumer.broker import publisher as publisher_module
from consumer.broker import source as source_module
from consumer.cli import main
from consumer.database import Database, Transaction, outages, pool, session
from consumer.deadletters import DeadLetters
from consumer.deferred import DeferredWorker
from consumer.generation import Generation, Partition
from consumer.pipeline import Pipeline
from consumer.reconcile import Sweep
from consumer.relay import Relay
from consumer.service import Service
from tests.faults.edits import Edit, broken

POINTS: Final = (
    "after poll",
    "before chunk",
    "in chunk",  # all is written, COMMIT is not sent
    "after pause",  # in the guard's savepoint
    "after chunk",
    "before offsets",
    "after offsets",
    "in deferred",
    "after deferred",
    "before send",  # the relay has read its rows
    "after acknowledgement",  # nothing is deleted yet
    "in relay",
    "after relay",
    "in sweep",
    "after sweep",
    "before dead letters",
    "after dead letters",
)
"""Where `run` can be ended. A migration's are `migration 0001` to the last, in its transaction or behind its index."""

AHEAD: Final = "chunk ahead"  # of the generation, while a backlog is read
BACKLOG_POINTS: Final = (f"in {AHEAD}", f"after {AHEAD}", "in chunk")
"""Where `run` can be ended behind a backlog; the last is when it is read."""

COMMAND_POINTS: Final = (
    "locked",  # `redrive` and `replay` have their turn
    "published",  # what `redrive` sends back was acknowledged, and is not marked
    "unlocking",  # all is done, COMMIT is not sent; the offsets of `replay` have moved
    "after page",  # `requeue`, `retry` and `reconcile` have committed a page
)
"""Where an operator's command can be ended."""

SMALL_PAGE: Final = 5  # rows of a command's page here, so that there is something between two of them

_engine: ContextVar[str] = ContextVar("engine", default="")
_did_something: ContextVar[bool] = ContextVar("did_something", default=False)
_passes: dict[str, int] = {}


def passed(point: str) -> None:
    """The fault, if it is meant for this point and this passing."""
    if point != os.environ.get("FAULT_POINT"):
        return
    _passes[point] = _passes.get(point, 0) + 1
    if _passes[point] == int(os.environ.get("FAULT_PASSES", "1")):
        sys.stdout.flush()
        os.kill(os.getpid(), int(os.environ.get("FAULT_SIGNAL", signal.SIGKILL)))


_worked: set[tuple[Partition, int]] = set()  # offsets of generations that held a record
_committed: set[tuple[Partition, int]] = set()  # and those that are committed, or passed by a later one
_edits = ExitStack()  # never left


def _replace(owner: Any, name: str, other: object) -> None:
    setattr(owner, name, other)


def _edit(place: str, old: str, new: str) -> None:
    """For as long as the process lasts."""
    _edits.enter_context(broken([Edit(place, old, new)]))


def _around(
    owner: Any,
    name: str,
    *,
    before: str = "",
    after: str = "",
    engine: str = "",
    works: bool = False,
    matters: Callable[[Any, Any], bool] = lambda argument, result: True,
) -> None:
    """Points around an asynchronous method. `works`: a true result means that this transaction has something to do.

    `matters` looks at the first argument and the result (None before the call): only such passings count.
    """
    original: Callable[..., Awaitable[Any]] = getattr(owner, name)

    async def wrapped(*arguments: Any, **named: Any) -> Any:
        if engine:
            _engine.set(engine)
        argument = arguments[1] if len(arguments) > 1 else None
        if before and matters(argument, None):
            passed(before)
        result = await original(*arguments, **named)
        if works and result:
            _did_something.set(True)
        if after and matters(argument, result):
            passed(after)
        return result

    _replace(owner, name, wrapped)


def _rig_points() -> None:
    # Batches without records only tell of a position; what passes then is no work.
    _around(
        source_module.Source,
        "poll",
        after="after poll",
        matters=lambda _, found: any(batch.records for batch in found[0]),
    )
    _note_work()
    _around(
        Pipeline,
        "_commit",
        before="before offsets",
        after="after offsets",
        matters=lambda offsets, _: not _worked.isdisjoint(offsets.items()),
    )
    _around(Pipeline, "_recount_ahead", engine=AHEAD)
    _around(Pipeline, "_flush", engine="chunk")
    _around(Pipeline, "_chunk", before="before chunk")
    _around(DeferredWorker, "turn", engine="deferred")
    _around(Relay, "turn", engine="relay")
    _around(Relay, "_send", before="before send", after="after acknowledgement")
    _around(Sweep, "page", engine="sweep")
    _around(DeadLetters, "records", after="after dead letters")
    _around(Pipeline, "_bury", before="before dead letters")
    _around(Transaction, "recount", works=True)
    _around(Transaction, "take_deferred", works=True)
    _around(Transaction, "read_outbox", works=True)
    _around(Transaction, "sweep_page", works=True)
    _around(Transaction, "pause", after="after pause", works=True)
    transaction = Database.transaction

    @asynccontextmanager
    async def with_points(self: Database) -> AsyncIterator[Transaction]:
        engine = _engine.get()
        _did_something.set(False)
        async with transaction(self) as db:
            yield db
            if _did_something.get():
                passed(f"in {engine}")
        if _did_something.get():
            passed(f"after {engine}")

    _replace(Database, "transaction", with_points)
    _around_record()


def _note_work() -> None:
    release, commit = Pipeline._release, Pipeline._commit

    def noted(self: Pipeline, generation: Generation, epoch: int) -> None:
        if generation.records:
            _worked.update(generation.offsets.items())
        release(self, generation, epoch)

    async def then_noted(self: Pipeline, offsets: Mapping[Partition, int], epoch: int) -> None:
        await commit(self, offsets, epoch)
        _committed.update(one for one in _worked if one[1] <= offsets.get(one[0], -1))

    _replace(Pipeline, "_release", noted)
    _replace(Pipeline, "_commit", then_noted)


def _around_record() -> None:
    original = migrations._record

    async def record(connection: Any, migration: migrations.Migration) -> None:
        passed(f"migration {migration.number:04d}")
        await original(connection, migration)

    _replace(migrations, "_record", record)


def _rig_commands() -> None:
    _replace(repairs, "PAGE_ROWS", SMALL_PAGE)
    _replace(questions, "RECONCILE_AT_ONCE", SMALL_PAGE)
    _replace(redrive, "AT_ONCE", SMALL_PAGE)
    _around(Publisher, "publish", after="published")
    original, locked = vars(repairs)["progress"], turn_module.locked

    @contextmanager
    def progress(what: str) -> Iterator[Callable[..., None]]:
        with original(what) as done:

            def then(*counts: Any) -> None:
                done(*counts)
                passed("after page")

            yield then

    @asynccontextmanager
    async def with_points(connection: Any, name: str) -> AsyncIterator[None]:
        async with locked(connection, name):
            passed("locked")
            yield
            passed("unlocking")

    _replace(repairs, "progress", progress)
    _replace(cli, "progress", progress)
    _replace(turn_module, "locked", with_points)


def _rig_session(session_ms: int) -> None:
    consumer = vars(source_module)["AIOKafkaConsumer"]

    def impatient(**arguments: Any) -> Any:
        return consumer(**{**arguments, "session_timeout_ms": session_ms, "heartbeat_interval_ms": 500})

    _replace(source_module, "AIOKafkaConsumer", impatient)


def _rig_count() -> None:
    """SIGUSR2: say how many tasks there are."""
    run = Service.run

    async def counted(self: Service, **how: Any) -> int:
        def count() -> None:
            print(orjson.dumps({"event": "tasks", "tasks": len(asyncio.all_tasks())}).decode(), flush=True)

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, count)
        return await run(self, **how)

    _replace(Service, "run", counted)


def offsets_before_the_transaction() -> None:
    """Offsets move first, then the work is done."""
    flush = Pipeline._flush

    async def broken(self: Pipeline, generation: Generation, passed_: Any, epoch: int, begun: float) -> None:
        self._release(generation, epoch)
        await self._committed.wait()  # by the one that commits: a second one would be overtaken by older offsets
        await flush(self, generation, passed_, epoch, begun)

    _replace(Pipeline, "_flush", broken)


def offsets_with_what_is_recounted_ahead() -> None:
    """What is recounted while a backlog is read takes with it the offsets of all that was read so far."""
    recount = Pipeline._recount

    async def broken(self: Pipeline, works: Any, epoch: int) -> None:
        if _engine.get() == AHEAD:
            self._release(self._collecting, epoch)
            await self._committed.wait()
        await recount(self, works, epoch)

    _replace(Pipeline, "_recount", broken)
    _replace(pipeline, "AHEAD_EVERY_S", 3_600.0)  # once: however slow the reading is, there is something left


def delete_before_the_acknowledgement() -> None:
    """The relay deletes its rows, commits, and only then sends."""

    async def broken(self: Relay) -> int:
        async with self._store.transaction() as db:
            shards = await db.lock_shards()
            rows = await db.read_outbox(shards, 100, 10**6, None) if shards else []
            await db.finish_outbox([row.id for row in rows], {})
        if rows:
            passed("before send")
            await self._publish([(row.type, row.campaign_id, row.event) for row in rows])
        return len(rows)

    _replace(Relay, "turn", broken)


def fresh_id_for_each_sending() -> None:
    """An event gets its id when it is sent, not when it happened."""
    publish = Service._publish

    async def broken(self: Service, rows: Sequence[Any]) -> Any:
        renamed = [
            (type_, campaign_id, orjson.dumps({**orjson.loads(event), "id": str(uuid4())}))
            for type_, campaign_id, event in rows
        ]
        return await publish(self, renamed)

    _replace(Service, "_publish", broken)


def dead_letters_after_the_offsets() -> None:
    """What cannot be read is kept only once its offset has passed."""
    bury, flush = Pipeline._bury, Pipeline._flush

    async def later(self: Pipeline, *rest: Any) -> None:
        """Not now."""

    async def broken(self: Pipeline, generation: Generation, passed_: Any, epoch: int, begun: float) -> None:
        letters = list(generation.dead_letters)
        await flush(self, generation, passed_, epoch, begun)
        await self._committed.wait()
        if letters or passed_:
            await bury(self, letters, list(passed_), epoch)

    _replace(Pipeline, "_bury", later)
    _replace(Pipeline, "_flush", broken)


def stats_without_their_news() -> None:
    """The recount commits without its outbox rows, which follow in a transaction of their own."""
    save = Transaction.save

    async def broken(self: Transaction, outcome: Any) -> None:
        rows, outcome.outbox = outcome.outbox, []
        await save(self, outcome)
        outcome.outbox = rows

    transaction = Database.transaction

    @asynccontextmanager
    async def in_two(self: Database) -> AsyncIterator[Transaction]:
        kept: list[Any] = []

        async with transaction(self) as db:
            original = db.save

            async def note(outcome: Any) -> None:
                kept.extend(outcome.outbox)
                await original(outcome)

            _replace(db, "save", note)
            yield db
        if kept:
            passed("after chunk")
            async with transaction(self) as db:
                await db._connection.executemany(
                    "INSERT INTO campaign_stats.outbox (shard, campaign_id, type, event) VALUES ($1, $2, $3, $4)",
                    [(row.shard, row.campaign_id, row.type, row.event) for row in kept],
                )

    _replace(Transaction, "save", broken)
    _replace(Database, "transaction", in_two)


def take_rows_and_forget_them() -> None:
    """The deferred worker takes its rows in a transaction of their own."""
    transaction = Database.transaction
    take = Transaction.take_deferred

    async def broken(self: DeferredWorker) -> bool:
        _engine.set("deferred")
        async with transaction(self._store) as db:  # type: ignore[arg-type]
            rows = await take(db)
        if not rows:
            return False
        while not _worked <= _committed:  # else the hint's offset has not moved, and the next owner repeats it
            await asyncio.sleep(0.01)
        passed("in deferred")
        given = iter([rows])

        async def taken(db: Transaction) -> list[Any]:
            return next(given)

        _replace(Transaction, "take_deferred", taken)
        return await turn(self)

    turn = DeferredWorker.turn
    _replace(DeferredWorker, "turn", broken)


def no_backoff() -> None:
    """Whoever meets an outage tries again at once."""
    _replace(health, "backoff_s", lambda tries: 0.0)


def every_error_is_the_campaigns() -> None:
    """A read-only or half-built database is taken for a failure of the campaigns in the chunk."""
    _replace(outages, "is_outage", lambda sqlstate: sqlstate is None or sqlstate.startswith("08"))


def no_deadline_for_an_answer() -> None:
    """A statement waits for its answer for ever."""
    _replace(pool, "COMMAND_DEADLINE_S", None)
    _replace(pool, "ANSWER_DEADLINE_S", None)
    _replace(session, "ANSWER_DEADLINE_S", None)


def stale_pool() -> None:
    """After a failover the sessions to the old node are kept."""
    _replace(pool, "STALE_POOL", frozenset())


def health_says_nothing() -> None:
    """An outage is waited out, but told to nobody."""
    _replace(health.Health, "lost", lambda *_: None)


def patient_with_brokers() -> None:
    """A silent broker is given as much time as a rebalance."""
    _replace(source_module, "be_impatient", lambda client: None)
    _replace(publisher_module, "be_impatient", lambda client: None)


def zombies_keep_their_locks() -> None:
    """A session that stands still in a transaction is never ended by the server."""
    _replace(pool, "SESSION", {**session.SESSION, "idle_in_transaction_session_timeout": "0"})


def revocation_waits_for_nobody() -> None:
    """Partitions are given away while their chunk is still under way."""
    _edit("consumer.pipeline:Pipeline.let_go", "await self._idle.wait()", "return")


def deaf_to_signals() -> None:
    """A shutdown waits for its chunk without a deadline."""
    finish = Service._finish

    async def broken(self: Service, tasks: Any) -> int:
        self._settings = self._settings.model_copy(update={"shutdown_deadline_s": 3_600.0})
        return await finish(self, tasks)

    _replace(Service, "_finish", broken)


def version_is_a_plain_counter() -> None:
    """A version is the one before plus one."""
    _replace(outcome, "next_version", lambda previous, now: previous + 1)


def sent_back_without_a_mark() -> None:
    """A redrive does not note what it sent back."""
    statement = vars(redrive)["statement"]
    _replace(
        redrive,
        "statement",
        lambda name: "SELECT $1::text[], $2::int[], $3::bigint[]" if name == "mark_redriven" else statement(name),
    )


def replay_goes_where_it_is_told() -> None:
    """A replay moves offsets to the time asked for, be that forward."""
    planned = replay.planned

    async def broken(group: Any, since: Any) -> list[Any]:
        first = await group.first_since(since)
        return [
            replay.Move(move.partition, move.begin, first.get(move.partition, move.begin))
            for move in await planned(group, since)
        ]

    _replace(replay, "planned", broken)


def a_position_that_moved_back_is_kept() -> None:
    """Where a log was cut off, the group's offset stays behind its end."""
    _edit("consumer.broker.source:Source._notice_moves", "position == self._next.get(partition)", "position < 10**9")


def letters_lose_their_headers() -> None:
    """A dead letter keeps key and value of its record only."""
    _edit(
        "consumer.deadletters:_row",
        "dead_letter_headers(record, letter, now)",
        "dead_letter_headers(record, letter, now)[-6:]",
    )


def one_letter_of_many_is_dropped() -> None:
    """Of a batch of dead letters one is taken for kept that was never sent."""
    _edit(
        "consumer.deadletters:DeadLetters.records",
        "await self._publish(rows)",
        "(lambda sent: [*sent[:1], *sent][-len(rows):])(await self._publish(rows[1:] or rows))",
    )


BREAKAGES: Final[Mapping[str, Callable[[], None]]] = {
    breakage.__name__: breakage
    for breakage in (
        offsets_before_the_transaction,
        offsets_with_what_is_recounted_ahead,
        delete_before_the_acknowledgement,
        fresh_id_for_each_sending,
        dead_letters_after_the_offsets,
        stats_without_their_news,
        take_rows_and_forget_them,
        no_backoff,
        every_error_is_the_campaigns,
        no_deadline_for_an_answer,
        stale_pool,
        health_says_nothing,
        patient_with_brokers,
        zombies_keep_their_locks,
        revocation_waits_for_nobody,
        deaf_to_signals,
        version_is_a_plain_counter,
        sent_back_without_a_mark,
        replay_goes_where_it_is_told,
        a_position_that_moved_back_is_kept,
        letters_lose_their_headers,
        one_letter_of_many_is_dropped,
    )
}


if __name__ == "__main__":
    if os.environ.get("FAULT_BREAKAGE"):
        BREAKAGES[os.environ["FAULT_BREAKAGE"]]()
    _rig_points()
    _rig_count()
    _rig_commands()
    if os.environ.get("FAULT_SESSION_MS"):
        _rig_session(int(os.environ["FAULT_SESSION_MS"]))
    main()
