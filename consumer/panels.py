"""The numbers an operator looks at: one list, shown by the status page and by deploy/grafana/dashboard.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Fold = Literal["sum", "max", "rate", "p50", "p99"]
Unit = Literal[
    "records", "records/s", "campaigns/s", "events/s", "seconds", "rows", "campaigns", "answers/s", "0 or 1", "bytes"
]

WINDOW: Final = "5m"  # of a rate or quantile; as the status page looks back
WINDOW_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Panel:
    """`metric` without the suffix of its kind; of a `rate` its counter, of a `p50` or `p99` its histogram.

    `by`: a label that gets a line for each value; `only`: labels that are asked for.
    """

    group: str
    title: str
    unit: Unit
    metric: str
    fold: Fold
    by: str | None = None
    only: Mapping[str, str] | None = None

    @property
    def query(self) -> str:
        """PromQL over all replicas."""
        chosen = "{" + ",".join(f'{label}="{value}"' for label, value in (self.only or {}).items()) + "}"
        name, by = f"{self.metric}", ", ".join(label for label in (self.by,) if label)
        selector = "" if chosen == "{}" else chosen
        if self.fold in ("p50", "p99"):
            per = ", ".join(("le", *((by,) if by else ())))
            share = {"p50": "0.5", "p99": "0.99"}[self.fold]
            return f"histogram_quantile({share}, sum by ({per}) (rate({name}_bucket{selector}[{WINDOW}])))"
        grouping = f" by ({by})" if by else ""
        if self.fold == "rate":
            return f"sum{grouping} (rate({name}_total{selector}[{WINDOW}]))"
        return f"{self.fold}{grouping} ({name}{selector})"


def _stats(metric: str) -> str:
    return f"campaign_stats_{metric}"


PANELS: Final[Sequence[Panel]] = (
    Panel("In", "Records read", "records/s", _stats("records"), "rate", "kind"),
    Panel("In", "Lag", "records", _stats("lag_records"), "sum"),
    Panel("In", "Dead letters", "records/s", _stats("dead_letters"), "rate", "reason"),
    Panel("In", "Fetching paused", "0 or 1", _stats("fetch_paused"), "max"),
    Panel("Recounts", "Campaigns recounted", "campaigns/s", _stats("recounts"), "rate", "caller"),
    Panel("Recounts", "Time of a recount transaction, p99", "seconds", _stats("recount_seconds"), "p99", "caller"),
    Panel("Recounts", "Time of a generation, p99", "seconds", _stats("generation_seconds"), "p99"),
    Panel("Recounts", "Failing campaigns", "campaigns", _stats("failing_campaigns"), "max"),
    Panel("Out", "Events published", "events/s", _stats("published"), "rate", "type"),
    Panel("Out", "From hint to published event, p50", "seconds", _stats("event_delay_seconds"), "p50", "fact"),
    Panel("Out", "From hint to published event, p99", "seconds", _stats("event_delay_seconds"), "p99", "fact"),
    Panel("Out", "Events waiting", "rows", _stats("outbox_rows"), "max"),
    Panel("Out", "Oldest event waiting", "seconds", _stats("outbox_oldest_seconds"), "max"),
    Panel("Out", "Events set aside", "rows", _stats("outbox_set_aside_rows"), "max"),
    Panel("Guard", "Campaigns paused", "campaigns/s", _stats("pauses"), "rate"),
    Panel("Guard", "Judgements", "campaigns/s", _stats("guard_decisions"), "rate", "verdict"),
    Panel("Put off", "Deferred rows", "rows", _stats("deferred_rows"), "max", "reason"),
    Panel("Put off", "Oldest deferred row", "seconds", _stats("deferred_oldest_seconds"), "max"),
    Panel("Drift", "Campaigns compared", "campaigns/s", _stats("sweep_campaigns"), "rate"),
    Panel("Drift", "Campaigns found wrong", "campaigns/s", _stats("drift_found"), "rate"),
    Panel("Door", "Answers", "answers/s", _stats("api_calls"), "rate", "status"),
    Panel("Door", "Time of an answer, p99", "seconds", _stats("api_call_seconds"), "p99"),
    Panel("Process", "Servers away", "0 or 1", _stats("degraded"), "max", "dependency"),
    Panel("Process", "Since the last poll", "seconds", _stats("poll_age_seconds"), "max"),
    Panel("Process", "Resident memory", "bytes", "process_resident_memory_bytes", "max"),
)
