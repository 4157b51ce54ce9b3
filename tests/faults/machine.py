"""Random histories of two replicas on one database and one log: crashes, lost sessions, revocations, failing sends,
writers at the same time, clocks that jump back. Everything promised is checked after every step and again at rest.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, ClassVar, Final, Literal, TypeVar
from uuid import UUID, uuid5

import asyncpg
import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from structlog.testing import capture_logs

from consumer import health as health_module
from consumer import outcome as outcome_module
from consumer import pipeline as pipeline_module
from consumer.database import statement
from consumer.errors import Unavailable
from consumer.generation import Partition
from tests.faults.arena import EMPTY, FREEZE, REPLICAS, TIME_PASSES, Arena, snapshots
from tests.faults.fakes import HINTS, PARTITIONS, REQUESTS, CommitFate, Crash, Log, Member, SendFate, Topics
from tests.faults.model import Meaning, Model, Snapshot
from tests.faults.replica import Point, Replica, Turn
from tests.unit.builders import OWNER, STRANGER, campaign_id, hint_event, request_event

Action = Literal["crash", "lose", "error", "write", "collect", "revoke", "overrun", "regain", "flush", "work", "relay"]
Plan = tuple[Point, Action] | None
Owners = tuple[int, int, int]

CHUNK: Final = 1  # campaign, so that a generation has several chunks
MANY: Final = 9  # records of each partition
CAMPAIGNS: Final = 4  # the last one never exists
BEGINNING: Final[Sequence[tuple[str, Mapping[str, int]]]] = (
    ("email", {"pending": 25, "sent": 8, "bounced": 1}),
    ("email", {"pending": 25, "sent": 14, "replied": 2, "bounced": 1}),
    ("linkedin", {"pending": 8, "connection_sent": 12}),
)
MOVES: Final = (
    ("pending", "sent"),
    ("pending", "sent"),
    ("sent", "bounced"),
    ("sent", "bounced"),
    ("sent", "bounced"),
    ("sent", "replied"),
    ("sent", "completed"),
    ("sent", "cancelled"),
    ("pending", "mystery"),
    ("connection_sent", "connected"),
)
EXAMPLES: Final = 25  # of a seed; its histories end with the first that finds something
ROUNDS: Final = 12  # at rest within so many rounds of everything, or never

campaigns = st.integers(0, CAMPAIGNS - 1)
existing = st.integers(0, CAMPAIGNS - 2)
replicas = st.integers(0, REPLICAS - 1)
owners_of = st.tuples(replicas, replicas, replicas)
mostly = st.sampled_from((True, True, True, False))
send_fates: st.SearchStrategy[list[SendFate]] = st.lists(
    st.sampled_from(("acknowledged", "acknowledged", "failed", "unheard", "away", "refused", "closed")), max_size=4
)
commit_fates: st.SearchStrategy[CommitFate] = st.sampled_from(
    ("accepted", "accepted", "accepted", "refused", "away", "unknown")
)


def plans(points: Sequence[Point], actions: Sequence[Action]) -> st.SearchStrategy[Plan]:
    """Nothing, or one action at one point of the step."""
    return st.none() | st.tuples(st.sampled_from(points), st.sampled_from(actions))


flush_plans = plans(
    ("begin", "recount", "recounted", "saved", "committed", "offsets"),
    ("crash", "lose", "error", "write", "collect", "revoke", "overrun", "regain", "regain", "work", "flush"),
)
work_plans = plans(
    ("taken", "recount", "recounted", "saved", "committed"), ("crash", "lose", "error", "write", "flush", "work")
)
relay_plans = plans(("read", "sent", "committed"), ("crash", "lose", "flush", "relay", "relay"))


STEPS: dict[str, tuple[int, Mapping[str, st.SearchStrategy[Any]]]] = {}
S = TypeVar("S", bound=Callable[..., None])


def sometimes(weight: int, **arguments: st.SearchStrategy[Any]) -> Callable[[S], S]:
    """A step of the machine, drawn as often as its weight says.

    No rules of hypothesis: it leaves many of them out of an example, and what we look for needs most of ours together.
    """

    def registered(step: S) -> S:
        STEPS[step.__name__] = (weight, arguments)
        return step

    return registered


class Machine(RuleBasedStateMachine):
    """Two replicas, three campaigns, one log. Bound to an arena by `machine_on`."""

    arena: ClassVar[Arena]

    def __init__(self) -> None:
        super().__init__()
        self.log, self.topics = Log(), Topics()
        self.model = Model(self.log, self.topics)
        self.replicas: list[Replica] = []
        self.plan: Plan = None
        self.planned_for = 0
        self.commit_fate: CommitFate = "accepted"
        self.held: tuple[UUID, bool] | None = None
        self.holding: Any = None
        self.committing = asyncio.Lock()
        self.seen: dict[Turn, dict[UUID, tuple[int, list[Snapshot]]]] = {}
        self.letting_go: list[asyncio.Task[None]] = []
        self.meanwhile: list[asyncio.Task[None]] = []
        self.owners: Owners = (0, 1, 0)
        self.audited: list[int] = []
        self.jumped: set[UUID] = set()
        self.requests = 0

    # -- the example

    @initialize(owners=owners_of)
    def begin(self, owners: Owners) -> None:
        """Empty tables, three campaigns nobody told us of, two replicas."""
        self._step(self._begin(owners))

    async def _begin(self, owners: Owners) -> None:
        await self.arena.observer.execute(EMPTY)
        for number, (type_, statuses) in enumerate(BEGINNING):
            one = campaign_id(number)
            await self.arena.writer.execute(
                "INSERT INTO campaigns (id, user_id, type, name, status) VALUES ($1, $2, $3, 'Spring', 'active')",
                one, OWNER, type_,
            )  # fmt: skip
            flat = [status for status, count in statuses.items() for _ in range(count)]
            await self.arena.writer.execute(
                "INSERT INTO campaign_prospects (id, campaign_id, user_id, status, contacted_at)"
                " SELECT p.id, $1, $2, p.status, CASE WHEN p.status IN ('sent', 'replied', 'bounced') THEN"
                "        clock_timestamp() - make_interval(mins => p.place::int) END"
                "   FROM unnest($3::uuid[], $4::text[]) WITH ORDINALITY AS p (id, status, place)",
                one, OWNER, [uuid5(one, str(place)) for place in range(len(flat))], flat,
            )  # fmt: skip
            self.model.alive.add(one)
            self.model.stale.add(one)
        self.replicas = [self._replica(number) for number in range(REPLICAS)]
        await self._rebalance(owners)

    def _replica(self, number: int) -> Replica:
        database = self.arena.databases[number]
        database.probe = self
        member = Member(self.log, number, self.model.delivered, partial(self._fate, number), self._accepts)
        return Replica(number, database, member, self.topics)

    def _step(self, step: Any) -> None:
        """One step; what it broke is raised here."""
        self.arena.run(self._checked(step))
        self.model.raise_first()

    async def _checked(self, step: Any) -> None:
        try:
            await step
        finally:
            self.plan, self.commit_fate, self.topics.fates = None, "accepted", []
        while self.meanwhile:
            [ended] = await asyncio.gather(self.meanwhile.pop(), return_exceptions=True)
            if isinstance(ended, BaseException) and not isinstance(ended, (Crash, Unavailable)):
                raise ended  # those two are the replica's to see
        for task in self.letting_go:
            await task
        if self.letting_go:
            self.letting_go = []
            await self._rebalance((self.owners[1], self.owners[2], self.owners[0]))
        await self._look()
        await self.arena.observer.execute(FREEZE)

    async def _look(self) -> None:
        rows = await self.arena.campaigns()
        self.model.looked({one: row["last_synced_at"] for one, row in rows.items()}, await self.arena.deferred())

    def teardown(self) -> None:
        """Come to rest, let a sweep find what nobody told, and end."""
        try:
            if self.replicas and not self.model.violations:
                self._step(self._rest(swept=False))
                self._step(self._rest(swept=True))
        finally:
            self.arena.run(self._end())

    async def _end(self) -> None:
        for replica in self.replicas:
            await replica.kill()
        await self._release(commit=False)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One of the steps below."""
        name = data.draw(st.sampled_from([name for name, (weight, _) in STEPS.items() for _ in range(weight)]))
        arguments = {argument: data.draw(strategy, argument) for argument, strategy in STEPS[name][1].items()}
        getattr(self, name)(**arguments)

    # -- probes: the service's own transactions

    async def arrive(self, replica: int, point: Point, turn: Turn | None) -> None:
        """The service is at this point; do what the step planned for it, once."""
        if self.plan is None or self.plan[0] != point or replica != self.planned_for:
            return
        action, self.plan = self.plan[1], None
        other = self.replicas[1 - replica]
        match action:
            case "crash":
                raise Crash
            case "lose" if turn is None:
                raise Unavailable("database", "the answer was lost")
            case "lose" if turn is not None:
                await self.arena.end_session(turn.connection.get_server_pid())
            case "error" if point == "recount" and turn is not None:
                self.model.failed.update(self.model.alive)
                raise RuntimeError("this recount fails")
            case "write":
                await self._write_meanwhile(turn)
            case "collect":
                await self._collect(self.replicas[replica])
            case "revoke":
                await self._collect(self.replicas[replica])
                self.letting_go.append(asyncio.create_task(self.replicas[replica].pipeline.let_go()))
                await asyncio.sleep(0)
            case "overrun" | "regain":
                await self._collect(self.replicas[replica])
                await self._overrun(replica, regain=action == "regain")
            case "flush":
                await self._flush(other, 9)
            case "work":
                await self._turn(other.deferred.turn())
            case "relay":
                await self._write_meanwhile(turn)
                await self._flush(other, 9)
                await self._turn(other.relay.turn())

    async def recounted(self, turn: Turn, recounts: Mapping[UUID, Mapping[str, int]]) -> None:
        """Remember what this transaction sees, now that it has the locks; the service counted a moment ago."""
        now = self.model.tick()
        seen = self.seen.setdefault(turn, {})
        for one, snapshot in (await snapshots(turn.connection, list(recounts))).items():
            seen[one] = (now, [snapshot])
            self.model.recounted(recounts[one], snapshot)

    async def _write_meanwhile(self, turn: Turn | None) -> None:
        """The product moves prospects of every campaign that nobody of its own holds, and says so."""
        for number in range(CAMPAIGNS - 1):
            if campaign_id(number) in self.model.alive and not self._is_held(campaign_id(number)):
                await self._move(self.arena.writer, campaign_id(number), "pending", "sent", 2, by_function=False)
                await self._move(self.arena.writer, campaign_id(number), "sent", "bounced", 1, by_function=False)
                self._hint(campaign_id(number))
        if turn is not None and turn in self.seen:
            for one, snapshot in (await snapshots(turn.connection, list(self.seen[turn]))).items():
                self.seen[turn][one][1].append(snapshot)

    async def finished(self, turn: Turn) -> None:
        """A transaction committed: look at what it left."""
        observer = self.arena.observer
        outbox = await observer.fetch(
            "SELECT id, campaign_id, type, event, set_aside_at IS NOT NULL AS aside"
            "  FROM campaign_stats.outbox ORDER BY id"
        )
        audit = await observer.fetch(
            "SELECT id, campaign_id, decided_at, version, sent, bounced FROM campaign_stats.guard_decisions"
            " WHERE paused AND id <> ALL ($1::bigint[]) ORDER BY id",
            self.audited,  # by presence: an id is handed out before it is committed
        )
        self.audited += [row["id"] for row in audit]
        rows = await self.arena.campaigns() if audit else {}
        self.model.committed(self.seen.pop(turn, {}), outbox, audit, rows)

    @asynccontextmanager
    async def writer_waits(self) -> AsyncIterator[None]:
        """Meanwhile: a writer of the product that holds a campaign commits as soon as somebody waits for it."""
        done = asyncio.Event()
        looking = asyncio.create_task(self._commit_for_waiter(done)) if self.held is not None else None
        try:
            yield
        finally:
            done.set()
            if looking is not None:
                await looking

    async def _commit_for_waiter(self, done: asyncio.Event) -> None:
        while not done.is_set():
            try:
                async with asyncio.timeout(0.005):
                    await done.wait()
            except TimeoutError:
                if await self.arena.waiters():
                    await self._release(commit=True)
                    return

    async def _fate(self, replica: int) -> CommitFate:
        """Of a commit, after whatever was planned to happen while it is on its way."""
        fate, self.commit_fate = self.commit_fate, "accepted"
        self.meanwhile.append(asyncio.create_task(self.arrive(replica, "offsets", None)))
        await asyncio.shield(self.meanwhile[-1])  # it goes on when it calls off the commit itself
        return fate

    async def _accepts(self, offsets: Mapping[Partition, int]) -> None:
        waiting: dict[UUID, frozenset[str]] = {}
        for one, requests in (await self.arena.deferred()).values():
            waiting[one] = waiting.get(one, frozenset()) | requests
        self.model.commits(offsets, waiting)

    # -- steps of the service

    async def _flush(self, replica: Replica, records: int, *, in_backlog: bool = False) -> None:
        await self._survived(replica, self._flushed(replica, records, in_backlog=in_backlog))

    async def _flushed(self, replica: Replica, records: int, *, in_backlog: bool) -> None:
        replica.member.grant(records, behind=pipeline_module.FAR_BEHIND if in_backlog else 0)
        if in_backlog:
            await replica.collected()
            replica.member.grant(2)
        await replica.idle()

    async def _collect(self, replica: Replica) -> None:
        """Fetching goes on while a flush is under way, and so do upstreams."""
        self._hints()
        replica.member.grant(2)
        await replica.collected()

    async def _turn(self, turn: Any) -> bool:
        """One turn of an engine; what an outage stops it has to repeat."""
        try:
            return bool(await turn)
        except Unavailable:
            return True

    async def _survived(self, replica: Replica, work: Any) -> None:
        """Work of a replica that may crash; then a new process takes its place."""
        try:
            await work
        except Crash:
            await replica.kill()
            await self.arena.crashed(replica.number)
            self.seen.clear()
            self.replicas[replica.number] = self._replica(replica.number)
            await self._rebalance(self.owners)

    async def _rebalance(self, owners: Owners) -> None:
        """All partitions are taken away from everybody, then given out anew."""
        for replica in self.replicas:
            await replica.pipeline.let_go()
        self._assign(owners)

    def _assign(self, owners: Owners) -> None:
        self.owners = owners
        self.log.owners = dict(zip(PARTITIONS, owners, strict=True))
        for replica in self.replicas:
            replica.pipeline.take_over(replica.member.assigned())

    async def _overrun(self, replica: int, *, regain: bool) -> None:
        """The group takes everything from a flush that did not end in time, and may give it back later."""
        mine, other = self.replicas[replica], self.replicas[1 - replica]
        before = self.owners
        for owners in ((other.number,) * 3, before) if regain else ((other.number,) * 3,):
            letting_go = asyncio.create_task(mine.pipeline.let_go())
            await asyncio.sleep(0)
            letting_go.cancel()  # its deadline is over
            await asyncio.gather(letting_go, return_exceptions=True)
            await other.pipeline.let_go()
            self._assign(owners)
            self._hints()
            await self._flush(other, 9)

    @sometimes(
        8, number=replicas, records=st.sampled_from((3, 1, MANY)), plan=flush_plans, fate=commit_fates, fates=send_fates
    )
    def flush(self, number: int, records: int, plan: Plan, fate: CommitFate, fates: list[SendFate]) -> None:
        """A replica reads some records and makes them true; many of them are a backlog, some of it recounted ahead."""
        self.plan, self.planned_for, self.commit_fate, self.topics.fates = plan, number, fate, fates
        self._step(self._flush(self.replicas[number], records, in_backlog=records == MANY))

    @sometimes(5, number=replicas, plan=work_plans)
    def work(self, number: int, plan: Plan) -> None:
        """A replica works off one deferred campaign."""
        self.plan, self.planned_for = plan, number
        replica = self.replicas[number]
        self._step(self._survived(replica, self._turn(replica.deferred.turn())))

    @sometimes(6, number=replicas, plan=relay_plans, fates=send_fates)
    def relay(self, number: int, plan: Plan, fates: list[SendFate]) -> None:
        """A replica publishes what stands in the outbox."""
        self.plan, self.planned_for, self.topics.fates = plan, number, fates
        replica = self.replicas[number]
        self._step(self._survived(replica, self._turn(replica.relay.turn())))

    @sometimes(1, number=replicas)
    def sweep(self, number: int) -> None:
        """A replica compares everything with what is stored and published."""
        self._step(self._sweep(number))

    async def _sweep(self, number: int) -> None:
        await self.arena.observer.execute("UPDATE campaign_stats.sweep SET due_at = '-infinity'")
        await self._turn(self.replicas[number].sweep.page())

    @sometimes(1, number=replicas)
    def crash(self, number: int) -> None:
        """A process is gone while it waits for work; what it had collected is gone too."""
        self._step(self._survived(self.replicas[number], self._crash()))

    async def _crash(self) -> None:
        raise Crash

    @sometimes(1, owners=owners_of)
    def rebalance(self, owners: Owners) -> None:
        """Partitions move."""
        self._step(self._rebalance(owners))

    @sometimes(2)
    def time_passes(self) -> None:
        """Whatever waits for a moment is due."""
        self._step(self.arena.observer.execute(TIME_PASSES))

    # -- steps of the world outside

    def _hint(self, one: UUID) -> None:
        number = next(number for number in range(CAMPAIGNS) if campaign_id(number) == one)
        event = hint_event(number, id=f"hint-{self.model.tick()}")
        record = self.log.append((HINTS, number % 2), json.dumps(event).encode())
        self.model.wrote(record, Meaning("hint", one))

    def _hints(self) -> None:
        for number in range(CAMPAIGNS - 1):
            self._hint(campaign_id(number))

    @sometimes(3, numbers=st.lists(campaigns, min_size=1, max_size=6))
    def hint(self, numbers: list[int]) -> None:
        """An upstream says that campaigns changed, whether or not they did."""
        for number in numbers:
            self._hint(campaign_id(number))

    @sometimes(2, asked=st.lists(st.tuples(campaigns, mostly), min_size=1, max_size=5))
    def request(self, asked: list[tuple[int, bool]]) -> None:
        """Owners, and sometimes strangers, ask for campaigns' numbers."""
        for number, is_owner in asked:
            self.requests += 1
            request, one = f"request-{self.requests}", campaign_id(number)
            event = request_event(number, id=request)
            event["data"] = {"campaign_id": str(one), "user_id": str(OWNER if is_owner else STRANGER)}
            record = self.log.append((REQUESTS, 0), json.dumps(event).encode())
            self.model.wrote(record, Meaning("request", one, request, foreign=not is_owner))

    @sometimes(1, partition=st.sampled_from(PARTITIONS), is_garbage=mostly)
    def nonsense(self, partition: Partition, is_garbage: bool) -> None:
        """Bytes nobody can read, or a tombstone."""
        record = self.log.append(partition, b"no json" if is_garbage else None)
        self.model.wrote(record, Meaning("garbage" if is_garbage else "tombstone"))

    def _is_held(self, one: UUID) -> bool:
        return self.held is not None and self.held[0] == one

    def _is_free(self, number: int) -> bool:
        return campaign_id(number) in self.model.alive and not self._is_held(campaign_id(number))

    async def _move(
        self, session: asyncpg.Connection, one: UUID, before: str, after: str, count: int, *, by_function: bool
    ) -> None:
        """The first prospects of one status get another, each counted by the product or not."""
        chosen = await session.fetch(
            "SELECT id FROM campaign_prospects WHERE campaign_id = $1 AND status = $2 ORDER BY id LIMIT $3",
            one,
            before,
            count,
        )
        for row in chosen:  # one after the other: their contacts have an order that is the same in every run
            if by_function:
                await session.execute("SELECT update_prospect_with_stat($1, $2)", row["id"], after)
            else:
                await session.execute("UPDATE campaign_prospects SET status = $2 WHERE id = $1", row["id"], after)
        self.model.stale.add(one)

    @sometimes(
        9,
        number=existing,
        move=st.sampled_from(MOVES),
        count=st.sampled_from((1, 1, 2, 3, 6)),
        by_function=st.booleans(),
        told=mostly,
    )
    def move(self, number: int, move: tuple[str, str], count: int, by_function: bool, told: bool) -> None:
        """The product moves prospects and, usually, says so."""
        if self._is_free(number):
            one = campaign_id(number)
            self._step(self._move(self.arena.writer, one, *move, count, by_function=by_function))
            if told:
                self._hint(one)

    @sometimes(1, number=existing, added=st.integers(0, 2), told=mostly)
    def import_or_remove(self, number: int, added: int, told: bool) -> None:
        """The product imports prospects, or removes one."""
        if self._is_free(number):
            one = campaign_id(number)
            self._step(self._import_or_remove(one, added))
            if told:
                self._hint(one)

    async def _import_or_remove(self, one: UUID, added: int) -> None:
        if not added:
            await self.arena.writer.execute(
                "DELETE FROM campaign_prospects"
                " WHERE id = (SELECT id FROM campaign_prospects WHERE campaign_id = $1 ORDER BY id LIMIT 1)",
                one,
            )
        for _ in range(added):
            await self.arena.writer.execute(
                "INSERT INTO campaign_prospects (id, campaign_id, user_id) VALUES ($1, $2, $3)",
                uuid5(one, f"import {self.model.tick()}"),
                one,
                OWNER,
            )
        self.model.stale.add(one)

    @sometimes(2, number=existing, move=st.sampled_from(MOVES), by_function=mostly, told=mostly)
    def hold(self, number: int, move: tuple[str, str], by_function: bool, told: bool) -> None:
        """The product begins a transaction and leaves it open."""
        if self.held is None and self._is_free(number):
            self._step(self._hold(campaign_id(number), move, by_function=by_function, told=told))

    async def _hold(self, one: UUID, move: tuple[str, str], *, by_function: bool, told: bool) -> None:
        was_stale = one in self.model.stale
        self.holding = self.arena.holder.transaction()
        await self.holding.start()
        await self._move(self.arena.holder, one, *move, 2, by_function=by_function)
        self.held = (one, told)
        if not was_stale:
            self.model.stale.discard(one)  # not before its commit

    @sometimes(1, commit=mostly)
    def release(self, commit: bool) -> None:
        """The product ends its transaction."""
        self._step(self._release(commit=commit))

    async def _release(self, *, commit: bool) -> None:
        if self.held is None:
            return
        (one, told), self.held = self.held, None
        await (self.holding.commit() if commit else self.holding.rollback())
        if commit:
            self.model.stale.add(one)
            if told:
                self._hint(one)

    @sometimes(
        2, number=existing, status=st.sampled_from(("active", "active", "active", "paused", "completed")), told=mostly
    )
    def set_status(self, number: int, status: str, told: bool) -> None:
        """A user resumes, pauses or completes a campaign."""
        if self._is_free(number):
            one = campaign_id(number)
            self._step(
                self.arena.writer.execute(
                    "UPDATE campaigns SET status = $2, pause_reason = NULL WHERE id = $1",
                    one,
                    status,
                )
            )
            self.model.stale.add(one)
            if told:
                self._hint(one)

    @sometimes(
        1, number=existing, stats=st.sampled_from(({}, {"sent": 7}, {"total": "many", "extra": 1}, {"bounced": -3}))
    )
    def edit_stats(self, number: int, stats: dict[str, object]) -> None:
        """Somebody edits the numbers by hand and tells nobody."""
        if self._is_free(number):
            self._step(
                self.arena.writer.execute("UPDATE campaigns SET stats = $2 WHERE id = $1", campaign_id(number), stats)
            )
            self.model.stale.add(campaign_id(number))

    @sometimes(1, number=st.just(2), really=st.sampled_from((True, False, False)))
    def delete(self, number: int, really: bool) -> None:
        """A campaign is deleted, its prospects with it."""
        if really and self._is_free(number):
            one = campaign_id(number)
            self._step(self.arena.writer.execute("DELETE FROM campaigns WHERE id = $1", one))
            self.model.alive.discard(one)

    @sometimes(1, number=existing)
    def clock_jumps_back(self, number: int) -> None:
        """What was stamped before now lies in the future."""
        one = campaign_id(number)
        if self._is_free(number):
            self._step(self._jump(one))

    async def _jump(self, one: UUID) -> None:
        await self.arena.writer.execute(
            "UPDATE campaigns SET last_synced_at = last_synced_at + interval '2 hours' WHERE id = $1", one
        )
        told = await self.arena.writer.fetchval(
            "UPDATE campaign_stats.campaign_state SET version = version + 7200000000"
            " WHERE campaign_id = $1 AND version > 0 RETURNING version",
            one,
        )
        if told is not None:
            self.model.versions[one] = told  # by the clock that was ahead
        self.jumped.add(one)

    @sometimes(1)
    def restore(self) -> None:
        """A failover lost what told the last versions; the operators reconcile everything, as they are told to."""
        self._step(self._restore())

    async def _restore(self) -> None:
        lost = [campaign_id(number) for number in range(CAMPAIGNS) if campaign_id(number) not in self.jumped]
        await self.arena.writer.execute(
            "UPDATE campaign_stats.campaign_state SET version = 0 WHERE campaign_id = ANY ($1::uuid[])", lost
        )
        for one in lost:  # one after the other, so that their rows have the same order in every run
            await self.arena.writer.execute(statement("reconcile"), [one], 0.0)

    # -- at rest

    @sometimes(1)
    def rest(self) -> None:
        """Writers end and everything is drained."""
        self._step(self._rest(swept=False))

    async def _rest(self, *, swept: bool) -> None:
        await self._release(commit=True)
        await self._rebalance((0, 1, 0))
        if swept:
            await self.arena.observer.execute("UPDATE campaign_stats.sweep SET after_id = NULL")
            await self._sweep(0)
        for _ in range(ROUNDS):
            if await self._round():
                break
        else:
            self.model.wrong("nothing disturbs it, but it does not come to rest")
        self.model.at_rest(await self.arena.campaigns(), await self.arena.statuses(), swept=swept)

    async def _round(self) -> bool:
        """Everything once more; whether nothing is left to do."""
        for replica in self.replicas:
            await self._flush(replica, 1_000)
        await self.arena.observer.execute(TIME_PASSES)
        for _ in range(100):
            if not await self._turn(self.replicas[0].deferred.turn()):
                break
        for replica in self.replicas:
            for _ in range(100):
                if not await self._turn(replica.relay.turn()):
                    break
        left = await self.arena.observer.fetchval(
            "SELECT (SELECT count(*) FROM campaign_stats.deferred)"
            " + (SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NULL)"
        )
        ends = {partition: len(records) for partition, records in self.log.records.items()}
        return not left and self.log.committed == ends


def machine_on(arena: Arena, **members: Any) -> type[Machine]:
    """The machine, bound to a database; `members` in place of its own."""
    return type("Machine", (Machine,), {"arena": arena, **members})


@contextmanager
def small_and_impatient() -> Iterator[None]:
    """Small chunks, no waiting between tries, nothing locked comes due by itself, and no log."""
    changed: list[tuple[Any, str, Any]] = [
        (pipeline_module, "CHUNK_CAMPAIGNS", CHUNK),
        (pipeline_module, "AHEAD_CAMPAIGNS", CHUNK),
        (pipeline_module, "AHEAD_EVERY_S", 3_600.0),
        (pipeline_module, "CHUNKS_AT_ONCE", 1),  # the probe holds one transaction; two: tests/unit/test_pipeline.py
        (health_module, "FIRST_BACKOFF_S", 0.0),
        (outcome_module, "LOCKED_FIRST_S", 3_600.0),
        (outcome_module, "LOCKED_LONGEST_S", 3_600.0),
    ]
    before = [getattr(module, name) for module, name, _ in changed]
    for module, name, value in changed:
        setattr(module, name, value)
    try:
        with capture_logs():
            yield
    finally:
        for (module, name, _), value in zip(changed, before, strict=True):
            setattr(module, name, value)


def play(arena: Arena, seed: int, examples: int, *, steps: int = 40, shrink: bool = False) -> int:
    """Play this many examples of a seed; how many were played to their end. Raises Violation."""
    played = 0

    def counted(self: Machine) -> None:
        nonlocal played
        Machine.teardown(self)
        played += 1

    machine = hypothesis.seed(seed)(machine_on(arena, teardown=counted))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            database=None,
            deadline=None,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        ),
    )
    return played
