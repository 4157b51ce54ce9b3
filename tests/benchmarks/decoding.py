"""Ways to check a hint, in this process and without a server: what each costs per hint.

All get the same hints in batches of the size of a poll, must find the same campaigns, and play in turn.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NotRequired
from uuid import UUID

from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from consumer.envelope import Content, Hints, StatusHint, decode
from tests.benchmarks import workload
from tests.benchmarks.report import Figure, Report
from tests.benchmarks.stage import Stage

HINTS: Final = 100_000
BATCH: Final = 420  # records of one partition in a poll, on average in a drain
AT_ONCE: Final = 200  # validated by one call
ROUNDS: Final = 7


class DataDict(TypedDict):
    """Data of a status hint for pydantic, as cheap as it can be."""

    campaign_id: UUID
    prospect_id: UUID
    to_status: str
    from_status: NotRequired[str]
    user_id: NotRequired[str]


class HintDict(TypedDict):
    """A status hint for pydantic, as cheap as it can be."""

    specversion: Literal["1.0"]
    id: str
    source: str
    type: Literal["prospect.status_changed.v1"]
    data: DataDict


class Data(BaseModel):
    """Data of a status hint as one would write it."""

    campaign_id: UUID
    prospect_id: UUID
    to_status: str
    from_status: str | None = None
    user_id: str | None = None


class Hint(BaseModel):
    """A status hint as one would write it."""

    specversion: Literal["1.0"]
    id: str
    source: str
    type: Literal["prospect.status_changed.v1"]
    data: Data


@dataclass(frozen=True, slots=True)
class Bytes:
    """A record without headers."""

    offset: int
    value: bytes | None
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes | None]] = ()
    timestamp: int = 0


Batches = Sequence[Sequence[Content]]
_ONE: Final = TypeAdapter(HintDict)
_MANY: Final = TypeAdapter(list[HintDict])


def _collect(batches: Batches) -> int:
    hints = Hints()
    for batch in batches:
        hints.collect(batch)
    return len(hints.settled())


def _decode(batches: Batches) -> int:
    return len({hint.campaign_id for batch in batches for hint in decode(batch) if isinstance(hint, StatusHint)})


def _models(batches: Batches) -> int:
    return len(
        {Hint.model_validate_json(record.value or b"").data.campaign_id for batch in batches for record in batch}
    )


def _typed_dicts(batches: Batches) -> int:
    found = set()
    for batch in batches:
        for record in batch:
            found.add(_ONE.validate_json(record.value or b"")["data"]["campaign_id"])
    return len(found)


def _lists_of_typed_dicts(batches: Batches) -> int:
    found = set()
    for batch in batches:
        for start in range(0, len(batch), AT_ONCE):
            values = b",".join([record.value or b"" for record in batch[start : start + AT_ONCE]])
            found.update([hint["data"]["campaign_id"] for hint in _MANY.validate_json(b"[" + values + b"]")])
    return len(found)


WAYS: Final[Mapping[str, Callable[[Batches], int]]] = {
    "msgspec, types are the checks (the service)": _collect,
    "orjson, then an exact look": _decode,
    "pydantic, a model each": _models,
    "pydantic, a TypedDict each": _typed_dicts,
    f"pydantic, TypedDicts in lists of {AT_ONCE}": _lists_of_typed_dicts,
}


async def measure(stage: Stage) -> Report:
    """All ways once a round, the order reversed every round; needs nothing of the stage."""
    ids = workload.campaign_ids(stage.size.campaigns)
    records = [
        Bytes(place, workload.hint(str(campaign), place)) for place, campaign in enumerate(workload.zipf(ids, HINTS, 1))
    ]
    batches = [records[start : start + BATCH] for start in range(0, HINTS, BATCH)]
    gc.collect()
    gc.freeze()
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    problems = []
    for number in range(ROUNDS):
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            begun = time.process_time()
            found = WAYS[name](batches)
            taken[name].append((time.process_time() - begun) / HINTS * 1e6)
            if found != len(ids):
                problems.append(f"{name}: found {found} of {len(ids)} campaigns")
    gc.unfreeze()
    return Report("decoding", [Figure(f"CPU us/hint: {name}", us) for name, us in taken.items()], problems)
