"""What each topic promises, for people and for the generated documents: AsyncAPI, README, page. Needs pydantic only."""

import builtins
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel

from schemas import events
from schemas.topics import TOPIC_OF


@dataclass(frozen=True, slots=True)
class Channel:
    """One event type on its topic. `written_by`: who publishes it, seen from a neighbour."""

    type: str
    model: builtins.type[BaseModel]
    written_by: Literal["you", "the service"]
    summary: str
    action: str
    promises: tuple[str, ...]
    ordering: str
    retention: str

    @property
    def topic(self) -> str:
        """Without the installation's prefix."""
        return TOPIC_OF[self.type]

    @property
    def is_read(self) -> bool:
        """Whether the service reads it; else it writes it."""
        return self.written_by == "you"


_READ_ORDER: Final = "None needed: the counts come from the rows, so order, repeats and lateness change nothing."
_READ_RETENTION: Final = "By age, at least as long as the service may stand still (7 days are usual); never compacted."
_WRITTEN_ORDER: Final = (
    "Commit order per campaign as long as one database session of the service lives; after that a run may be repeated, "
    "so go by `version`."
)
_REJECTED_ORDER: Final = (
    "Commit order per campaign as long as one database session of the service lives; a repeat has the same `id`, so go "
    "by `causationid`."
)
_WRITTEN_RETENTION: Final = "By age, as long as a subscriber may stand still (7 days are usual); never compacted."

CHANNELS: Final = (
    Channel(
        type=events.STATUS_CHANGED,
        model=events.ProspectStatusChangedV1,
        written_by="you",
        summary="A campaign is dirty: one of its prospects changed. A hint, never a delta.",
        action="Publish one after each commit that changes a status; for a bulk change one per campaign is enough.",
        promises=(
            "The campaign is recounted from its rows after the hint was read.",
            "No hint is lost: its offset moves only after the transaction that covers it.",
            "What cannot be read is kept as a dead letter with its reason, and stops nothing beside it.",
        ),
        ordering=_READ_ORDER,
        retention=_READ_RETENTION,
    ),
    Channel(
        type=events.SYNC_REQUESTED,
        model=events.CampaignSyncRequestedV1,
        written_by="you",
        summary="Recount this campaign and answer.",
        action="Publish one when you need the counts now; wait for the answer whose `causationid` is its `id`.",
        promises=(
            "Every request is answered at least once, by a stats_updated or a sync_rejected with the request's id.",
            "Requests are served before hints.",
        ),
        ordering=_READ_ORDER,
        retention=_READ_RETENTION,
    ),
    Channel(
        type=events.STATS_UPDATED,
        model=events.CampaignStatsUpdatedV1,
        written_by="the service",
        summary="A campaign's numbers or status changed, or a sync request is answered.",
        action="Drop it when its `version` is not newer than what you have of that campaign; else take it whole.",
        promises=(
            "At least once, one stable `id` per fact, one `version` per recount.",
            "Published when numbers or status differ from what was last published, and for every sync request.",
            "Every pause comes with one of the same `version`.",
        ),
        ordering=_WRITTEN_ORDER,
        retention=_WRITTEN_RETENTION,
    ),
    Channel(
        type=events.SYNC_REJECTED,
        model=events.CampaignSyncRejectedV1,
        written_by="the service",
        summary="A sync request gets no counts.",
        action="Match it by `causationid`. On `not_found` give up; on `failed` or an unknown reason ask later.",
        promises=("At least once, one stable `id` per request.",),
        ordering=_REJECTED_ORDER,
        retention=_WRITTEN_RETENTION,
    ),
    Channel(
        type=events.PAUSED,
        model=events.CampaignPausedV1,
        written_by="the service",
        summary="The bounce guard paused an email campaign.",
        action="React once per `id`: stop what you send for it, tell its owner. A repeat has the same `id`.",
        promises=(
            "At least once, one stable `id` per pause; the pause is committed before it is published.",
            "One effective pause, one version, one event. A pause made by a person has no event here.",
        ),
        ordering=_WRITTEN_ORDER,
        retention=_WRITTEN_RETENTION,
    ),
)

UNKNOWN_VALUES: Final[Mapping[type[events.Listed], str]] = {
    events.Trigger: "Of a newer release: no special case.",
    events.RejectionReason: "Of a newer release: ask again later.",
    events.PauseReason: "Of a newer release: a pause like any other.",
    events.DeadLetterReason: "Of a newer release: a record like the others, kept and not read.",
}
"""What a reader makes of a value that is not in the list it knows."""

DEAD_LETTER_HEADERS: Final[dict[str, str]] = {
    "dead-letter-topic": "Topic the record came from.",
    "dead-letter-partition": "Its partition, a decimal number.",
    "dead-letter-offset": "Its offset, or `first-last` for records that could not be handed out.",
    "dead-letter-reason": "Why: one of the closed list `dead-letter-reason`.",
    "dead-letter-error": "JSON path or header, what was expected, and the fix; never what was sent.",
    "dead-letter-time": "When it was set aside, RFC 3339 in UTC.",
}
DEAD_LETTER_RETENTION: Final = "7 days by default, and an ACL of its own: it repeats what upstream sent."
