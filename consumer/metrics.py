"""Every metric, with help text and labels. Base units, prefix campaign_stats_, bounded labels, all there at start.

Engines count after the fact is durable: a recount after its transaction, an event after its acknowledgement.
"""

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from schemas.events import DeadLetterReason

DEPENDENCIES: Final = ("database", "kafka", "relay")
RECORD_KINDS: Final = ("status_hint", "sync_request", "newer_version", "change", "tombstone", "dead_letter")
DEFERRED_REASONS: Final = ("locked", "huge", "alone", "failing", "guard", "sweep")
EVENT_TYPES: Final = ("campaign.stats_updated.v1", "campaign.paused.v1", "campaign.sync_rejected.v1")
CALLERS: Final = ("chunk", "worker", "door")
MODES: Final = ("enforce", "observe", "off")
VERDICTS: Final = ("off", "not_email", "not_active", "too_few_sent", "below_rate", "trip")

API_STATUSES: Final = ("200", "400", "401", "404", "405", "408", "413", "429", "500", "503")

FAST_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
FRESH_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SIZES: Final = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


class Metrics:
    """All series of one process in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        self.records = self._counter(
            "records",
            "Records read from Kafka, by what they turned out to be; counted once collected.",
            kind=RECORD_KINDS,
        )
        self.dead_letters = self._counter(
            "dead_letters",
            "Records sent to the dead-letter topic and acknowledged there, by reason.",
            reason=[str(reason) for reason in DeadLetterReason],
        )
        self.generations = self._counter("generations", "Generations whose offsets were committed.")
        self.generation_records = self._histogram(
            "generation_records", "Records in a committed generation: 1 when idle, large under backlog.", SIZES
        )
        self.generation_campaigns = self._histogram(
            "generation_campaigns", "Dirty campaigns in a committed generation.", SIZES
        )
        self.generation_seconds = self._histogram(
            "generation_seconds", "From the start of a generation's flush to the commit of its offsets.", FAST_S
        )
        self.commits_refused = self._counter(
            "commits_refused", "Generations dropped because their partitions were taken away; normal in a rebalance."
        )
        self.collecting = self._gauge("collecting_records", "Records collected and not yet handed to a flush.")
        self.fetch_paused = self._gauge("fetch_paused", "1 while fetching is paused because the flush is behind.")

        self.recounts = self._counter("recounts", "Campaigns recounted, by who asked.", caller=CALLERS)
        self.recount_seconds = self._histogram(
            "recount_seconds",
            "One recount transaction (up to 1 000 campaigns), begin to commit.",
            FAST_S,
            caller=CALLERS,
        )
        self.campaigns_missing = self._counter(
            "campaigns_missing", "Hints and requests for campaigns that do not exist."
        )
        self.chunks_failed = self._counter(
            "chunks_failed", "Chunks that failed for a reason of their own and were deferred campaign by campaign."
        )
        self.drift_found = self._counter(
            "drift_found",
            "Campaigns whose stored numbers the sweep found wrong and the recount after the grace still did.",
        )

        self.guard_decisions = self._counter(
            "guard_decisions", "Windows the bounce guard judged, by mode and verdict.", mode=MODES, verdict=VERDICTS
        )
        self.pauses = self._counter("pauses", "Campaigns paused by the bounce guard.")

        self.api_calls = self._counter(
            "api_calls", "Answers of the sync-stats door, by HTTP status.", status=API_STATUSES
        )
        self.api_seconds = self._histogram(
            "api_call_seconds", "From a complete request at the sync-stats door to its answer.", FAST_S
        )

        self.deferred = self._counter("deferred", "Work put off, by reason.", reason=DEFERRED_REASONS)
        self.deferred_rows = self._gauge(
            "deferred_rows", "Rows waiting in the deferred table.", reason=DEFERRED_REASONS
        )
        self.deferred_age = self._gauge(
            "deferred_oldest_seconds", "Age of the oldest deferred row; 0 when there is none."
        )
        self.failing_campaigns = self._gauge("failing_campaigns", "Campaigns whose own recount keeps failing.")

        self.published = self._counter("published", "Events acknowledged by Kafka, by type.", type=EVENT_TYPES)
        self.publish_failures = self._counter(
            "publish_failures", "Relay turns in which Kafka did not acknowledge every event; they are sent again."
        )
        self.set_aside = self._counter("set_aside", "Events that can never be sent and were set aside.")
        self.relay_seconds = self._histogram(
            "relay_turn_seconds", "One relay turn (up to 2 000 events): read, send, acknowledge, delete.", FAST_S
        )
        self.outbox_rows = self._gauge("outbox_rows", "Events waiting to be published.")
        self.outbox_set_aside = self._gauge("outbox_set_aside_rows", "Events set aside; see `outbox list`.")
        self.outbox_age = self._gauge("outbox_oldest_seconds", "Age of the oldest event waiting; 0 when there is none.")
        self.freshness = self._histogram(
            "freshness_seconds",
            "From a hint's append to Kafka (broker or producer time) to the commit of the recount it led to.",
            FRESH_S,
        )

        self.sweep_pages = self._counter("sweep_pages", "Pages of campaigns compared by the sweep.")
        self.sweep_laps = self._counter("sweep_laps", "Complete laps of the sweep over all campaigns.")
        self.sweep_seconds = self._histogram("sweep_page_seconds", "Comparing one page of the sweep.", FAST_S)
        self.sweep_deferred = self._counter("sweep_deferred", "Campaigns the sweep deferred for a recount.")

        self.lag = Gauge(
            "campaign_stats_lag_records",
            "Records not yet committed, per assigned partition; absent for partitions of other replicas.",
            ["topic", "partition"],
            registry=registry,
        )
        self.assigned_partitions = self._gauge("assigned_partitions", "Partitions this process reads.")
        self.rebalances = self._counter("rebalances", "Times all partitions were taken away and assigned anew.")
        self.degraded = self._gauge("degraded", "1 while an engine waits for this dependency.", dependency=DEPENDENCIES)
        self.ready = self._gauge("ready", "1 when /readyz answers 200.")
        self.poll_age = self._gauge("poll_age_seconds", "Since the last poll of Kafka came back.")

    def _counter(self, name: str, text: str, **labels: Iterable[str]) -> Counter:
        metric = Counter(f"campaign_stats_{name}", text, list(labels), registry=self.registry)
        self._fill(metric, labels)
        return metric

    def _gauge(self, name: str, text: str, **labels: Iterable[str]) -> Gauge:
        metric = Gauge(f"campaign_stats_{name}", text, list(labels), registry=self.registry)
        self._fill(metric, labels)
        return metric

    def _histogram(self, name: str, text: str, buckets: Iterable[float], **labels: Iterable[str]) -> Histogram:
        metric = Histogram(f"campaign_stats_{name}", text, list(labels), buckets=tuple(buckets), registry=self.registry)
        self._fill(metric, labels)
        return metric

    @staticmethod
    def _fill(metric: Counter | Gauge | Histogram, labels: dict[str, Iterable[str]]) -> None:
        combinations: list[tuple[str, ...]] = [()]
        for values in labels.values():
            combinations = [(*combination, value) for combination in combinations for value in values]
        if labels:
            for combination in combinations:
                metric.labels(*combination)
