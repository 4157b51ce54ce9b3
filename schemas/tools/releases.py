"""`schemas/released/<version>`: the contract as it was released, kept for ever and never changed.

A release is a version of pyproject.toml under a dated heading of CHANGELOG.md; `release.json` keeps the day and the
deprecated event types of that heading, so that nobody moves them afterwards.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import orjson
from pydantic import BaseModel

from schemas import door
from schemas.catalogue import CHANNELS, DEAD_LETTER_HEADERS, Channel
from schemas.events import LOWER_ID_PATTERN, DeadLetterReason
from schemas.tools.asyncapi import STRUCTURED
from schemas.tools.json_schema import Form, Schema, Side, name_of, schema_of, shaped
from schemas.topics import DEAD_LETTERS

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SUMS: Final = "SHA256SUMS"
TOPICS: Final = "topics.json"
LETTERS: Final = "dead-letters.json"
DOOR: Final = "door.json"
RELEASE: Final = "release.json"
FORMS: Final[tuple[Form, ...]] = ("event", "data")
SIDES: Final[tuple[Side, ...]] = ("writer", "reader")
ANSWERS: Final[Mapping[str, type[BaseModel]]] = {"answer": door.SyncStatsAnswer, "error": door.DoorError}
MINOR_RELEASES: Final = 2  # an event type goes no earlier after the release that deprecated it; schemas/README.md
DAYS: Final = 90  # ... nor than this: as long as a subscriber may need to move

_HEADING: Final = re.compile(r"^## \[?(\d+\.\d+\.\d+)\]?(?: - (\d{4}-\d{2}-\d{2}))?", re.MULTILINE)
_DEPRECATED: Final = re.compile(r"^### Deprecated$(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
_TYPE: Final = re.compile(r"`([a-z_.]+\.v\d+)`")


class Unreleasable(Exception):
    """Why this cannot be released, or CHANGELOG.md not be read."""


Document = Mapping[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class Contract:
    """What neighbours rely on. `version`: None for now.

    `schemas`: file name -> schema; `topics`: event type -> `topic`, `written_by`, `key` (a pattern, "" for any),
    `content_type`, `modes`; `dead_letters`: `topic`, `headers`, `reasons`; `door`: `path`, `method`, `statuses` (status
    -> names of headers), `answer` and `error`, each side -> schema.
    """

    version: str | None
    schemas: Mapping[str, Schema]
    topics: Mapping[str, Document]
    dead_letters: Document
    door: Document

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
        return _order(self.version)

    def __str__(self) -> str:
        """As in a sentence that compares two."""
        return f"{self.day}, deprecated: {', '.join(sorted(self.deprecated)) or 'nothing'}"


def current(channels: Sequence[Channel] = CHANNELS) -> Contract:
    """The contract as the models have it."""
    schemas = {
        name_of(channel.type, form, side): schema_of(channel, form, side)
        for channel in channels
        for form in FORMS
        for side in SIDES
    }
    topics = {
        channel.type: {
            "topic": channel.topic,
            "written_by": channel.written_by,
            "key": "" if channel.is_read else LOWER_ID_PATTERN,
            "content_type": STRUCTURED,
            "modes": ["structured", "binary"] if channel.is_read else ["structured"],
        }
        for channel in channels
    }
    letters = {
        "topic": DEAD_LETTERS,
        "headers": list(DEAD_LETTER_HEADERS),
        "reasons": [str(reason) for reason in DeadLetterReason],
    }
    headers = {str(one.status): [one.header] if one.header else [] for one in door.REFUSALS}
    answers = {name: {side: shaped(model, side) for side in SIDES} for name, model in ANSWERS.items()}
    call = {"path": door.PATH, "method": "POST", "statuses": {"200": [], **headers}, **answers}
    return Contract(None, schemas, topics, letters, call)


def released(repository: Path = REPOSITORY) -> list[Contract]:
    """Every release, oldest first."""
    return [_read(folder) for folder in _folders(repository)]


def _read(folder: Path) -> Contract:
    documents = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    documents.pop(RELEASE, None)
    topics, letters, call = (documents.pop(name, {}) for name in (TOPICS, LETTERS, DOOR))
    return Contract(folder.name, documents, topics, letters, call)


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
        version, written = heading.groups()
        try:
            day = date.fromisoformat(written or "")
        except ValueError as error:
            what = f"`{written}`, which is no day" if written else "no day"
            raise Unreleasable(
                f"CHANGELOG.md: `## {version}` has {what}; write `## {version} - 2026-11-28`."
            ) from error
        said = "".join(_DEPRECATED.findall(text[heading.end() : end]))
        found.append(Release(version, day, frozenset(_TYPE.findall(said))))
    return sorted(found, key=lambda one: one.order)


def history(repository: Path = REPOSITORY) -> list[Release]:
    """Every release as its folder has it, and those that CHANGELOG.md has beyond; oldest first."""
    kept = _kept(repository)
    due = [one for one in changelog(repository) if one.version not in kept]
    return sorted([*kept.values(), *due], key=lambda one: one.order)


def _kept(repository: Path) -> dict[str, Release]:
    kept = {}
    for path in (folder / RELEASE for folder in _folders(repository)):
        if path.exists():  # else the sums say so
            said = json.loads(path.read_text())
            day = date.fromisoformat(said["day"])
            kept[path.parent.name] = Release(said["version"], day, frozenset(said["deprecated"]))
    return kept


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


def broken(repository: Path = REPOSITORY, contract: Contract | None = None, due: str | None = None) -> Iterator[str]:
    """What is wrong with the releases as they lie there, a sentence each.

    `contract`: that of the models. `due`: a version that is about to be released, so it needs no folder yet.
    Raises Unreleasable for a heading without a day.
    """
    folders = {folder.name: folder for folder in _folders(repository)}
    headings = changelog(repository)
    headed = {one.version for one in headings}
    for version in sorted(headed - folders.keys() - {due}):
        yield (
            f"CHANGELOG.md has a release {version}, schemas/released has not. "
            f"Fix: python -m schemas.tools.compatibility release."
        )
    for version in sorted(folders.keys() - headed):
        yield f"schemas/released/{version} is not in CHANGELOG.md. Fix: write the heading `## {version} - <day>`."
    changed = [sentence for folder in folders.values() for sentence in _changed(folder)]
    yield from changed
    if not changed:
        yield from _moved(headings, _kept(repository))
    yield from _wrong_version(version_of(repository), contract or current(), folders)


def _changed(folder: Path) -> Iterator[str]:
    sums = folder / SUMS
    lines = sums.read_text().splitlines() if sums.exists() else []
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.name: _digest(path.read_bytes()) for path in folder.iterdir() if path.name != SUMS}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            how = "is gone" if name not in found else "was added" if name not in expected else "was changed"
            yield f"schemas/released/{folder.name}/{name} {how}; a release never changes. Fix: restore it."


def _moved(headings: Sequence[Release], kept: Mapping[str, Release]) -> Iterator[str]:
    for one in headings:
        said = kept.get(one.version, one)
        if one != said:
            yield f"CHANGELOG.md says of {one.version}: {one}; the release says: {said}. Fix: correct CHANGELOG.md."
        if one.day > date.today():
            yield f"CHANGELOG.md: {one.version} is of {one.day}, which is still to come. Fix: write the day it is made."
    for before, after in pairwise(headings):
        if after.day < before.day:
            yield (
                f"CHANGELOG.md: {after.version} is of {after.day}, before {before.version} of {before.day}. "
                "Fix: correct the day, or raise the version in pyproject.toml."
            )


def _wrong_version(version: str, contract: Contract, folders: Mapping[str, Path]) -> Iterator[str]:
    """Once there is a release, the version is a released one and unchanged, or newer than all of them."""
    if version in folders:
        now, then = _documents(contract), {path.name: path.read_bytes() for path in folders[version].iterdir()}
        names = sorted(name for name in {*now, *then} - {SUMS, RELEASE} if now.get(name) != then.get(name))
        if names:
            yield (
                f"The models differ from schemas/released/{version} in {', '.join(names)}; a release never changes. "
                "Fix: raise the version in pyproject.toml."
            )
    elif folders and _order(version) < max(_order(one) for one in folders):
        yield (
            f"pyproject.toml has version {version}, which is neither released nor newer than every release. "
            "Fix: raise the version in pyproject.toml."
        )


def release(contract: Contract, version: str, repository: Path = REPOSITORY) -> Path:
    """Write the folder of this version; one that is there stays. Raises Unreleasable without a heading for it."""
    heading = next((one for one in changelog(repository) if one.version == version), None)
    if heading is None:
        raise Unreleasable(f"CHANGELOG.md has no release {version}. Fix: write the heading `## {version} - <day>`.")
    said = {"version": version, "day": heading.day.isoformat(), "deprecated": sorted(heading.deprecated)}
    files = _documents(contract) | {RELEASE: _json(said)}
    files[SUMS] = "".join(f"{_digest(files[name])}  {name}\n" for name in sorted(files)).encode()
    folder = repository / "schemas" / "released" / version
    if folder.exists():  # and the same, or it is broken
        return folder
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pins(repository: Path = REPOSITORY) -> dict[str, str]:
    """Version -> digest of its sums: what a release is, in a line that can be kept elsewhere."""
    return {folder.name: _digest((folder / SUMS).read_bytes()) for folder in _folders(repository)}


def _documents(contract: Contract) -> dict[str, bytes]:
    others = {TOPICS: contract.topics, LETTERS: contract.dead_letters, DOOR: contract.door}
    return {name: _json(document) for name, document in {**contract.schemas, **others}.items()}


def _folders(repository: Path) -> list[Path]:
    folders = [path for path in (repository / "schemas" / "released").glob("*") if path.is_dir()]
    return sorted(folders, key=lambda path: _order(path.name))


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else -1 for part in version.split("."))


def _json(document: object) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
