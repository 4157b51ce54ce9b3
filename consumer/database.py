"""PostgreSQL: one statement per file in sql/, one typed function per statement, and the translation of its errors."""

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from importlib import resources
from typing import Final, TypeVar
from uuid import UUID

import asyncpg
import orjson
from asyncpg.pool import PoolConnectionProxy

from consumer.envelope import Cause, SyncRequest
from consumer.errors import ConfigError, NotWritten, TooSlow, Unavailable
from consumer.generation import Seen, Work
from consumer.guard import Override, Window, rate_bp
from consumer.outcome import Campaign, Deferral, Details, Held, Outcome, Recount
from schemas.events import Trigger

Connection = asyncpg.Connection | PoolConnectionProxy
Row = TypeVar("Row")

POOL_SIZE: Final = 6  # pipeline (two chunks at once), deferred, relay, sweep, gauges
COMMAND_DEADLINE_S: Final = (
    35.0  # statement_timeout plus the time its answer may take; beyond it the connection is dead
)
ACQUIRE_DEADLINE_S: Final = 10.0
ANSWER_DEADLINE_S: Final = 5.0  # for what a server answers at once: a session that went dead is noticed this soon
# A host that vanished is noticed within 11 s also in the middle of a long statement, which a deadline for answers can't
# tell from a slow one. After 5 s of silence the kernel asks every 2 s, and gives up when three were in vain; Linux goes
# by TCP_USER_TIMEOUT alone where that is set (measured), also for what was never acknowledged.
KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 11_000}  # s, s, -, ms
SESSION: Final = {
    "application_name": "campaign-stats",
    "row_security": "off",  # filtered rows would silently count every campaign to zero; now it is an error
    "default_transaction_isolation": "read committed",  # the recount's second snapshot depends on it
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",  # else a single recount is planned anew every time: 3x its CPU (measured)
    "statement_timeout": "30s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "20s",  # longer than the relay's send deadline
    "timezone": "UTC",
}
OUTAGE_CLASSES: Final = ("08", "53", "57P", "40", "28", "3D")  # 28, 3D: login refused, database missing
LOST: Final = (  # of the client: also that no server of several has the attributes asked for, as in a failover
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
REFUSED_CLASSES: Final = ("28", "3D")
OUTAGE_STATES: Final = frozenset(
    ("25006", "42501", "0A000", "42P01", "42883", "42703", "3F000", "57014", "55P03")
)  # the last two only outside a recount, where TooSlow stands for them: a table of ours is locked, a page was too slow
EARLIEST: Final = datetime.min.replace(tzinfo=UTC)
LATEST: Final = datetime.max.replace(tzinfo=UTC)
EXISTS: Final = "SELECT EXISTS (SELECT FROM public.campaigns WHERE id = ANY ($1::uuid[]))"
STALE_POOL: Final = frozenset(("25006", "57P01"))  # after a failover a pool keeps talking to the old node

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL's
_STRING_OR_SPACE: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"| ')  # no other white space stands in printed jsonb


@dataclass(frozen=True, slots=True)
class WindowRead:
    """The window of one candidate; contacts are None when it is empty or older than the `contacted_at` trigger."""

    window: Window
    oldest_contact: datetime | None
    newest_contact: datetime | None
    decided_at: datetime


@dataclass(frozen=True, slots=True)
class Pending:
    """A row of the outbox: `event` goes to the topic of `type` under the campaign's key."""

    id: int
    campaign_id: UUID
    type: str
    event: bytes
    since: datetime | None
    fact: str | None


@dataclass(frozen=True, slots=True)
class Pause:
    """A campaign that the guard paused, and the window that led to it."""

    campaign_id: UUID
    paused_at: datetime
    sent: int
    bounced: int
    threshold_bp: int


@dataclass(frozen=True, slots=True)
class Compared:
    """A campaign as the sweep sees it, unlocked."""

    campaign_id: UUID
    type: str
    status: str
    last_synced_at: datetime | None
    counts: Mapping[str, int]
    drift: Mapping[str, int]
    differs: bool
    waiting: bool
    guard_paused_at: datetime | None
    user_limits: Override | None
    campaign_limits: Override | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in our tables. Ages in seconds, 0 when nothing waits."""

    outbox_rows: int
    set_aside_rows: int
    outbox_age_s: float
    deferred: Mapping[str, int]
    deferred_age_s: float
    failing_campaigns: int


@cache
def statement(name: str) -> str:
    """The text of sql/`name`.sql."""
    return (resources.files("consumer") / "sql" / f"{name}.sql").read_text("utf-8")


@contextmanager
def translated() -> Iterator[None]:
    """Raise Unavailable for what design section 6 calls an outage of the database; everything else goes through.

    A task that is being cancelled stays so: the ROLLBACK on its way out may find its session lost, and that error would
    hide the cancellation.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        _cancelled_first(error)
        if is_outage(error.sqlstate):
            raise Unavailable("database", f"{type(error).__name__} ({error.sqlstate})") from error
        raise
    except LOST as error:
        _cancelled_first(error)
        raise Unavailable("database", f"{type(error).__name__}") from error


@asynccontextmanager
async def _transaction(connection: Connection) -> AsyncIterator[None]:
    """As `connection.transaction()`, but a server that has fallen silent is not asked for a ROLLBACK too.

    It would wait as long as the statement before it; whoever holds the session ends it instead.
    """
    transaction = connection.transaction()
    try:
        async with asyncio.timeout(ANSWER_DEADLINE_S):
            await transaction.start()
        yield
    except BaseException as error:
        if not _is_silence(error):
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                await transaction.rollback()
        raise
    else:
        await transaction.commit()


def _is_silence(error: BaseException) -> bool:
    """Whether it says that no answer came in time."""
    return isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError)


def _cancelled_first(error: BaseException) -> None:
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from error


@contextmanager
def slow_is_an_error() -> Iterator[None]:
    """Inside a recount a cancelled statement or a lock waited for in vain concerns its chunk alone: TooSlow."""
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise TooSlow(is_lock=True) from error
    except asyncpg.QueryCanceledError as error:
        raise TooSlow(is_lock=False) from error


def refusal(error: BaseException | None) -> str | None:
    """What a person must put right in DATABASE_URL, if this error of connecting says so; never quotes the URL."""
    if isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(REFUSED_CLASSES):
        return f"DATABASE_URL: the server refuses it ({error.sqlstate}); check user, password and database"
    if isinstance(error, asyncpg.UndefinedObjectError):
        return f"DATABASE_URL: {error.message}; the driver knows no such option, leave it out"
    if isinstance(error, asyncpg.DataError):
        return f"DATABASE_URL: the server refuses the value of an option in it ({error.sqlstate}); put it right"
    if isinstance(error, asyncpg.ClientConfigurationError):
        return f"DATABASE_URL: {str(error).splitlines()[0]}; put this option right"
    if isinstance(error, ssl.SSLError):
        return (
            f"DATABASE_URL: TLS fails ({error.reason or type(error).__name__}); check sslmode, sslrootcert, sslcert and"
            " sslkey against what the server has"
        )
    if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):  # asyncpg has no class for it
        return "DATABASE_URL: the server has no TLS, but sslmode asks for it; turn TLS on or choose another sslmode"
    if isinstance(error, ValueError | OverflowError):  # of reading the URL, a PG* variable or a password file
        return f"DATABASE_URL: {type(error).__name__} in it, or in a PG* variable of the environment; put it right"
    return None


def is_outage(sqlstate: str | None) -> bool:
    """Away, full, read-only, serialization, rights or tables or functions not as they should be."""
    if sqlstate is None:
        return True
    return sqlstate.startswith(OUTAGE_CLASSES) or sqlstate in OUTAGE_STATES


class Database:
    """A pool of sessions set up as design section 5 says. Opening it connects to nothing yet."""

    def __init__(self, url: str, *, size: int = POOL_SIZE) -> None:
        self._pool = asyncpg.create_pool(
            url,
            min_size=0,
            max_size=size,
            server_settings=SESSION,
            command_timeout=COMMAND_DEADLINE_S,
            timeout=ACQUIRE_DEADLINE_S,
            init=_prepare,
            reset=_leave_alone,
            max_inactive_connection_lifetime=300,
        )

    async def open(self) -> None:
        """Make the pool usable."""
        with translated():
            await self._pool

    async def close(self, deadline_s: float) -> None:
        """End all sessions, the hard way after the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._pool.close()
        except TimeoutError:
            self.terminate()

    def terminate(self) -> None:
        """End all sessions now: whoever waits for a server that does not answer stops waiting."""
        self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A session outside any transaction. Raises Unavailable when none can be had or it is lost."""
        try:
            with translated():
                async with self._pool.acquire(timeout=ACQUIRE_DEADLINE_S) as connection:
                    try:
                        yield connection
                    except (TimeoutError, Unavailable) as error:
                        if _is_silence(error):
                            connection.terminate()  # else giving it back waits once more for the same silent server
                        raise
        except Unavailable as error:
            cause = error.__cause__
            if _is_silence(error) or (isinstance(cause, asyncpg.PostgresError) and cause.sqlstate in STALE_POOL):
                await self._pool.expire_connections()  # the others are of the same time
            raise

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Transaction"]:
        """One READ COMMITTED transaction: committed on the way out, rolled back when anything is raised.

        Raises Unavailable for an outage; after one on COMMIT the result is unknown: repeat the whole, it is idempotent.
        """
        async with self.connection() as connection, _transaction(connection):
            yield Transaction(connection)

    async def check_reachable(self) -> None:
        """Raises ConfigError when DATABASE_URL can never work as it is, Unavailable when no session can be had now."""
        try:
            async with self.connection():
                return
        except (Unavailable, asyncpg.PostgresError, ValueError, OverflowError) as error:
            if problem := refusal(error.__cause__ if isinstance(error, Unavailable) else error):
                raise ConfigError([problem]) from error
            raise

    async def owner(self, campaign_id: UUID) -> UUID | None:
        """Whose campaign this is; None when there is none of this id."""
        async with self.connection() as connection:
            user_id: UUID | None = await connection.fetchval(
                "SELECT user_id FROM public.campaigns WHERE id = $1", campaign_id
            )
            return user_id

    async def check_writable(self) -> None:
        """Raises Unavailable unless a write is possible now (a standby after a failover only reads)."""
        async with self.connection() as connection:
            if await connection.fetchval(
                "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool"
            ):
                raise Unavailable("database", "read-only")

    async def backlog(self) -> Backlog:
        """What waits in our tables."""
        async with self.connection() as connection, asyncio.timeout(ANSWER_DEADLINE_S):
            return Backlog(**dict(await _one(connection, statement("backlog"))))

    async def last_pauses(self, count: int) -> list[Pause]:
        """The latest pauses of the guard, the newest first."""
        async with self.connection() as connection, asyncio.timeout(ANSWER_DEADLINE_S):
            return [Pause(*row.values()) for row in await connection.fetch(statement("last_pauses"), count)]

    async def next_due_s(self) -> float | None:
        """Seconds until a deferred row is due, negative when one waits already, None when there is none."""
        async with self.connection() as connection, asyncio.timeout(ANSWER_DEADLINE_S):
            seconds: float | None = await connection.fetchval(statement("next_due"))
            return seconds

    async def forget(self, days: int) -> int:
        """Apply retention; returns how many rows went."""
        async with self.connection() as connection:
            gone: int = await connection.fetchval(statement("retention"), days)
            return gone

    async def horizon(self) -> tuple[datetime, int]:
        """The database's clock and the highest outbox id handed out so far."""
        async with self.connection() as connection:
            row = await _one(
                connection,
                "SELECT clock_timestamp() AS now, coalesce((SELECT max(id) FROM campaign_stats.outbox), 0) AS last",
            )
            return row["now"], row["last"]

    async def is_caught_up(self, moment: datetime, last_outbox_id: int) -> bool:
        """Whether nothing of that moment is still deferred (but sweep and failing ones) or unpublished."""
        async with self.connection() as connection:
            row = await _one(connection, statement("caught_up"), moment, last_outbox_id)
            return bool(row["deferred"] == 0 and row["unpublished"] == 0)


class Transaction:
    """Statements of one transaction. Its methods translate nothing: errors pass through Database.transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """What is raised inside undoes only what was done inside. Raises Unavailable for an outage."""
        with translated(), slow_is_an_error():
            async with _transaction(self._connection):
                yield

    async def now(self) -> datetime:
        """The database's clock."""
        moment: datetime = await self._connection.fetchval("SELECT clock_timestamp()")
        return moment

    async def recount(self, campaign_ids: Sequence[UUID], caller: str) -> tuple[dict[UUID, Recount], dict[UUID, Held]]:
        """Lock, recount and write `stats` and `last_synced_at`; those that exist, recounted or held back.

        Two statements in one function: a statement's snapshot is older than the lock it waits for (design, section 5).
        Raises TooSlow, and NotWritten where a campaign exists but the product let nothing be written.
        """
        recounts: dict[UUID, Recount] = {}
        held: dict[UUID, Held] = {}
        with slow_is_an_error():
            rows = await self._connection.fetch(statement("recount"), campaign_ids, caller)
        for row in rows:
            if row["held"] is None:
                recounts[row["campaign_id"]] = _recount(row)
            else:
                held[row["campaign_id"]] = Held(
                    row["campaign_id"],
                    row["user_id"],
                    row["held"],
                    row["retry_at"],
                    row["failures"],
                    row["counted_at"],
                )
        missing = [campaign_id for campaign_id in campaign_ids if not (campaign_id in recounts or campaign_id in held)]
        if missing and await self._connection.fetchval(EXISTS, missing):
            raise NotWritten("a trigger or rule of the product suppresses the update")
        return recounts, held

    async def describe(self, campaign_id: UUID) -> Details:
        """A recounted campaign's row as its owner sees it."""
        row = await _one(self._connection, statement("describe"), campaign_id)
        return Details(
            _campaign(row),
            row["signature"],
            verbatim(row["operating_hours"]),
            row["sender_accounts"],
        )

    async def windows(self, candidates: Sequence[tuple[UUID, int, datetime | None]]) -> dict[UUID, WindowRead]:
        """The guard's window of every candidate: (campaign, size or 0 for all, opened at or None for the beginning)."""
        rows = await self._connection.fetch(
            statement("guard_windows"),
            [campaign_id for campaign_id, _, _ in candidates],
            [size for _, size, _ in candidates],
            [opened_at for _, _, opened_at in candidates],
        )
        return {
            row["id"]: WindowRead(
                Window(row["sent"], row["bounced"]), row["oldest_contact"], row["newest_contact"], row["decided_at"]
            )
            for row in rows
        }

    async def pause(self, campaign_ids: Sequence[UUID]) -> dict[UUID, tuple[datetime, Campaign]]:
        """Pause locked, active campaigns for their bounce rate: when, and the row afterwards."""
        rows = await self._connection.fetch(statement("pause"), campaign_ids)
        return {row["campaign_id"]: (row["paused_at"], _campaign(row)) for row in rows}

    async def save(self, outcome: Outcome) -> None:
        """State, audit, outbox and deferrals in one round trip, a second one where failing campaigns were met; none
        when there is nothing to save.

        Raises TooSlow where somebody holds the state of one of the recounted campaigns: again an error of its chunk.
        """
        if not (outcome.states or outcome.outbox or outcome.deferrals or outcome.decisions or outcome.hurried):
            return
        with slow_is_an_error() if outcome.states else nullcontext():
            await self._save(outcome)
        if outcome.hurried:
            await self._connection.execute(statement("hurry"), outcome.hurried)

    async def _save(self, outcome: Outcome) -> None:
        await self._connection.execute(
            statement("save"),
            [state.campaign_id for state in outcome.states],
            [state.version for state in outcome.states],
            [state.published and dict(state.published[0]) for state in outcome.states],
            [state.published and state.published[1] for state in outcome.states],
            [state.guard_paused_at for state in outcome.states],
            [state.observed_trip for state in outcome.states],
            [state.last_total for state in outcome.states],
            [state.cooldown_s for state in outcome.states],
            [row.shard for row in outcome.outbox],
            [row.campaign_id for row in outcome.outbox],
            [row.type for row in outcome.outbox],
            [row.event for row in outcome.outbox],
            [
                {
                    "campaign_id": decision.campaign_id,
                    "decided_at": decision.judgement.paused_at or decision.judgement.decided_at,
                    "mode": decision.judgement.resolved.limits.mode,
                    "verdict": decision.judgement.verdict,
                    "paused": decision.judgement.paused_at is not None,
                    "version": decision.version,
                    "sent": decision.judgement.window.sent,
                    "bounced": decision.judgement.window.bounced,
                    "rate_bp": rate_bp(decision.judgement.window),
                    "threshold_bp": decision.judgement.resolved.limits.threshold_bp,
                    "min_sent": decision.judgement.resolved.limits.min_sent,
                    "window_size": decision.judgement.resolved.limits.window,
                    "limits_from": decision.judgement.resolved.origin,
                    "opened_at": decision.judgement.opened_at,
                    "oldest_contact": decision.judgement.oldest_contact,
                    "newest_contact": decision.judgement.newest_contact,
                }
                for decision in outcome.decisions
            ],
            [_deferral(deferral) for deferral in outcome.deferrals],
            [row.since for row in outcome.outbox],
            [row.fact for row in outcome.outbox],
        )

    async def take_deferred(self) -> list[Work]:
        """All due rows of one campaign, oldest row first; empty when nothing is due. Must be the first statement."""
        rows = await self._connection.fetch(statement("take_deferred"))
        return [_work(row) for row in sorted(rows, key=lambda row: row["id"])]

    async def fail(self, campaign_id: UUID) -> tuple[int, UUID | None, datetime]:
        """Note one more failure in a row: how many, the campaign's owner (None: it is gone), the clock."""
        row = await _one(self._connection, statement("fail"), campaign_id)
        return row["failures"], row["user_id"], row["now"]

    async def lock_shards(self) -> list[int]:
        """Shards with something to publish that no other relay holds; locked until the transaction ends."""
        return [row["shard"] for row in await self._connection.fetch(statement("relay_lock"))]

    async def read_outbox(
        self, shards: Sequence[int], rows: int, size: int, types: Sequence[str] | None = None
    ) -> list[Pending]:
        """What is to be published of locked shards in id order, about `rows` rows and `size` bytes at most.

        Only of these `types`, if any are given: then those of other types cost nothing, however many stand in front.
        """
        if types is None:
            found = await self._connection.fetch(statement("relay_read"), shards, rows, size)
        else:
            found = await self._connection.fetch(statement("relay_read_types"), shards, rows, size, types)
        return [
            Pending(row["id"], row["campaign_id"], row["type"], row["event"], row["since"], row["fact"])
            for row in found
        ]

    async def has_outbox(self, event_type: str) -> bool:
        """Whether anything of this type is still to be published."""
        found: bool = await self._connection.fetchval(statement("relay_has"), event_type)
        return found

    async def finish_outbox(self, published: Sequence[int], refused: Mapping[int, str]) -> None:
        """Delete what was acknowledged, set aside what can never be sent (id -> why).

        The commit of this transaction does not wait for the disk.
        """
        await self._connection.execute(statement("relay_done"), published, list(refused), list(refused.values()))

    async def sweep_turn(self) -> tuple[UUID | None, datetime | None] | None:
        """Where the sweep goes on and when its lap began; None when no page is due or somebody else sweeps."""
        row = await self._connection.fetchrow(statement("sweep_turn"))
        return None if row is None else (row["after_id"], row["lap_started"])

    async def sweep_page(self, after: UUID | None, campaigns: int) -> list[Compared]:
        """The next campaigns in id order, compared with their rows and with what was published."""
        return [
            Compared(
                row["id"],
                row["type"],
                row["status"],
                row["last_synced_at"],
                row["counts"],
                row["drift"],
                row["differs"],
                row["waiting"],
                row["guard_paused_at"],
                override(row["user_limits"]),
                override(row["campaign_limits"]),
            )
            for row in await self._connection.fetch(statement("sweep_page"), after, campaigns)
        ]

    async def sweep_next(self, after: UUID | None) -> UUID | None:
        """The next campaign in id order, uncompared."""
        found: UUID | None = await self._connection.fetchval(statement("sweep_next"), after)
        return found

    async def sweep_advance(self, after: UUID | None, interval_s: float) -> None:
        """Go on after this campaign, or with None begin the next lap in `interval_s` seconds."""
        await self._connection.execute(statement("sweep_advance"), after, interval_s)


async def _prepare(connection: Connection) -> None:
    _keep_alive(connection)
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=_to_json, decoder=orjson.loads)
    # asyncpg's own decoder raises for times that Python cannot hold, and so fails every row read with them.
    await connection.set_type_codec(
        "timestamptz", schema="pg_catalog", encoder=_to_microseconds, decoder=_from_microseconds, format="tuple"
    )


def _keep_alive(connection: Connection) -> None:
    """Set KEEPALIVE, as far as the platform knows it, on a session over TCP; a Unix socket ends with its server."""
    ours: socket.socket = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]  # no public way
    if ours.family not in (socket.AF_INET, socket.AF_INET6):
        return
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            ours.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _to_json(value: object) -> str:
    return orjson.dumps(value, default=str).decode()  # str: asyncpg's own subclass of UUID


@lru_cache(maxsize=4_096)  # three of the five in a row are those of its chunk: 0.6 us each
def _from_microseconds(since_2000: tuple[int]) -> datetime:
    try:
        return _EPOCH + timedelta(microseconds=since_2000[0])
    except OverflowError:  # BC, beyond the year 9999, infinity: such a row must not stop its neighbours
        return LATEST if since_2000[0] > 0 else EARLIEST


def _to_microseconds(moment: datetime) -> tuple[int]:
    return ((moment - _EPOCH) // timedelta(microseconds=1),)


def verbatim(jsonb: str | None) -> orjson.Fragment | None:
    """A jsonb column of the product, read as text, for JSON that we write: the same value, compact, whatever it holds.

    It is not parsed, because jsonb holds deeper nesting and larger numbers than any parser of ours takes.
    """
    return None if jsonb is None else orjson.Fragment(_STRING_OR_SPACE.sub(_without_space, jsonb))


def _without_space(match: re.Match[str]) -> str:
    return "" if match[0] == " " else match[0]


async def _leave_alone(connection: Connection) -> None:
    """Every session is ours alone and set up once: the pool's RESET would be a round trip per transaction."""


async def _one(connection: Connection, query: str, *arguments: object) -> asyncpg.Record:
    row = await connection.fetchrow(query, *arguments)
    if row is None:
        raise LookupError("a statement that always returns one row returned none")
    return row


def _recount(row: asyncpg.Record) -> Recount:
    return Recount(
        campaign=_campaign(row),
        counts=row["counts"],
        drift=row["drift"],
        synced_before=row["synced_before"],
        counted_at=row["counted_at"],
        version=row["version"],
        published_counts=row["published_counts"],
        published_status=row["published_status"],
        guard_paused_at=row["guard_paused_at"],
        observed_trip=row["observed_trip"],
        last_total=row["last_total"],
        failures=row["failures"],
        user_limits=override(row["user_limits"]),
        campaign_limits=override(row["campaign_limits"]),
    )


def _campaign(row: asyncpg.Record) -> Campaign:
    return Campaign(
        id=row["campaign_id"],
        user_id=row["user_id"],
        type=row["type"],
        name=row["name"],
        status=row["status"],
        daily_limit=row["daily_limit"],
        stop_on_reply=row["stop_on_reply"],
        open_tracking=row["open_tracking"],
        skip_other_campaigns=verbatim(row["skip_other_campaigns"]),
        stats=row["stats"],
        last_synced_at=row["last_synced_at"],
        pause_reason=row["pause_reason"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def override(limits: Mapping[str, object] | None) -> Override | None:
    """A row of guard_limits as read by to_jsonb; None when there is none."""
    if limits is None:
        return None
    return Override(
        mode=_text(limits["mode"]),
        threshold_bp=_integer(limits["threshold_bp"]),
        min_sent=_integer(limits["min_sent"]),
        window=_integer(limits["window_size"]),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _deferral(deferral: Deferral) -> dict[str, object]:
    work = deferral.work
    return {
        "campaign_id": work.campaign_id,
        "reason": deferral.reason,
        "delay_s": deferral.delay_s,
        "tries": deferral.tries,
        "first_written": work.first_written,
        "trigger": work.trigger,
        "hint": work.hint and work.hint.to_json(),
        "seen": work.seen and {"last_synced_at": work.seen.last_synced_at, "drift": work.seen.drift},
        "requests": [request.to_json() for request in work.requests],
    }


def _work(row: asyncpg.Record) -> Work:
    seen = row["seen"]
    return Work(
        row["campaign_id"],
        Trigger(row["trigger"]),
        hint=row["hint"] and Cause.from_json(row["hint"]),
        requests=tuple(SyncRequest.from_json(request) for request in row["requests"]),
        seen=seen
        and Seen(seen["last_synced_at"] and datetime.fromisoformat(seen["last_synced_at"]), drift=seen["drift"]),
        reason=row["reason"],
        tries=row["tries"],
        first_written=row["first_written"],
    )
