"""Every metric: what it says, its unit, its labels, when to look at it. deploy/metrics.md is written from this.

Base units, prefix campaign_stats_, bounded labels, every series there at start. Engines count after a fact is durable:
a recount after its transaction, an event after its acknowledgement.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from schemas.events import DeadLetterReason
from schemas.topics import WRITTEN

DEPENDENCIES: Final = ("database", "kafka", "relay")
RECORD_KINDS: Final = ("status_hint", "sync_request", "newer_version", "change", "tombstone", "dead_letter")
DEFERRED_REASONS: Final = ("locked", "huge", "alone", "failing", "guard", "sweep")
FACTS: Final = ("news", "answer", "pause")
CALLERS: Final = ("chunk", "worker", "door")
MODES: Final = ("enforce", "observe", "off")
VERDICTS: Final = ("off", "not_email", "not_active", "too_few_sent", "below_rate", "trip")

API_STATUSES: Final = ("200", "400", "401", "404", "405", "408", "413", "429", "500", "503")

FAST_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
FRESH_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SIZES: Final = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A metric as the catalogue tells of it. `name`: without what its kind appends. `look`: look at this when ...

    `labels`: name -> its values, None where they are the partitions that this process reads. `buckets`: upper edges.
    """

    name: str
    kind: Kind
    meaning: str
    unit: str
    look: str
    labels: Mapping[str, Sequence[str] | None]
    buckets: Sequence[float] = ()


class Metrics:
    """All series of one process in one registry. `catalogue`: the same, told."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.catalogue: list[Entry] = []

        self.records = self._counter(
            "records",
            "Records read from Kafka, by what they turned out to be; counted once collected.",
            "records",
            "nothing seems to arrive, or you wonder who sends what",
            kind=RECORD_KINDS,
        )
        self.dead_letters = self._counter(
            "dead_letters",
            "Records sent to the dead-letter topic and acknowledged there, by reason.",
            "records",
            "an upstream was deployed: a new reason, or one that rises, is its bug",
            reason=[str(reason) for reason in DeadLetterReason],
        )
        self.generations = self._counter(
            "generations",
            "Generations whose offsets were committed.",
            "generations",
            "lag does not fall: if this stands still too, nothing gets done",
        )
        self.generation_records = self._histogram(
            "generation_records",
            "Records in a flushed generation: 1 when idle, large under backlog.",
            "records",
            "you want to know how much is coalesced",
            SIZES,
        )
        self.generation_campaigns = self._histogram(
            "generation_campaigns",
            "Campaigns recounted for a flushed generation; in a backlog also those recounted while it was read.",
            "campaigns",
            "recounts cost more than expected: many different campaigns, or the same ones again",
            SIZES,
        )
        self.generation_seconds = self._histogram(
            "generation_seconds",
            "From a generation's turn until its offsets may be committed; a backlog is read first, up to ten seconds.",
            "seconds",
            "delay rises: is it the flush, or does it wait in the outbox",
            FAST_S,
        )
        self.commits_refused = self._counter(
            "commits_refused",
            "Generations dropped or commits refused because partitions were taken away; normal in a rebalance.",
            "generations",
            "it rises without a deployment: the group keeps rebalancing",
        )
        self.collecting = self._gauge(
            "collecting_records",
            "Records collected and not yet handed to a flush.",
            "records",
            "fetching is paused",
        )
        self.fetch_paused = self._gauge(
            "fetch_paused",
            "1 while fetching is paused because the flush is behind.",
            "0 or 1",
            "it stays 1: the database does not keep up, or is away",
        )

        self.recounts = self._counter(
            "recounts", "Campaigns recounted, by who asked.", "campaigns", "the database is busy", caller=CALLERS
        )
        self.recount_seconds = self._histogram(
            "recount_seconds",
            "One recount transaction (up to 1 000 campaigns), begin to commit.",
            "seconds",
            "generations take long: locks, a missing index, a plan gone wrong",
            FAST_S,
            caller=CALLERS,
        )
        self.campaigns_missing = self._counter(
            "campaigns_missing",
            "Hints and requests for campaigns that do not exist.",
            "campaigns",
            "somebody misses an answer: hints may be sent before the campaign's own commit",
        )
        self.chunks_failed = self._counter(
            "chunks_failed",
            "Chunks that failed for a reason of their own and were deferred campaign by campaign.",
            "chunks",
            "it rises at all: the log line `chunk failed` says why",
        )
        self.drift_found = self._counter(
            "drift_found",
            "Campaigns whose stored numbers the sweep found wrong and the recount after the grace still did.",
            "campaigns",
            "it rises: somebody writes prospects and sends no hints, or writes stats",
        )

        self.guard_decisions = self._counter(
            "guard_decisions",
            "Windows the bounce guard judged, by mode and verdict.",
            "judgements",
            "a limit or the mode was changed",
            mode=MODES,
            verdict=VERDICTS,
        )
        self.pauses = self._counter(
            "pauses",
            "Campaigns paused by the bounce guard.",
            "campaigns",
            "customers ask why they were stopped; `campaign-stats why ID` has the numbers",
        )

        self.api_calls = self._counter(
            "api_calls",
            "Answers of the sync-stats door, by HTTP status.",
            "answers",
            "a caller complains: 401 and 429 are the caller's, 500 is ours, 503 a dependency",
            status=API_STATUSES,
        )
        self.api_seconds = self._histogram(
            "api_call_seconds",
            "From a complete request at the sync-stats door to its answer.",
            "seconds",
            "calls are slow: locked campaigns are waited for, 5 s at most",
            FAST_S,
        )

        self.deferred = self._counter(
            "deferred", "Work put off, by reason.", "rows", "deferred rows do not go away", reason=DEFERRED_REASONS
        )
        self.deferred_rows = self._gauge(
            "deferred_rows",
            "Rows waiting in the deferred table.",
            "rows",
            "some campaigns are late; `campaign-stats deferred list` names them",
            reason=DEFERRED_REASONS,
        )
        self.deferred_age = self._gauge(
            "deferred_oldest_seconds",
            "Age of the oldest deferred row; 0 when there is none.",
            "seconds",
            "it only rises: one campaign stays locked or keeps failing",
        )
        self.failing_campaigns = self._gauge(
            "failing_campaigns",
            "Campaigns whose own recount keeps failing.",
            "campaigns",
            "it is not 0: these are wrong until somebody looks",
        )

        self.published = self._counter(
            "published",
            "Events acknowledged by Kafka, by type.",
            "events",
            "a subscriber says that it gets nothing",
            type=sorted(WRITTEN),
        )
        self.publish_failures = self._counter(
            "publish_failures",
            "Relay turns in which Kafka did not acknowledge every event; they are sent again.",
            "turns",
            "the outbox grows: brokers away, a topic missing, a right taken",
        )
        self.set_aside = self._counter(
            "set_aside",
            "Events that can never be sent and were set aside.",
            "events",
            "it rises at all; `campaign-stats outbox list --set-aside` says why",
        )
        self.relay_seconds = self._histogram(
            "relay_turn_seconds",
            "One relay turn (up to 2 000 events): read, send, acknowledge, delete.",
            "seconds",
            "events are late although generations are quick",
            FAST_S,
        )
        self.outbox_rows = self._gauge(
            "outbox_rows", "Events waiting to be published.", "events", "Kafka or a topic is away"
        )
        self.outbox_set_aside = self._gauge(
            "outbox_set_aside_rows",
            "Events set aside; see `outbox list`.",
            "events",
            "it is not 0: subscribers miss these",
        )
        self.outbox_age = self._gauge(
            "outbox_oldest_seconds",
            "Age of the oldest event waiting; 0 when there is none.",
            "seconds",
            "subscribers are late",
        )
        self.freshness = self._histogram(
            "freshness_seconds",
            "From a hint's append to Kafka (broker or producer time) to the commit of the recount it led to; the oldest"
            " of a generation.",
            "seconds",
            "stored numbers lag behind; with a producer's clock that is wrong it is wrong",
            FRESH_S,
        )
        self.delay = self._histogram(
            "event_delay_seconds",
            "From the append of the oldest hint or request behind an event to Kafka's acknowledgement of the event:"
            " news of stats, the answer to a request, a pause.",
            "seconds",
            "an objective is missed: which of the three is late",
            FRESH_S,
            fact=FACTS,
        )

        self.sweep_pages = self._counter(
            "sweep_pages",
            "Pages of campaigns compared by the sweep.",
            "pages",
            "drift stays: does the sweep run at all",
        )
        self.sweep_campaigns = self._counter(
            "sweep_campaigns", "Campaigns compared by the sweep.", "campaigns", "how much of everything drifts"
        )
        self.sweep_interval = self._gauge(
            "sweep_interval_seconds",
            "How often the sweep compares all campaigns, as set; 0 when it is off.",
            "seconds",
            "the sweep seems to stand still: it may be meant to",
        )
        self.sweep_laps = self._counter(
            "sweep_laps",
            "Complete laps of the sweep over all campaigns.",
            "laps",
            "drift is healed late: a lap takes longer than its interval",
        )
        self.sweep_seconds = self._histogram(
            "sweep_page_seconds",
            "Comparing one page of the sweep.",
            "seconds",
            "the database is busy and nothing else explains it",
            FAST_S,
        )
        self.sweep_deferred = self._counter(
            "sweep_deferred",
            "Campaigns the sweep deferred for a recount.",
            "campaigns",
            "hints get lost: this many campaigns were found late",
        )

        self.lag = Gauge(
            "campaign_stats_lag_records",
            "Records not yet committed, per assigned partition; absent for partitions of other replicas.",
            ["topic", "partition"],
            registry=registry,
        )
        self.catalogue.append(
            Entry(
                "campaign_stats_lag_records",
                "gauge",
                "Records not yet committed, per assigned partition; absent for partitions of other replicas.",
                "records",
                "news are late: is it one partition or all, does it fall",
                {"topic": None, "partition": None},
            )
        )
        self.assigned_partitions = self._gauge(
            "assigned_partitions",
            "Partitions this process reads.",
            "partitions",
            "a replica does nothing: more replicas than partitions",
        )
        self.rebalances = self._counter(
            "rebalances",
            "Times all partitions were taken away and assigned anew.",
            "times",
            "it rises without a deployment: replicas die or are too slow to answer",
        )
        self.degraded = self._gauge(
            "degraded",
            "1 while an engine waits for this dependency.",
            "0 or 1",
            "anything else looks wrong: look here first",
            dependency=DEPENDENCIES,
        )
        self.ready = self._gauge("ready", "1 when /readyz answers 200.", "0 or 1", "a replica gets no traffic")
        self.poll_age = self._gauge(
            "poll_age_seconds",
            "Since the last poll of Kafka came back.",
            "seconds",
            "it passes 10: the watchdog ends the process at 60",
        )

    def _counter(self, name: str, meaning: str, unit: str, look: str, **labels: Sequence[str]) -> Counter:
        metric = Counter(
            self._noted("counter", name, meaning, unit, look, labels), meaning, list(labels), registry=self.registry
        )
        self._fill(metric, labels)
        return metric

    def _gauge(self, name: str, meaning: str, unit: str, look: str, **labels: Sequence[str]) -> Gauge:
        metric = Gauge(
            self._noted("gauge", name, meaning, unit, look, labels), meaning, list(labels), registry=self.registry
        )
        self._fill(metric, labels)
        return metric

    def _histogram(
        self, name: str, meaning: str, unit: str, look: str, buckets: Sequence[float], **labels: Sequence[str]
    ) -> Histogram:
        metric = Histogram(
            self._noted("histogram", name, meaning, unit, look, labels, buckets),
            meaning,
            list(labels),
            buckets=tuple(buckets),
            registry=self.registry,
        )
        self._fill(metric, labels)
        return metric

    def _noted(
        self,
        kind: Kind,
        name: str,
        meaning: str,
        unit: str,
        look: str,
        labels: Mapping[str, Sequence[str]],
        buckets: Sequence[float] = (),
    ) -> str:
        entry = Entry(f"campaign_stats_{name}", kind, meaning, unit, look, dict(labels), tuple(buckets))
        self.catalogue.append(entry)
        return entry.name

    @staticmethod
    def _fill(metric: Counter | Gauge | Histogram, labels: Mapping[str, Iterable[str]]) -> None:
        combinations: list[tuple[str, ...]] = [()]
        for values in labels.values():
            combinations = [(*combination, value) for combination in combinations for value in values]
        if labels:
            for combination in combinations:
                metric.labels(*combination)
