"""`make compat`: whether what neighbours rely on still holds, against every release, by rules and by values.

FORWARD: what the new writer writes a reader of the release takes. BACKWARD: what was written by the release the new
reader takes. PROMISE, of what the service writes: the new writer has every field and listed value of the release's, and
writes nothing there that the release's did not; it may add fields and values, and bounds may be narrower, by design.
All are demanded of every event type, as whole event and as data, and of the door's answers; and a writer fits its own
reader. Of topics, dead letters and the door the names stay.
`release` as argument: keep the contract as that of the version in pyproject.toml, if it passes.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from schemas.tools import releases, rules, values
from schemas.tools.json_schema import Schema
from schemas.tools.releases import ANSWERS, FORMS, REPOSITORY, Contract, Document, Release, Unreleasable

SECTION: Final = 'schemas/README.md, "A new version"'
DOOR: Final = "sync-stats door"
LETTERS: Final = "dead letters"


class Direction(StrEnum):
    """Who reads whom."""

    FORWARD = "FORWARD"
    BACKWARD = "BACKWARD"
    ITSELF = "ITSELF"
    PROMISE = "PROMISE"


ADVICE: Final = {
    Direction.FORWARD: "let the model write no more than before",
    Direction.BACKWARD: "let the model take what it took before",
    Direction.ITSELF: "let the reader's side take it (`x-writer` may only narrow)",
    Direction.PROMISE: "let the model write only what it promised",
}
ADVICE_REQUIRED: Final = {
    Direction.FORWARD: "keep it required in the model",
    Direction.BACKWARD: "make it optional in the model",
    Direction.ITSELF: "let both sides of the model have it required",
    Direction.PROMISE: "keep it required in the model",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a change broke, at which JSON path (or what of the names), and how it can be made all the same."""

    path: str
    broke: str
    fix: str


@dataclass(frozen=True, slots=True)
class Check:
    """One event type, the dead letters or the door; one form or the names; one direction, one release.

    `tried`: how many values; `example`: the smallest of them that was refused.
    """

    of: str
    form: str
    direction: Direction
    since: str | None
    refusals: Sequence[Refusal]
    tried: int | None = None
    example: str | None = None

    @property
    def about(self) -> str:
        """`campaign.paused.v1 event FORWARD since 0.1.0`."""
        return f"{self.of} {self.form} {self.direction}" + (f" since {self.since}" if self.since else "")

    def __str__(self) -> str:
        how = "names" if self.tried is None else f"rules, {self.tried} values"
        return f"{'refused' if self.refusals else 'ok':<8}{self.about}  {how}"

    def told(self) -> Iterator[str]:
        """Every refusal as a sentence with its fix."""
        for one in self.refusals:
            yield f"{self.about}: {one.path}: {one.broke}. Fix: {one.fix}."
        if self.refusals and self.example:
            yield f"  for example {self.example}"


@dataclass(frozen=True, slots=True)
class _Shape:
    """Both schemas of one event type or answer in one form. `otherwise`: where else a change may be made."""

    of: str
    form: str
    version: str | None
    writer: Schema
    reader: Schema
    otherwise: str


def compare(
    new: Contract, earlier: Sequence[Contract], history: Sequence[Release] = (), count: int = values.COUNT
) -> Iterator[Check]:
    """Every check of a contract, with `count` values each. `history`: of event types that are to end."""
    for event_type in new.topics:
        yield _topic_of_its_own(event_type, new)
        for shape in _of_event(event_type, new, new):
            yield _read(Direction.ITSELF, shape, shape, count)
    for shape in _of_door(new):
        yield _read(Direction.ITSELF, shape, shape, count)
    for old in earlier:
        for event_type in old.topics:
            yield _same_topic(event_type, old, new, history)
            if event_type in new.topics:
                is_written = old.topics[event_type]["written_by"] == "the service"
                for before, now in zip(_of_event(event_type, old, new), _of_event(event_type, new, new), strict=True):
                    yield from _both_ways(before, now, is_written, count)
        yield _same_dead_letters(old, new)
        yield _same_door(old, new)
        for before, now in zip(_of_door(old), _of_door(new), strict=True):
            yield from _both_ways(before, now, True, count)


def _of_event(event_type: str, contract: Contract, new: Contract) -> Iterator[_Shape]:
    for form in FORMS:
        writer, reader = (contract.schema(event_type, form, side) for side in releases.SIDES)
        yield _Shape(event_type, form, contract.version, writer, reader, _beside(event_type, new))


def _of_door(contract: Contract) -> Iterator[_Shape]:
    for form in ANSWERS:
        answer = contract.door[form]
        yield _Shape(DOOR, form, contract.version, answer["writer"], answer["reader"], "answer so at a path of its own")


def _both_ways(old: _Shape, new: _Shape, is_written: bool, count: int) -> Iterator[Check]:
    yield _read(Direction.FORWARD, old, new, count)
    yield _read(Direction.BACKWARD, old, new, count)
    if is_written:
        yield _read(Direction.PROMISE, old, new, count)


def _read(direction: Direction, old: _Shape, new: _Shape, count: int) -> Check:
    """Whether the one reads what the other writes, or keeps what it promised."""
    before, now = (f"the {one.version or 'new'}" for one in (old, new))
    writer, reader, names = {
        Direction.FORWARD: (new.writer, old.reader, (f"{now} writer", f"{before} reader")),
        Direction.BACKWARD: (old.writer, new.reader, (f"{before} writer", f"{now} reader")),
        Direction.ITSELF: (new.writer, new.reader, (f"{now} writer", f"{now} reader")),
        Direction.PROMISE: (new.writer, rules.opened(old.writer), (f"{now} writer", f"who relies on {before} writer")),
    }[direction]
    advice = {
        "required": f"{ADVICE_REQUIRED[direction]}, or {new.otherwise}",
        "value": f"{ADVICE[direction]}, or {new.otherwise}",
        "gone": f"keep it in the model, or {new.otherwise}",
        "unknown": "teach it to schemas/tools/rules.py, or leave it out of the model",
    }
    found = rules.misfits(writer, reader)
    refusals = [Refusal(one.path, one.told(*names), advice[one.kind]) for one in found]
    if direction is Direction.PROMISE:
        told = {one.path for one in found}
        gone = [one for one in rules.lost(writer, old.writer) if one.path not in told]
        refusals += [Refusal(one.path, one.told(names[0], f"{before} writer"), advice[one.kind]) for one in gone]
    tried, example = 0, None
    try:
        tried, example = values.tried(writer, reader, count)
    except rules.Unshown as error:
        broke = f"no values of {names[0]} can be tried: {error}"
        refusals.append(Refusal("$", broke, "teach it to schemas/tools/values.py, or leave it out of the model"))
    if example and not refusals:
        broke = f"by the rules {names[1]} takes all that {names[0]} writes, and yet it refuses one value"
        refusals.append(Refusal("$", broke, "correct schemas/tools/rules.py"))
    return Check(new.of, new.form, direction, old.version, refusals, tried, example)


def _topic_of_its_own(event_type: str, new: Contract) -> Check:
    """Subscribers read one event type from a topic; the service itself tells types apart, so upstream may mix them."""
    own = new.topics[event_type]
    others = [name for name, one in new.topics.items() if name != event_type and one["topic"] == own["topic"]]
    refusals = []
    if others and own["written_by"] == "the service":
        broke = f"`{own['topic']}` also has {', '.join(others)}, which a subscriber of one cannot read"
        refusals.append(Refusal("topic", broke, f"give each a topic of its own: {SECTION}"))
    return Check(event_type, "topic", Direction.ITSELF, None, refusals)


def _same_topic(event_type: str, old: Contract, new: Contract, history: Sequence[Release]) -> Check:
    refusals: list[Refusal] = []
    if event_type in new.topics:
        before, now, otherwise = old.topics[event_type], new.topics[event_type], _beside(event_type, new)
        refusals += _same(("topic", "written_by", "key", "content_type"), before, now, old.version, otherwise)
        if before["written_by"] == "the service":  # its subscribers may know one mode only
            refusals += _same(("modes",), before, now, old.version, otherwise)
        else:
            refusals += _all_there("modes", before["modes"], now["modes"], otherwise)
    elif why := releases.why_not_ended(event_type, history):
        broke = f"the event type is gone, neighbours of {old.version} still have it; {why}"
        refusals.append(Refusal("type", broke, f"keep it beside the new version: {SECTION}"))
    return Check(event_type, "topic", Direction.FORWARD, old.version, refusals)


def _same_dead_letters(old: Contract, new: Contract) -> Check:
    before, now, otherwise = old.dead_letters, new.dead_letters, "write it beside the new one"
    refusals = [*_same(("topic",), before, now, old.version, otherwise)]
    for what in ("headers", "reasons"):
        refusals += _all_there(what, before[what], now[what], otherwise)
    return Check(LETTERS, "topic", Direction.FORWARD, old.version, refusals)


def _same_door(old: Contract, new: Contract) -> Check:
    before, now, otherwise = old.door, new.door, "open another door beside this one"
    refusals = [*_same(("path", "method"), before, now, old.version, otherwise)]
    refusals += _all_there("statuses", before["statuses"], now["statuses"], otherwise)
    for status in before["statuses"].keys() & now["statuses"].keys():
        refusals += _all_there(f"statuses.{status}", before["statuses"][status], now["statuses"][status], otherwise)
    return Check(DOOR, "call", Direction.FORWARD, old.version, refusals)


def _same(
    names: Iterable[str], before: Document, now: Document, version: str | None, otherwise: str
) -> Iterator[Refusal]:
    for what in names:
        if before[what] != now[what]:
            broke = f"it was `{before[what]}` in {version} and is `{now[what]}` now"
            yield Refusal(what, broke, f"leave it `{before[what]}`, or {otherwise}")


def _all_there(what: str, before: Iterable[str], now: Iterable[str], otherwise: str) -> Iterator[Refusal]:
    if gone := [name for name in before if name not in now]:
        names = ", ".join(f"`{name}`" for name in gone)
        yield Refusal(what, f"{names} is gone, and neighbours may rely on it", f"keep {names}, or {otherwise}")


def _beside(event_type: str, contract: Contract) -> str:
    return f"publish {next_version(event_type, contract)} beside v{event_type.rsplit('.v', 1)[1]}: {SECTION}"


def next_version(event_type: str, contract: Contract) -> str:
    """The first version of this event that the contract does not have yet."""
    name, number = event_type.rsplit(".v", 1)
    later = int(number) + 1
    while f"{name}.v{later}" in contract.topics:
        later += 1
    return f"{name}.v{later}"


def check(repository: Path = REPOSITORY, new: Contract | None = None) -> int:
    """Print a line for every check, then what is refused; exit code 1 if anything is, or a release is not whole."""
    contract = new or releases.current()
    try:
        if problems := list(releases.broken(repository, contract)):
            raise Unreleasable("\n".join(problems))
    except Unreleasable as error:
        print(error)
        return 1
    earlier = releases.released(repository)
    refused: list[str] = []
    for one in compare(contract, earlier, releases.history(repository)):
        print(one, flush=True)
        refused += one.told()
    if not earlier:
        print("No release yet in schemas/released: there is nothing to be compatible with.")
    if refused:
        print("", *refused, sep="\n")
    return 1 if refused else 0


def release(repository: Path = REPOSITORY, new: Contract | None = None) -> int:
    """Keep the contract as that of the version in pyproject.toml; exit code 1, and nothing kept, if it is refused."""
    contract = new or releases.current()
    try:
        version = releases.version_of(repository)
        if problems := list(releases.broken(repository, contract, due=version)):
            raise Unreleasable("\n".join(problems))
        checks = compare(contract, releases.released(repository), releases.history(repository))
        if refused := [sentence for one in checks for sentence in one.told()]:
            raise Unreleasable("\n".join(refused))
        folder = releases.release(contract, version, repository)
    except Unreleasable as error:
        print(error)
        return 1
    print(f"schemas/released/{folder.name} holds the contract; it never changes")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Exit code 2 for an argument that is not known."""
    if not arguments:
        return check()
    if list(arguments) == ["release"]:
        return release()
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
