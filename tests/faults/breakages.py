"""The mistakes that the state machine must find, each with a seed whose histories find it.

After a change of the machine or of hypothesis a seed may find nothing any more: `python -m tests.faults.seeds NAME`
looks for another.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from tests.faults.arena import Arena
from tests.faults.edits import Edit, broken, is_in_this_process

RECALCULATE: Final = "campaign_stats.recalculate_campaign_stats(uuid[], text)"


@dataclass(frozen=True, slots=True)
class Breakage:
    """One mistake somebody could make. `seed`: of histories that find it. `finding`: what they find, as a pattern."""

    name: str
    sentence: str
    seed: int
    finding: str
    edits: tuple[Edit, ...]

    @contextmanager
    def applied(self, arena: Arena) -> Iterator[None]:
        """The service is broken inside, and whole again afterwards."""
        inside = [edit for edit in self.edits if is_in_this_process(edit)]
        with ExitStack() as undo:
            undo.enter_context(broken(inside))
            for edit in self.edits:
                if edit not in inside:
                    undo.enter_context(_database_function(edit, arena))
            yield


@contextmanager
def _database_function(edit: Edit, arena: Arena) -> Iterator[None]:
    whole = arena.run(arena.observer.fetchval("SELECT pg_get_functiondef($1::text::regprocedure)", edit.place))
    arena.run(arena.observer.execute(edit.of(whole)))
    try:
        yield
    finally:
        arena.run(arena.observer.execute(whole))


BREAKAGES: Final = (
    Breakage(
        "offset_before_transaction",
        "A generation's offsets are committed before its chunks.",
        1,
        "neither recounted nor deferred",
        (
            Edit(
                "consumer.pipeline:Pipeline._flush",
                "    await self._recount(generation.works(), epoch)\n",
                "    self._release(generation, epoch)\n    await self._recount(generation.works(), epoch)\n",
            ),
        ),
    ),
    Breakage(
        "offset_although_ownership_lost",
        "After a revocation the chunks not begun are dropped, but the offsets are committed all the same.",
        2,
        "the offset passes|offsets go back",
        (
            Edit(
                "consumer.pipeline:Pipeline._chunk",
                "self._still_ours(epoch)",
                "if not self.is_ours or epoch != self._epoch: return Outcome()",
            ),
            Edit("consumer.pipeline:Pipeline._release", "self._same_assignment(epoch)", "pass"),
        ),
    ),
    Breakage(
        "ahead_of_the_backlog_forgotten",
        "What is to be recounted while a backlog is read is taken off the list, but not recounted.",
        1,
        "neither recounted nor deferred",
        (
            Edit(
                "consumer.pipeline:Pipeline._recount_ahead",
                "await self._recount(self._collecting.take_first(AHEAD_CAMPAIGNS), self._epoch)",
                "self._collecting.take_first(AHEAD_CAMPAIGNS)",
            ),
        ),
    ),
    Breakage(
        "stale_epoch_goes_on",
        "A flush of an assignment that is over goes on and commits.",
        2,
        "offsets go back",
        (
            Edit("consumer.pipeline:Pipeline._still_ours", "if not self.is_ours:", "if False:"),
            Edit("consumer.pipeline:Pipeline._same_assignment", "if epoch != self._epoch:", "if False:"),
        ),
    ),
    Breakage(
        "offsets_of_an_older_assignment",
        "Offsets that could not be committed are committed after their partitions were given out anew.",
        4,
        "offsets go back",
        (
            Edit("consumer.pipeline:Pipeline._commit", "self._same_assignment(epoch)", "pass"),
            Edit("consumer.pipeline:Pipeline._commit", "if self.is_ours:", "if True:"),
            Edit("consumer.pipeline:Pipeline._forget", "committing.reschedule(0)", "pass"),
        ),
    ),
    Breakage(
        "revocation_keeps_the_collected",
        "What was collected before a revocation is flushed after it.",
        2,
        "offsets go back",
        (
            Edit("consumer.pipeline:Pipeline.let_go", "self._collecting = Generation()", "pass"),
            Edit("consumer.pipeline:Pipeline.take_over", "self._collecting = Generation()", "pass"),
        ),
    ),
    Breakage(
        "dead_letter_dropped",
        "A dead letter that was not acknowledged is forgotten.",
        2,
        "whose dead letter was not acknowledged",
        (
            Edit(
                "consumer.deadletters:DeadLetters.records",
                'raise Unavailable("kafka", f"{failed} while writing dead letters")',
                "letters.clear()",
            ),
        ),
    ),
    Breakage(
        "dead_letter_after_offset",
        "Dead letters are written after their offsets were committed.",
        1,
        "whose dead letter was not acknowledged",
        (
            Edit(
                "consumer.pipeline:Pipeline._flush",
                'await self._health.persist("dead letters", lambda: self._bury(letters, stubs, epoch))',
                "pass",
            ),
            Edit(
                "consumer.pipeline:Pipeline._flush",
                "self._release(generation, epoch)",
                "self._release(generation, epoch)\n    await self._committed.wait()\n"
                "    await self._bury(list(generation.dead_letters), list(passed), epoch)",
            ),
        ),
    ),
    Breakage(
        "outbox_by_memory",
        "The relay remembers the highest id it sent instead of looking at what is there.",
        1,
        "in another order|does not come to rest",
        (
            Edit(
                "consumer.relay:Relay._pass",
                "        if rows:\n",
                "        rows = [row for row in rows if row.id > getattr(self, 'last', 0)]\n"
                "        self.last = max((row.id for row in rows), default=getattr(self, 'last', 0))\n"
                "        if rows:\n",
            ),
        ),
    ),
    Breakage(
        "delete_before_acknowledgement",
        "The relay deletes what it read and then sends it.",
        1,
        "never acknowledged",
        (
            Edit(
                "consumer.relay:Relay._pass",
                "            if published or refused:\n                await db.finish_outbox(published, refused)\n",
                "            await db.finish_outbox([row.id for row in rows], {})\n",
            ),
        ),
    ),
    Breakage(
        "younger_deleted_before_elder",
        "An acknowledged row is deleted although its elder failed.",
        3,
        "in another order",
        (Edit("consumer.relay:Relay._pass", "if (row.campaign_id, row.type) in stuck:", "if False:"),),
    ),
    Breakage(
        "set_aside_at_any_failure",
        "A row that failed for now is set aside as if it were refused for ever.",
        1,
        "set aside, but was not refused",
        (Edit("consumer.relay:Relay._pass", "elif sent.refused:", "elif not sent.closed:"),),
    ),
    Breakage(
        "closed_type_never_tried_again",
        "A type whose topic was missing once is held back for ever.",
        9,
        "does not come to rest",
        (Edit("consumer.relay:Relay.turn", "if hold.due <= time.monotonic()", "if False"),),
    ),
    Breakage(
        "no_shard_lock",
        "Two relays read the same shard at once.",
        24,
        "in another order",
        (Edit("relay_lock.sql", "FOR UPDATE OF s SKIP LOCKED", ""),),
    ),
    Breakage(
        "new_id_at_each_publish",
        "The event id is made when it is published.",
        1,
        "not in the outbox as it stands|never acknowledged",
        (
            Edit(
                "consumer.relay:Relay._send",
                "(row.type, row.campaign_id, row.event)",
                '(row.type, row.campaign_id, __import__(\'re\').sub(rb\'"id":"[^"]*"\','
                " b'\"id\":\"%s\"' % str(__import__('uuid').uuid4()).encode(), row.event, count=1))",
            ),
        ),
    ),
    Breakage(
        "one_statement_recount",
        "The recount locks and counts in one statement, whose snapshot is older than the lock.",
        1,
        "under the lock, but the rows say",
        (Edit(RECALCULATE, "FOR NO KEY UPDATE OF c SKIP LOCKED", ""),),
    ),
    Breakage(
        "locked_hint_lost",
        "A campaign that somebody has locked is skipped and not deferred.",
        1,
        "neither recounted nor deferred",
        (
            Edit(
                "consumer.outcome:put_off_locked",
                'outcome.deferrals.append(Deferral(work, "locked", delay_s, tries))',
                "pass",
            ),
        ),
    ),
    Breakage(
        "deferred_deleted_by_campaign",
        "What was deferred meanwhile is deleted together with what was taken.",
        4,
        "a deferred row is gone",
        (
            Edit(
                "consumer.database.transaction:Transaction.take_deferred",
                'self._connection.fetch(statement("take_deferred"))',
                """self._connection.fetch(
        statement("take_deferred").replace("DELETE", "SELECT *").replace("RETURNING", "--"))""",
            ),
            Edit(
                "consumer.recount:recount_campaigns",
                "await db.save(outcome)",
                """if caller == "worker":
        await db._connection.execute(
            "DELETE FROM campaign_stats.deferred WHERE campaign_id = ANY ($1)", [work.campaign_id for work in works])
    await db.save(outcome)""",
            ),
        ),
    ),
    Breakage(
        "failed_recount_not_put_back",
        "Rows whose recount failed are not written back.",
        1,
        "a deferred row is gone",
        (
            Edit(
                "consumer.deferred:DeferredWorker._failed",
                "await db.save(outcome)",
                "outcome.deferrals.clear()\n    await db.save(outcome)",
            ),
        ),
    ),
    Breakage(
        "merged_drops_requests",
        "Of rows that are taken together only the last one's requests are kept.",
        5,
        "never answered|request that was not answered",
        (
            Edit(
                "consumer.deferred:merged",
                "for row in rows for request in row.requests",
                "for request in rows[-1].requests",
            ),
        ),
    ),
    Breakage(
        "request_for_missing_campaign_dropped",
        "A request for a campaign that does not exist is not answered.",
        1,
        "neither answered nor deferred|was not answered",
        (Edit("consumer.outcome:decide", "for request in work.requests:", "for request in ():"),),
    ),
    Breakage(
        "version_from_a_counter",
        "The version is the previous one plus one, and so comes again after a restore.",
        1,
        "one id for two different|comes after",
        (Edit("consumer.outcome:next_version", "max(previous + 1, _microseconds(now))", "previous + 1"),),
    ),
    Breakage(
        "version_from_the_clock_alone",
        "The version is the clock, and so falls when the clock jumps back.",
        2,
        "of a new recount comes after",
        (Edit("consumer.outcome:next_version", "max(previous + 1, _microseconds(now))", "_microseconds(now)"),),
    ),
    Breakage(
        "synced_at_from_the_clock_alone",
        "last_synced_at is the clock, and so falls when the clock jumps back.",
        2,
        "last_synced_at goes back",
        (Edit(RECALCULATE, "greatest(c.last_synced_at, stamp)", "stamp"),),
    ),
    Breakage(
        "news_compared_with_stored_only",
        "Numbers that the product stored rightly itself are never published.",
        1,
        "last, but the row",
        (
            Edit(
                "consumer.outcome:_recounted",
                "or recount.published_counts != recount.counts\n",
                "or recount.drift\n",
            ),
        ),
    ),
    Breakage(
        "pause_without_stats_updated",
        "A pause is told without the numbers of its version.",
        1,
        "a pause without stats_updated",
        (Edit("consumer.outcome:_recounted", "        if news:\n", "        if news and paused_at is None:\n"),),
    ),
    Breakage(
        "float_guard",
        "The guard computes a rate in floating point.",
        2,
        "that trips, without a pause",
        (
            Edit(
                "consumer.guard:judge",
                "window.bounced * BASIS_POINTS < limits.threshold_bp * window.sent",
                "1 - (window.sent - window.bounced) / window.sent < limits.threshold_bp / BASIS_POINTS",
            ),
        ),
    ),
    Breakage(
        "guard_above_instead_of_at",
        "The guard trips above the threshold, not at it.",
        2,
        "that trips, without a pause",
        (
            Edit(
                "consumer.guard:judge",
                "window.bounced * BASIS_POINTS < limits.threshold_bp",
                "window.bounced * BASIS_POINTS <= limits.threshold_bp",
            ),
        ),
    ),
    Breakage(
        "guard_of_exclusive_counts",
        "The window holds only prospects whose status still is sent or bounced.",
        1,
        "does not justify|without a pause",
        (
            Edit(
                "guard_windows.sql",
                """candidate.opened_at IS NULL AND p.campaign_id = candidate.id
          AND (p.status IN ('sent', 'replied', 'bounced', 'completed', 'timed_out')""",
                """candidate.opened_at IS NULL AND p.campaign_id = candidate.id
          AND (p.status IN ('sent', 'bounced')""",
            ),
        ),
    ),
    Breakage(
        "guard_forgets_its_pause",
        "The window after a resume still holds what led to the pause.",
        1,
        "does not justify",
        (
            Edit(
                "consumer.recount:_judge",
                "(campaign_id, resolved.limits.window, recount.guard_paused_at)",
                "(campaign_id, resolved.limits.window, None)",
            ),
        ),
    ),
    Breakage(
        "filter_counts_everybody",
        "The filter before the guard takes everybody for contacted, also those still pending.",
        2,
        "that trips, without a pause",
        (
            Edit(
                "consumer.guard:is_candidate",
                "    fewest = limits.min_sent\n",
                "    contacted = sum(counts.values())\n    fewest = limits.min_sent\n",
            ),
        ),
    ),
    Breakage(
        "pause_whatever_the_status",
        "The guard pauses campaigns that are not active.",
        1,
        "does not justify",
        (
            Edit("consumer.guard:applies", 'if status != "active":', "if False:"),
            Edit("pause.sql", "AND c.status = 'active'", ""),
        ),
    ),
)
