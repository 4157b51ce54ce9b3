"""Topic names. Every topic has the campaign id as its key, and `cleanup.policy=delete`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from schemas import events

DEAD_LETTERS: Final = "campaign-stats.dead-letters"
TOPIC_OF: Final[Mapping[str, str]] = {
    events.STATUS_CHANGED: "prospect.status-changed",
    events.SYNC_REQUESTED: "campaign.sync-requested",
    events.STATS_UPDATED: "campaign.stats-updated",
    events.SYNC_REJECTED: "campaign.sync-rejected",
    events.PAUSED: "campaign.paused",
}
READ: Final = (events.STATUS_CHANGED, events.SYNC_REQUESTED)
WRITTEN: Final = (events.STATS_UPDATED, events.SYNC_REJECTED, events.PAUSED)


@dataclass(frozen=True, slots=True)
class Topics:
    """The names in one installation; `prefix` stands literally before each."""

    prefix: str = ""

    def of(self, event_type: str) -> str:
        """The topic of an event type. Raises KeyError for an unknown type."""
        return self.prefix + TOPIC_OF[event_type]

    @property
    def dead_letters(self) -> str:
        """Where records go that can never be read."""
        return self.prefix + DEAD_LETTERS

    @property
    def read(self) -> list[str]:
        """Topics the service subscribes to."""
        return [self.of(event_type) for event_type in READ]

    @property
    def written(self) -> list[str]:
        """Topics the service publishes events to."""
        return [self.of(event_type) for event_type in WRITTEN]

    @property
    def all(self) -> list[str]:
        """Every topic the service needs, the dead letters last."""
        return [*self.read, *self.written, self.dead_letters]
