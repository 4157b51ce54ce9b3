"""The example payloads in `schemas/examples`: files as they would stand in a record's value."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

EXAMPLES: Final = Path(__file__).resolve().parents[1] / "examples"


@dataclass(frozen=True, slots=True)
class Bad:
    """A payload that breaks the contract: where, why, and what the service does with it.

    `at`: JSON path, None for what is no JSON. `refused_by`: "writer" when only writers are bound by it.
    `reason`, `error`: of the dead letter that it becomes when it is published to a topic that the service reads.
    """

    name: str
    type: str
    value: bytes
    at: str | None
    because: str
    refused_by: Literal["reader", "writer"]
    reason: str
    error: str


def good(event_type: str) -> dict[str, bytes]:
    """Name -> value of the good examples, by name."""
    return {path.stem: path.read_bytes() for path in sorted((EXAMPLES / event_type / "good").glob("*.json"))}


def parsed(event_type: str) -> dict[str, dict[str, Any]]:
    """The same as JSON."""
    return {name: json.loads(value) for name, value in good(event_type).items()}


def change_records() -> dict[str, Any]:
    """Name -> a change record that is read or ignored, by name."""
    paths = sorted((EXAMPLES / "change-records" / "good").glob("*.json"))
    return {path.stem: json.loads(path.read_bytes()) for path in paths}


def bad() -> Iterator[Bad]:
    """Every bad example, as `bad.json` explains it."""
    for name, said in json.loads((EXAMPLES / "bad.json").read_text()).items():
        yield Bad(
            name=name,
            type=name.partition("/")[0],
            value=(EXAMPLES / name).read_bytes(),
            at=said.get("at"),
            because=said["because"],
            refused_by=said.get("refused_by", "reader"),
            reason=said["dead_letter"]["reason"],
            error=said["dead_letter"]["error"],
        )
