"""From Kafka to the database: poll, decode, collect a generation; flush it; commit its offsets.

Fetching, flushing and committing run at once. While the database works on one generation the next one collects, so an
idle service answers at once and a backlog makes large batches; offsets follow what was flushed, never the other way.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Final, Protocol

import structlog

from consumer import recount, tracing
from consumer.changes import Changed, decode_changes
from consumer.envelope import (
    ChangeHint,
    Content,
    DeadLetter,
    Decoded,
    Ignored,
    Record,
    StatusHint,
    SyncRequest,
    placed,
)
from consumer.errors import OwnershipLost, ServiceError, Unavailable, described
from consumer.generation import CHUNK_CAMPAIGNS, Generation, Partition, Passed, Work
from consumer.health import Health
from consumer.metrics import RECORD_KINDS, Metrics
from consumer.outcome import Deferral, Outcome
from consumer.recount import Rules, recount_campaigns, tally

COLLECT_AT_MOST: Final = 100_000  # campaigns and requests: 110 MB with usual hints (measured)
BURY_AT_MOST: Final = 5_000  # dead letters: offsets move on within seconds, also where each is refused
FAR_BEHIND: Final = 10_000  # records not yet read: a backlog; a steady stream leaves a twentieth of a second of reading
CAUGHT_UP: Final = (
    500  # records not yet read, what one poll takes: its end, where each stream gets that we keep up with
)
AHEAD_CAMPAIGNS: Final = 250  # recounted before a backlog is read,
AHEAD_EVERY_S: Final = 0.5  # so often,
AHEAD_AT_MOST_S: Final = 10.0  # for so long; then all that was collected is flushed, so that offsets move
COMMIT_EVERY_S: Final = 0.1  # at most so often; after a kill the next owner repeats that much more
LAST_COMMIT_S: Final = 1.0  # for a commit while partitions are taken away; without it their next owner repeats a little
CHUNKS_AT_ONCE: Final = 2  # outside a backlog, where reading leaves the processor to them
HOLD_AT_MOST: Final = 64 * 1024 * 1024  # bytes of dead letters, held whole until they are written, and of requests' ids

log = structlog.get_logger(__name__)


class Batch(Protocol):
    """What one poll brought from one partition."""

    @property
    def partition(self) -> Partition: ...
    @property
    def records(self) -> Sequence[Content]: ...
    @property
    def next_offset(self) -> int: ...


class Source(Protocol):
    """Our membership in the consumer group. `behind`: records known to wait at the brokers, beyond what was polled."""

    @property
    def behind(self) -> int: ...
    async def poll(self) -> tuple[Sequence[Batch], Sequence[Passed]]: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    async def commit(self, offsets: Mapping[Partition, int]) -> None: ...


class Store(Protocol):
    """Where recounts happen."""

    def transaction(self) -> AbstractAsyncContextManager[recount.Transaction]: ...


class DeadLetters(Protocol):
    """Writes to the dead-letter topic; takes each off the list once it was acknowledged. Raises Unavailable."""

    async def records(self, letters: list[tuple[Record, DeadLetter]]) -> None: ...
    async def stubs(self, passed: list[Passed]) -> None: ...


class Wake(Protocol):
    """Tells another engine that there is something to do."""

    def __call__(self) -> None: ...


class Pipeline:
    """One per process. `fetch`, `flush_for_ever` and `commit_for_ever` are its tasks; revocation and shutdown call
    `let_go`.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        dead_letters: DeadLetters,
        rules: Rules,
        metrics: Metrics,
        health: Health,
        *,
        wake_relay: Wake,
        wake_deferred: Wake,
        cdc_topic: str | None = None,
        commit_every_s: float = COMMIT_EVERY_S,
    ) -> None:
        self._cdc_topic = cdc_topic
        self._source = source
        self._store = store
        self._dead_letters = dead_letters
        self._rules = rules
        self._metrics = metrics
        self._health = health
        self._wake_relay = wake_relay
        self._wake_deferred = wake_deferred
        self._commit_every_s = commit_every_s
        self._collecting = Generation()
        self._passed: list[Passed] = []
        self._full = False
        self._filled = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_backlog = False
        self._hurry = asyncio.Event()  # what is collected is flushed at once
        self._hurry.set()
        self._flushed: dict[Partition, int] = {}  # offsets that may be committed
        self._flushed_generations = 0  # whose offsets these are
        self._to_commit = asyncio.Event()
        self._committed = asyncio.Event()  # nothing is to be committed and no commit under way
        self._committed.set()
        self._committing: asyncio.Timeout | None = None  # around the commit under way
        self._leaving = asyncio.Event()
        self._epoch = 0
        self.is_ours = False  # between let_go and take_over nothing is collected and nothing flushed
        self.assigned: frozenset[Partition] = frozenset()

    async def fetch(self) -> None:
        """Poll for ever and collect what comes."""
        while True:
            batches, passed = await self._health.persist("fetch", self._source.poll)
            self._health.polled()
            if not self.is_ours:
                continue  # offsets stay, so whoever reads next reads them again
            self._passed.extend(passed)
            for batch in batches:
                self._collect(batch)
            generation = self._collecting
            if generation or self._passed:
                self._filled.set()
            if not self._full and (
                len(generation.hints) + generation.asked >= COLLECT_AT_MOST
                or generation.held_bytes >= HOLD_AT_MOST
                or len(generation.dead_letters) >= BURY_AT_MOST
            ):
                self._full = True
                self._source.pause()
            if self._source.behind >= FAR_BEHIND:
                self._in_backlog = True
            elif self._source.behind < CAUGHT_UP:
                self._in_backlog = False
            if self._in_backlog and not self._full and not generation.asked:
                self._hurry.clear()
            else:
                self._hurry.set()
            self._metrics.collecting.set(generation.records)
            self._metrics.fetch_paused.set(self._full)
            if self._full:
                await asyncio.sleep(0)  # polling goes on, so that the group keeps us

    def _collect(self, batch: Batch) -> None:
        generation = self._collecting
        kinds = dict.fromkeys(RECORD_KINDS, 0)
        others: Iterable[tuple[Content, Decoded | Changed]]
        if batch.partition[0] == self._cdc_topic:
            others = zip(batch.records, decode_changes(batch.records), strict=True)
        else:
            kinds["status_hint"], others = generation.hints.collect(batch.records)
        for record, event in others:
            match event:
                case StatusHint():  # is among the hints already
                    kinds["newer_version" if event.newer else "status_hint"] += 1
                case ChangeHint():
                    for campaign_id in event.campaign_ids:
                        generation.hints.add(campaign_id)
                    kinds["change"] += 1
                case SyncRequest():
                    generation.add_request(event)
                    kinds["sync_request"] += 1
                case DeadLetter():
                    generation.add_dead_letter(placed(*batch.partition, record), event)
                    kinds["dead_letter"] += 1
                case Ignored():
                    kinds["tombstone"] += 1
        if batch.records:
            generation.written_at(batch.records[0].timestamp / 1000)
        generation.read_up_to(batch.partition, batch.next_offset, len(batch.records))
        for kind, count in kinds.items():
            if count:
                self._metrics.records.labels(kind).inc(count)

    async def flush_for_ever(self) -> None:
        """Take what was collected, make it true, release its offsets; strictly one generation after the other."""
        while True:
            await self._filled.wait()
            self._idle.clear()
            begun, records = time.monotonic(), 0
            try:
                await self._recount_ahead()
                self._filled.clear()
                generation, self._collecting = self._collecting, Generation()
                passed, self._passed = self._passed, []
                if self._full:
                    self._full = False
                    self._source.resume()
                if self.is_ours and (generation or passed):
                    records = generation.records
                    await self._flush(generation, passed, self._epoch, begun)
            except OwnershipLost as lost:
                self._metrics.commits_refused.inc()
                log.info("generation dropped, its new owner repeats it", why=str(lost), records=records)
            finally:
                self._idle.set()

    async def _flush(self, generation: Generation, passed: Sequence[Passed], epoch: int, begun: float) -> None:
        """Make everything in `generation` true in the database, then release its offsets. Its turn has `begun` then."""
        if generation.dead_letters or passed:
            letters, stubs = list(generation.dead_letters), list(passed)
            await self._health.persist("dead letters", lambda: self._bury(letters, stubs, epoch))
            self._count_dead_letters(generation, passed)
        await self._recount(generation.works(), epoch)
        campaigns = generation.campaigns + generation.ahead
        if generation.oldest is not None and campaigns:
            self._metrics.freshness.observe(max(0.0, time.time() - generation.oldest))
        self._release(generation, epoch)
        seconds = time.monotonic() - begun
        self._metrics.generation_records.observe(generation.records)
        self._metrics.generation_campaigns.observe(campaigns)
        self._metrics.generation_seconds.observe(seconds)
        if not generation.records and not passed:
            return  # only a position that moved without records
        log.info(
            "generation flushed",
            records=generation.records,
            campaigns=campaigns,
            dead_letters=len(generation.dead_letters),
            seconds=round(seconds, 4),
        )

    async def _recount_ahead(self) -> None:
        """While a backlog is read the generation goes on filling: what comes again is one recount less, and reading has
        the processor for itself (measured: tests/benchmarks/performance.md, "Hot path").

        Meanwhile a few campaigns at a time are recounted already, those that have waited longest; so their offsets wait
        for the rest. A request, a full generation and the end of the backlog end that.
        """
        until = time.monotonic() + AHEAD_AT_MOST_S
        while not self._hurry.is_set() and time.monotonic() < until:
            await self._recount(self._collecting.take_first(AHEAD_CAMPAIGNS), self._epoch)
            with suppress(TimeoutError):
                async with asyncio.timeout(AHEAD_EVERY_S):
                    await self._hurry.wait()

    async def _recount(self, works: Iterable[Work], epoch: int) -> None:
        """Chunk after chunk, two at a time where no backlog is being read. Waits for all, also when one fails; then no
        more begins, and a bug is raised before all else.
        """
        waiting, running, failures = deque(works), set[asyncio.Task[Outcome]](), list[BaseException]()
        try:
            while running or (waiting and not failures):
                at_once = 1 if self._in_backlog and not self._full else CHUNKS_AT_ONCE
                while waiting and not failures and len(running) < at_once:
                    chunk = [waiting.popleft() for _ in range(min(CHUNK_CAMPAIGNS, len(waiting)))]
                    operation = self._health.persist("pipeline", partial(self._chunk, chunk, epoch))
                    running.add(asyncio.create_task(operation, name="flush"))
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (failure := task.exception()) is not None:
                        failures.append(failure)
                    else:
                        waiting.extendleft(reversed(task.result().later))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if failures:
            raise min(failures, key=lambda failure: isinstance(failure, ServiceError))

    async def _chunk(self, works: Sequence[Work], epoch: int) -> Outcome:
        self._still_ours(epoch)
        begun = time.monotonic()
        try:
            with tracing.recounting(works) as traced:
                async with self._store.transaction() as db:
                    outcome = await recount_campaigns(db, traced, "chunk", self._rules)
        except ServiceError:
            raise
        except Exception as error:
            # One of these campaigns cannot be recounted; one per transaction, the others succeed at once.
            log.error("chunk failed, its campaigns are deferred one by one", campaigns=len(works), **described(error))
            self._metrics.chunks_failed.inc()
            outcome = Outcome(deferrals=[Deferral(work, "alone", 0.0) for work in works])
            async with self._store.transaction() as db:
                await db.save(outcome)
        tally(self._metrics, outcome, "chunk", time.monotonic() - begun)
        self._health.progressed()
        self._wake_relay()
        if outcome.deferrals:
            self._wake_deferred()
        return outcome

    async def _bury(self, letters: list[tuple[Record, DeadLetter]], stubs: list[Passed], epoch: int) -> None:
        self._still_ours(epoch)
        await self._dead_letters.stubs(stubs)
        await self._dead_letters.records(letters)

    def _count_dead_letters(self, generation: Generation, passed: Sequence[Passed]) -> None:
        for _, letter in generation.dead_letters:
            self._metrics.dead_letters.labels(letter.reason).inc()
        for stub in passed:
            self._metrics.dead_letters.labels("too_large" if stub.too_large else "unreadable").inc()

    def _release(self, generation: Generation, epoch: int) -> None:
        """Everything up to its offsets is true: they may be committed, also while the partitions are taken away."""
        self._same_assignment(epoch)
        self._flushed.update(generation.offsets)
        self._flushed_generations += 1
        self._committed.clear()
        self._to_commit.set()

    async def commit_for_ever(self) -> None:
        """Commit what was released, beside the next flush: at once, but at most every `commit_every_s`, because each
        commit is a write of the broker's (measured: tests/benchmarks/performance.md, "Results").
        """
        while True:
            await self._to_commit.wait()
            self._to_commit.clear()
            offsets, self._flushed = self._flushed, {}
            generations, self._flushed_generations = self._flushed_generations, 0
            try:
                if offsets:
                    async with asyncio.timeout(None) as self._committing:
                        await self._health.persist("commit", partial(self._commit, offsets, self._epoch))
                    self._health.progressed()
                    self._metrics.generations.inc(generations)
            except (OwnershipLost, Unavailable, TimeoutError) as lost:  # the latter two: stopping, or called off
                self._health.recovered("commit")
                self._metrics.commits_refused.inc(generations)
                why = str(lost) or "called off"
                log.info("offsets dropped, their new owner repeats what was flushed", why=why)
            finally:
                self._committing = None
                if not self._to_commit.is_set():
                    self._committed.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._commit_every_s):
                    await self._leaving.wait()

    async def _commit(self, offsets: Mapping[Partition, int], epoch: int) -> None:
        """While the partitions are being taken away no failure is worth another try."""
        self._same_assignment(epoch)
        try:
            await self._source.commit(offsets)
        except Unavailable as error:
            if self.is_ours:
                raise
            raise OwnershipLost(f"not committed before the partitions were taken away: {error}") from error

    def _still_ours(self, epoch: int) -> None:
        if not self.is_ours:
            raise OwnershipLost("the partitions were taken away")
        self._same_assignment(epoch)

    def _same_assignment(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise OwnershipLost("that assignment is over")

    async def let_go(self) -> None:
        """Partitions are taken away or the process stops: drop what was not begun, finish the running chunk, and commit
        what was flushed as a whole.

        Waits for the chunk without a limit of its own; the caller has one deadline for everything.
        """
        epoch, self.is_ours = self._epoch, False
        self._collecting = Generation()
        self._passed = []
        self._full = False
        self._hurry.set()
        self.assigned = frozenset()
        self._leaving.set()
        try:
            await self._idle.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_COMMIT_S):
                    await self._committed.wait()
        finally:  # also when the caller's deadline has passed
            if epoch == self._epoch:
                self._forget()

    def _forget(self) -> None:
        """From here on nothing of this assignment is committed, not even what is on its way: the client would repeat
        the request as a member of the next assignment.
        """
        self._epoch += 1
        self._flushed, self._flushed_generations = {}, 0
        committing, self._committing = self._committing, None
        if committing is not None:
            committing.reschedule(0)

    @property
    def epoch(self) -> int:
        """Rises whenever partitions are taken away or given out."""
        return self._epoch

    def take_over(self, partitions: Sequence[Partition]) -> None:
        """These partitions are ours now, and nothing of the time before is left."""
        self._forget()
        self.is_ours = True
        self._in_backlog = False
        self._leaving.clear()
        self._collecting = Generation()
        self._passed = []
        self._full = False
        self.assigned = frozenset(partitions)
        self._metrics.assigned_partitions.set(len(partitions))
        self._metrics.rebalances.inc()
        self._health.joined = True
        self._health.polled()
