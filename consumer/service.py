"""The composition root: builds everything, starts and stops it in order, and notices when it stands still."""

import asyncio
import errno
import gc
import io
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Final
from uuid import UUID

import structlog
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from consumer import broker, migrations
from consumer.broker import Outgoing, Publisher, Source
from consumer.database import Database
from consumer.deadletters import DeadLetters
from consumer.deferred import DeferredWorker
from consumer.door import Door
from consumer.envelope import CONTENT_TYPE
from consumer.errors import ConfigError, NotNow, Unavailable
from consumer.generation import Partition
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.oauth import Tokens
from consumer.pipeline import Pipeline
from consumer.reconcile import Sweep
from consumer.recount import Rules
from consumer.relay import Relay
from consumer.settings import PREFIX, Settings
from consumer.status import Numbers, Status
from consumer.web import ApiDoor, OperatorsDoor, Rate
from schemas.door import STOPPING
from schemas.topics import Topics

SAMPLE_S: Final = 2.0  # gauges that need a question to a server
SHOWN_PAUSES: Final = 10
API_POOL_SIZE: Final = 4  # calls beside the pipeline; more gain nothing on few cores (design, section 9)
WATCHDOG_S: Final = 60.0  # design, section 6
WORK_SHARE: Final = 0.75  # of the shutdown's deadline; the rest is for leaving the group and closing clients that hang
CANCEL_DEADLINE_S: Final = 0.5  # with the shutdown deadline below the 10 s of container engines
CAUGHT_UP_POLL_S: Final = 0.1

log = structlog.get_logger(__name__)


def kafka_connection(settings: Settings) -> broker.Connection:
    """How to reach the brokers with these settings. Raises ConfigError for TLS files that cannot be used."""
    security: dict[str, object] = {"security_protocol": settings.kafka_security_protocol}
    if settings.kafka_security_protocol.endswith("SSL"):
        security["ssl_context"] = _tls_context(settings)
    user, password = settings.kafka_sasl_username, settings.kafka_sasl_password
    if settings.kafka_sasl_mechanism is None or user is None or password is None:
        return broker.Connection(settings.kafka_bootstrap_servers, security)
    security["sasl_mechanism"] = settings.kafka_sasl_mechanism
    if settings.kafka_sasl_token_url is not None:
        tokens = Tokens(settings.kafka_sasl_token_url, user, password.get_secret_value(), settings.kafka_sasl_scope)
        security["sasl_oauth_token_provider"] = broker.TokenProvider(tokens.token)
    else:
        security["sasl_plain_username"] = user
        security["sasl_plain_password"] = password.get_secret_value()
    return broker.Connection(settings.kafka_bootstrap_servers, security)


def _tls_context(settings: Settings) -> ssl.SSLContext:
    """Raises ConfigError for files that cannot be used, all that cannot be read at once."""
    files = {
        "KAFKA_SSL_CAFILE": settings.kafka_ssl_cafile,
        "KAFKA_SSL_CERTFILE": settings.kafka_ssl_certfile,
        "KAFKA_SSL_KEYFILE": settings.kafka_ssl_keyfile,
    }
    problems = [
        f"{PREFIX}{name} names no file that can be read: give its path"
        for name, path in files.items()
        if path is not None and not (path.is_file() and os.access(path, os.R_OK))
    ]
    if problems:
        raise ConfigError(problems)
    try:
        context = broker.tls_context(settings.kafka_ssl_cafile)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{PREFIX}KAFKA_SSL_CAFILE holds no certificates in PEM form: check the file"]) from error
    if settings.kafka_ssl_certfile is not None and settings.kafka_ssl_keyfile is not None:
        try:
            broker.present(context, settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile)
        except (OSError, ValueError) as error:
            problem = "are no pair of certificate and unencrypted key in PEM form: check both files"
            raise ConfigError([f"{PREFIX}KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE {problem}"]) from error
    return context


class Service:
    """One process of the service."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topics = Topics(settings.topic_prefix)
        connection = self._connection = kafka_connection(settings)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._metrics = Metrics(registry)
        self._metrics.sweep_interval.set(settings.sweep_interval_s)
        self._health = Health()
        self._database = Database(settings.database_url.get_secret_value())
        self._cdc = [settings.cdc_topic] if settings.cdc_topic else []
        self._source = Source(
            connection,
            [*self._topics.read, *self._cdc],
            settings.group,
            fetch_max_wait_ms=settings.fetch_max_wait_ms,
            revocation_s=settings.shutdown_deadline_s,
        )
        self._events = Publisher(connection, idempotence=settings.producer_idempotence)
        self._letters = Publisher(connection, idempotence=settings.producer_idempotence)
        rules = Rules(settings.limits)
        self._relay = Relay(self._database, self._publish, self._metrics, self._health)
        self._deferred = DeferredWorker(self._database, rules, self._metrics, self._health, wake_relay=self._relay.wake)
        self._pipeline = Pipeline(
            self._source,
            self._database,
            DeadLetters(self._bury),
            rules,
            self._metrics,
            self._health,
            wake_relay=self._relay.wake,
            wake_deferred=self._deferred.wake,
            cdc_topic=settings.cdc_topic,
        )
        self._sweep = Sweep(
            self._database,
            settings.limits,
            self._metrics,
            self._health,
            interval_s=settings.sweep_interval_s,
            grace_s=settings.drift_grace_s,
            retention_days=settings.retention_days,
        )
        self._numbers = Numbers(registry)
        self._status = Status(version("campaign-stats"), self._health, self._numbers, settings.guard_mode)
        self._door = OperatorsDoor(settings.http_host, settings.http_port, self._health, registry, self._status)
        self._callers = Database(settings.database_url.get_secret_value(), size=API_POOL_SIZE)
        self._sync_stats = Door(
            self._callers, rules, self._metrics, wake_relay=self._relay.wake, wake_deferred=self._deferred.wake
        )
        self._api = ApiDoor(
            settings.api_host,
            settings.api_port,
            settings.api_tokens,
            Rate(settings.api_rate_per_minute),
            self._sync,
            self._answered,
        )
        self._stop = asyncio.Event()
        self._ends: dict[Partition, int] = {}

    async def run(self, *, until_caught_up: bool = False) -> int:
        """Serve until SIGTERM or SIGINT (or until caught up); returns the exit code, 0, 1 or 3.

        Raises ConfigError when something is missing that a person must put right.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await self._open_doors()
        tasks: list[asyncio.Task[None]] = []
        stopped = asyncio.create_task(self._stopped(), name="stop")
        try:
            starting = asyncio.create_task(self._start(), name="start")
            await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                await _cancelled([starting], self._settings.shutdown_deadline_s)
                return 0
            starting.result()
            # What a killed process left needs no partitions, and the group may let us wait for its dead member (12 s).
            tasks += _begun([("relay", self._relay.run()), ("deferred", self._deferred.run())])
            joining = asyncio.create_task(self._join(), name="join")
            await asyncio.wait([joining, *tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not joining.done():
                _raise_first(tasks)
                return await self._finish(tasks, joining)
            joining.result()
            jobs: list[tuple[str, Coroutine[None, None, None]]] = [
                ("fetch", self._pipeline.fetch()),
                ("flush", self._pipeline.flush_for_ever()),
                ("commit", self._pipeline.commit_for_ever()),
                ("sample", self._sample()),
                ("watchdog", self._watch()),
            ]
            if self._settings.sweep_interval_s:
                jobs.append(("sweep", self._sweep.run()))
            tasks += _begun(jobs)
            if until_caught_up:
                tasks.append(asyncio.create_task(self._until_caught_up(), name="until caught up"))
            gc.collect()
            gc.freeze()  # with the thresholds: 1.4x the decode rate (measured)
            gc.set_threshold(50_000, 20, 20)
            await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            _raise_first(tasks)
            return await self._finish(tasks)
        finally:
            self._health.stopping = True
            await _cancelled([*tasks, stopped])
            await asyncio.gather(self._source.stop(1.0), self._events.close(1.0), self._letters.close(1.0))
            await self._database.close(1.0)
            await self._callers.close(1.0)
            await self._api.close()
            await self._door.close()

    async def _open_doors(self) -> None:
        settings = self._settings
        doors: list[tuple[str, str, int, OperatorsDoor | ApiDoor]] = [
            ("HTTP", settings.http_host, settings.http_port, self._door)
        ]
        if settings.api_tokens:
            doors.append(("API", settings.api_host, settings.api_port, self._api))
        problems = []
        for name, host, port, door in doors:
            try:
                await door.open()
            except OSError as error:
                why = error.strerror or type(error).__name__
                wrong = "HOST" if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL else "PORT"
                problems.append(f"{PREFIX}{name}_{wrong}: cannot listen on {host}:{port} ({why}); choose another one")
        if problems:
            await self._api.close()
            await self._door.close()
            raise ConfigError(problems)

    async def _sync(self, campaign_id: UUID, user_id: UUID | None) -> bytes | None:
        if self._health.stopping:
            raise NotNow(STOPPING, 1)
        if not self._health.started:
            raise NotNow("this process is starting", 5)
        return await self._sync_stats.sync(campaign_id, user_id)

    def _answered(self, status: int, seconds: float) -> None:
        self._metrics.api_calls.labels(str(status)).inc()
        self._metrics.api_seconds.observe(seconds)

    async def _stopped(self) -> None:
        await self._stop.wait()

    async def _start(self) -> None:
        await self._health.persist("start", self._database.open)
        await self._health.persist("start", self._callers.open)
        problems = await self._health.persist("start", self._check_database)
        if problems:  # list everything at once, but do not wait for Kafka to do so
            with suppress(Unavailable):
                problems += await self._check_topics()
        else:
            problems = await self._health.persist("start", self._check_topics)
        if problems:
            raise ConfigError(problems)

    async def _join(self) -> None:
        await self._health.persist("start", lambda: self._source.start(self._revoked, self._pipeline.take_over))
        self._health.started = True
        log.info("started", group=self._settings.group, topics=[*self._topics.read, *self._cdc])

    async def _check_database(self) -> list[str]:
        await self._database.check_reachable()
        await self._database.check_writable()
        async with self._database.connection() as connection:
            return await migrations.problems(connection, api=bool(self._settings.api_tokens))

    async def _check_topics(self) -> list[str]:
        rights = broker.needed_rights(self._topics, self._settings.group, self._settings.cdc_topic)
        try:
            lacking = await broker.lacking_rights(self._connection, rights)
        except ConfigError as error:
            return list(error.problems)
        problems = [f"{right.problem}: {right.grant(self._connection)}" for right in lacking]
        hidden = {right.name for right in lacking if right.resource == "topic"}
        wanted = [topic for topic in (*self._topics.all, *self._cdc) if topic not in hidden]
        try:
            missing = await self._events.check(wanted, patience_s=broker.NEW_TOPIC_S)
        except ConfigError as error:
            return [*problems, *error.problems]
        except Unavailable:
            if problems:  # with no right at all, not even a producer is to be had
                return problems
            raise
        return problems + [
            f"topic {topic} is missing: let the connector create it, or unset {PREFIX}CDC_TOPIC"
            if topic in self._cdc
            else f"topic {topic} is missing: {broker.CREATE_TOPICS}"
            for topic in missing
        ]

    async def _finish(self, tasks: Sequence[asyncio.Task[None]], *joining: asyncio.Task[None]) -> int:
        """Stop under one deadline: finish the running chunk and turn, drop the rest; 3 when that took too long.

        `joining`: the join that is still under way; it is called off, which leaves the group.
        """
        begun = time.monotonic()
        deadline_s = self._settings.shutdown_deadline_s
        log.info("stopping", deadline_s=deadline_s)
        self._health.stopping = True
        self._relay.wake()
        self._deferred.wake()
        undone: list[str] = []
        finishing = {task for task in tasks if task.get_name() in ("relay", "deferred")}
        finishing.add(asyncio.create_task(self._pipeline.let_go(), name="running chunk"))
        finishing.add(asyncio.create_task(self._api.close(), name="calls"))
        finishing.add(asyncio.create_task(_cancelled(joining, deadline_s), name="join"))
        done, pending = await asyncio.wait(finishing, timeout=deadline_s * WORK_SHARE)
        undone.extend(sorted(task.get_name() for task in pending))
        if undone:
            self._database.terminate()  # else whoever waits for a silent server goes on waiting
            self._callers.terminate()
        await _cancelled([*tasks, *done, *pending, *joining])
        left_s = max(
            0.3, deadline_s - (time.monotonic() - begun) - 1
        )  # letting go of a client that hangs takes 1 s more
        await asyncio.gather(self._source.stop(left_s), self._events.close(left_s), self._letters.close(left_s))
        log.info("stopped", seconds=round(time.monotonic() - begun, 3), undone=undone)
        return 3 if undone else 0

    async def _revoked(self) -> None:
        for topic, partition in self._pipeline.assigned:
            self._metrics.lag.remove(topic, str(partition))
        self._ends = {}
        self._lag = 0
        try:
            async with asyncio.timeout(self._settings.shutdown_deadline_s):
                await self._pipeline.let_go()
        except TimeoutError:
            log.warning("partitions given up before their chunk was finished; their new owner repeats it")

    async def _publish(self, rows: Sequence[tuple[str, UUID, bytes]]) -> Sequence[broker.Sent]:
        return await self._events.publish(
            [
                Outgoing(self._topics.of(type_), str(campaign_id).encode(), event, CONTENT_TYPE)
                for type_, campaign_id, event in rows
            ]
        )

    async def _bury(
        self, rows: Sequence[tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]]
    ) -> Sequence[broker.Sent]:
        results = await self._letters.publish(
            [Outgoing(self._topics.dead_letters, key, value, headers) for key, value, headers in rows]
        )
        if any(sent.error is None or sent.refused for sent in results):
            self._health.progressed()  # many that the topic refuses take long, but are no standstill
        return results

    async def _sample(self) -> None:
        """Keep the gauges true that need a question to a server."""
        while True:
            for dependency in ("database", "kafka", "relay"):
                self._metrics.degraded.labels(dependency).set(dependency in self._health.degraded)
            self._metrics.ready.set(self._health.not_ready is None)
            self._metrics.poll_age.set(time.monotonic() - self._health.polled_at)
            for name, sample in (
                ("lag", self._sample_lag), ("backlog", self._sample_backlog), ("pauses", self._sample_pauses)
            ):  # fmt: skip
                try:
                    await sample()
                except Unavailable as error:  # also how an idle service notices that a server is away
                    self._health.lost(error.dependency, name, error.detail)
                else:
                    self._health.recovered(name)
            self._numbers.note()
            await asyncio.sleep(SAMPLE_S)

    async def _sample_pauses(self) -> None:
        self._status.pauses = await self._database.last_pauses(SHOWN_PAUSES)

    async def _sample_lag(self) -> None:
        await self._source.check_topics()
        assigned = sorted(self._pipeline.assigned)
        epoch = self._pipeline.epoch
        if not assigned:
            await self._source.knock()  # who has nothing to read, or waits for a rebalance, must hear of an outage too
            return
        ends, done = await self._source.ends(assigned), await self._done(assigned)
        if not self._pipeline.is_ours or epoch != self._pipeline.epoch:
            return  # taken away meanwhile
        lags = {partition: max(0, ends[partition] - done[partition]) for partition in assigned}
        for (topic, number), lag in lags.items():
            self._metrics.lag.labels(topic, str(number)).set(lag)
        self._lag = sum(lags.values())

    async def _done(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """The offset up to which everything is committed, or no longer kept, of each partition."""
        starts, known = await self._source.starts(partitions), await self._source.committed(partitions)
        return {partition: max(starts[partition], known.get(partition, 0)) for partition in partitions}

    async def _sample_backlog(self) -> None:
        backlog = await self._database.backlog()
        self._metrics.outbox_rows.set(backlog.outbox_rows)
        self._metrics.outbox_set_aside.set(backlog.set_aside_rows)
        self._metrics.outbox_age.set(backlog.outbox_age_s)
        self._metrics.deferred_age.set(backlog.deferred_age_s)
        self._metrics.failing_campaigns.set(backlog.failing_campaigns)
        for reason in ("locked", "huge", "alone", "failing", "guard", "sweep"):
            self._metrics.deferred_rows.labels(reason).set(backlog.deferred.get(reason, 0))

    _lag: int = 0

    async def _watch(self) -> None:
        """End the process when it stands still although nothing is wrong outside; the supervisor restarts it."""
        healthy_since = time.monotonic()
        while True:
            await asyncio.sleep(WATCHDOG_S / 12)
            now = time.monotonic()
            if self._health.degraded or not self._health.joined:
                healthy_since = now
            silent_s = now - max(self._health.polled_at, healthy_since)
            stuck_s = now - max(self._health.progressed_at, healthy_since) if self._lag else 0.0
            if not self._lag:
                self._health.progressed()
            if max(silent_s, stuck_s) > WATCHDOG_S:
                stacks = io.StringIO()
                for task in asyncio.all_tasks():
                    task.print_stack(limit=8, file=stacks)
                log.critical("standing still, giving up", no_poll_s=silent_s, stuck_s=stuck_s, stacks=stacks.getvalue())
                sys.stdout.flush()
                raise RuntimeError("watchdog: no poll or no progress for a minute")

    async def _until_caught_up(self) -> None:
        """Returns once everything that was there at the start is committed, recounted and published."""
        while True:
            await asyncio.sleep(CAUGHT_UP_POLL_S)
            if await self._health.persist("caught up", self._is_read):
                break
        moment, last = await self._health.persist("caught up", self._database.horizon)
        while True:
            if await self._health.persist("caught up", lambda: self._database.is_caught_up(moment, last)):
                break
            await asyncio.sleep(CAUGHT_UP_POLL_S)
        log.info("caught up")

    async def _is_read(self) -> bool:
        assigned, epoch = sorted(self._pipeline.assigned), self._pipeline.epoch
        if not self._pipeline.is_ours:
            return False  # in the middle of a rebalance nothing is known
        ends = {**await self._source.ends([one for one in assigned if one not in self._ends]), **self._ends}
        done = await self._done(assigned)
        if not self._pipeline.is_ours or epoch != self._pipeline.epoch:
            return False
        self._ends = ends
        return all(done[partition] >= ends[partition] for partition in assigned)


def _begun(jobs: Iterable[tuple[str, Coroutine[None, None, None]]]) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(job, name=name) for name, job in jobs]


def _raise_first(tasks: Sequence[asyncio.Task[None]]) -> None:
    """An engine ends only by a bug or, when caught up, on purpose."""
    for task in tasks:
        if task.done():
            task.result()


async def _cancelled(tasks: Sequence[asyncio.Task[None]], deadline_s: float = CANCEL_DEADLINE_S) -> None:
    """Cancel and wait, but not for ever: a client may be talking to a server that does not answer."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=deadline_s)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # seen: what an engine raised while it was being stopped is nobody's concern


async def end_process(code: int) -> None:
    """After `run`: end even where a client's task does not let itself be cancelled, with this exit code."""
    # A second signal is too late to matter; between here and the end it would kill us with the system's own code.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left and (await asyncio.wait(left, timeout=CANCEL_DEADLINE_S))[1]:
        sys.stdout.flush()
        os._exit(code)
