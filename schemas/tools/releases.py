"""`schemas/released/<version>`: the contract as it was released, kept for ever and never changed.

A release is a version of pyproject.toml under a dated heading of CHANGELOG.md.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Final

import orjson

from schemas.catalogue import CHANNELS, Channel
from schemas.tools.json_schema import Form, Schema, Side, name_of, schema_of

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SUMS: Final = "SHA256SUMS"
TOPICS: Final = "topics.json"
FORMS: Final[tuple[Form, ...]] = ("event", "data")
SIDES: Final[tuple[Side, ...]] = ("writer", "reader")
MINOR_RELEASES: Final = 2  # an event type goes no earlier after the release that deprecated it; schemas/README.md
DAYS: Final = 90  # ... nor than this: as long as a subscriber may need to move

_HEADING: Final = re.compile(r"^## \[?(\d+\.\d+\.\d+)\]?(?: - (\d{4}-\d{2}-\d{2}))?", re.MULTILINE)
_DEPRECATED: Final = re.compile(r"^### Deprecated$(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
_TYPE: Final = re.compile(r"`([a-z_.]+\.v\d+)`")


class Unreleasable(Exception):
    """Why this cannot be released, or CHANGELOG.md not be read."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What neighbours rely on: file name -> schema; event type -> `topic`, `written_by`. `version`: None for now."""

    version: str | None
    schemas: Mapping[str, Schema]
    topics: Mapping[str, Mapping[str, str]]

    def schema(self, event_type: str, form: Form, side: Side) -> Schema:
        """Raises KeyError for an event type that it does not have."""
        return self.schemas[name_of(event_type, form, side)]


@dataclass(frozen=True, slots=True)
class Release:
    """A heading of CHANGELOG.md, and the event types named in backticks under its `### Deprecated`."""

    version: str
    day: date
    deprecated: frozenset[str]

    @property
    def order(self) -> tuple[int, ...]:
        """Sorts as versions do."""
        return tuple(int(part) for part in self.version.split("."))


def current(channels: Sequence[Channel] = CHANNELS) -> Contract:
    """The contract as the models have it."""
    schemas = {
        name_of(channel.type, form, side): schema_of(channel, form, side)
        for channel in channels
        for form in FORMS
        for side in SIDES
    }
    topics = {channel.type: {"topic": channel.topic, "written_by": channel.written_by} for channel in channels}
    return Contract(None, schemas, topics)


def released(repository: Path = REPOSITORY) -> list[Contract]:
    """Every release, oldest first."""
    return [_read(folder) for folder in _folders(repository)]


def _read(folder: Path) -> Contract:
    documents = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    topics = documents.pop(TOPICS, {})
    return Contract(folder.name, documents, topics)


def version_of(repository: Path = REPOSITORY) -> str:
    """The version in pyproject.toml."""
    return str(tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"])


def changelog(repository: Path = REPOSITORY) -> list[Release]:
    """Oldest first. Raises Unreleasable for a heading without a day."""
    text = (repository / "CHANGELOG.md").read_text()
    headings = list(_HEADING.finditer(text))
    found = []
    ends = [one.start() for one in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends, strict=False):
        version, day = heading.groups()
        if day is None:
            raise Unreleasable(f"CHANGELOG.md: `## {version}` has no day; write `## {version} - 2026-11-28`.")
        said = "".join(_DEPRECATED.findall(text[heading.end() : end]))
        found.append(Release(version, date.fromisoformat(day), frozenset(_TYPE.findall(said))))
    return sorted(found, key=lambda one: one.order)


def why_not_ended(event_type: str, history: Sequence[Release]) -> str:
    """Why an event type may not go yet; empty when it may."""
    first = next((one for one in history if event_type in one.deprecated), None)
    if first is None:
        return f"no release names `{event_type}` under `### Deprecated` in CHANGELOG.md"
    minors = {one.order[:2] for one in history if one.order[:2] > first.order[:2]}
    if len(minors) < MINOR_RELEASES:
        return (
            f"of {MINOR_RELEASES} minor releases after {first.version}, which deprecated it, there were {len(minors)}"
        )
    end = first.day + timedelta(days=DAYS)
    if history[-1].day < end:
        return f"{first.version} deprecated it; releases must have it for {DAYS} days, until {end}"
    return ""


def broken(repository: Path = REPOSITORY) -> Iterator[str]:
    """What is wrong with the released folders as they lie there, a sentence each."""
    folders = {folder.name: folder for folder in _folders(repository)}
    headed = {one.version for one in changelog(repository)}
    for version in sorted(headed - folders.keys()):
        yield (
            f"CHANGELOG.md has a release {version}, schemas/released has not. "
            f"Fix: python -m schemas.tools.compatibility release."
        )
    for version in sorted(folders.keys() - headed):
        yield f"schemas/released/{version} is not in CHANGELOG.md. Fix: write the heading `## {version} - <day>`."
    for version, folder in folders.items():
        sums = folder / SUMS
        lines = sums.read_text().splitlines() if sums.exists() else []
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = {path.name: _digest(path.read_bytes()) for path in folder.iterdir() if path.name != SUMS}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                how = "is gone" if name not in found else "was added" if name not in expected else "was changed"
                yield f"schemas/released/{version}/{name} {how}; a release never changes. Fix: restore it."


def release(contract: Contract, version: str, repository: Path = REPOSITORY) -> Path:
    """Write the folder of this version. Raises Unreleasable when it is there and holds anything else."""
    files = {name: _json(schema) for name, schema in contract.schemas.items()} | {TOPICS: _json(contract.topics)}
    files[SUMS] = "".join(f"{_digest(files[name])}  {name}\n" for name in sorted(files)).encode()
    folder = repository / "schemas" / "released" / version
    if folder.exists():
        if {path.name: path.read_bytes() for path in folder.iterdir()} != files:
            raise Unreleasable(
                f"schemas/released/{version} is there and differs from the models; a release never changes. "
                "Fix: raise the version in pyproject.toml."
            )
        return folder
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _folders(repository: Path) -> list[Path]:
    folders = [path for path in (repository / "schemas" / "released").glob("*") if path.is_dir()]
    return sorted(folders, key=lambda path: [int(part) if part.isdigit() else -1 for part in path.name.split(".")])


def _json(document: object) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
