"""The service as a release would be that publishes an invented campaign.paused.v2 beside v1; for a test only.

v2 says `limit_bp` where v1 says `threshold_bp`. All that such a release needs: a type, a topic, and a second row told.
"""

import json
from collections.abc import Mapping
from typing import Final, cast
from uuid import uuid5

from consumer import envelope, outcome
from consumer.__main__ import main
from schemas import events, topics

PAUSED_V2: Final = "campaign.paused.v2"
cast("dict[str, str]", topics.TOPIC_OF)[PAUSED_V2] = PAUSED_V2
setattr(topics, "WRITTEN", (*topics.WRITTEN, PAUSED_V2))  # noqa: B010  # as a later release has it

told = outcome.Outcome.tell


def tell(self: outcome.Outcome, row: outcome.OutboxRow) -> None:
    """Both, or neither: they are rows of one transaction."""
    told(self, row)
    if row.type == events.PAUSED:
        told(self, outcome.OutboxRow(row.campaign_id, PAUSED_V2, second(row, json.loads(row.event))))


def second(row: outcome.OutboxRow, event: Mapping[str, object]) -> bytes:
    """The same fact in the form of v2."""
    data = dict(cast("Mapping[str, object]", event["data"]))
    data["limit_bp"] = data.pop("threshold_bp")
    name = f"paused.v2:{data['version']}"
    return envelope.to_json({**event, "type": PAUSED_V2, "id": str(uuid5(row.campaign_id, name)), "data": data})


outcome.Outcome.tell = tell  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
