"""`make compat`: whether what neighbours rely on still holds, against every release, by rules and by values.

FORWARD: what the new writer writes a reader of the release takes. BACKWARD: what was written by the release the new
reader takes. Both are demanded for every event type, as whole event and as data; and a writer fits its own reader.
`release` as argument: keep the contract as that of the version in pyproject.toml, if it passes.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from schemas.tools import releases, rules, values
from schemas.tools.json_schema import Form
from schemas.tools.releases import FORMS, REPOSITORY, Contract, Release, Unreleasable

SECTION: Final = 'schemas/README.md, "A new version"'


class Direction(StrEnum):
    """Who reads whom."""

    FORWARD = "FORWARD"
    BACKWARD = "BACKWARD"
    ITSELF = "ITSELF"


ADVICE: Final = {
    Direction.FORWARD: "let the model write no more than before",
    Direction.BACKWARD: "let the model take what it took before",
    Direction.ITSELF: "let the reader's side take it (`x-writer` may only narrow)",
}
ADVICE_REQUIRED: Final = {
    Direction.FORWARD: "keep it required in the model",
    Direction.BACKWARD: "make it optional in the model",
    Direction.ITSELF: "let both sides of the model have it required",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a change broke, at which JSON path (or what of its topic), and how it can be made all the same."""

    path: str
    broke: str
    fix: str


@dataclass(frozen=True, slots=True)
class Check:
    """One event type, one form or its topic, one direction, one release.

    `tried`: how many values; `example`: the smallest of them that was refused.
    """

    event_type: str
    form: Form | Literal["topic"]
    direction: Direction
    since: str | None
    refusals: Sequence[Refusal]
    tried: int = 0
    example: str | None = None

    @property
    def about(self) -> str:
        """`campaign.paused.v1 event FORWARD since 0.1.0`."""
        return f"{self.event_type} {self.form} {self.direction}" + (f" since {self.since}" if self.since else "")

    def __str__(self) -> str:
        how = "names" if self.form == "topic" else f"rules, {self.tried} values"
        return f"{'refused' if self.refusals else 'ok':<8}{self.about}  {how}"

    def told(self) -> Iterator[str]:
        """Every refusal as a sentence with its fix."""
        for one in self.refusals:
            yield f"{self.about}: {one.path}: {one.broke}. Fix: {one.fix}."
        if self.refusals and self.example:
            yield f"  for example {self.example}"


def compare(
    new: Contract, earlier: Sequence[Contract], history: Sequence[Release] = (), count: int = values.COUNT
) -> Iterator[Check]:
    """Every check of a contract, with `count` values each. `history`: CHANGELOG.md, of event types that are to end."""
    for event_type in new.topics:
        yield _topic_of_its_own(event_type, new)
        for form in FORMS:
            yield _read(event_type, form, Direction.ITSELF, new, new, new, count)
    for old in earlier:
        for event_type in old.topics:
            yield _same_topic(event_type, old, new, history)
            if event_type in new.topics:
                for form in FORMS:
                    yield _read(event_type, form, Direction.FORWARD, new, old, new, count)
                    yield _read(event_type, form, Direction.BACKWARD, old, new, new, count)


def _read(
    event_type: str, form: Form, direction: Direction, writer: Contract, reader: Contract, new: Contract, count: int
) -> Check:
    """Whether the one reads what the other writes; one of the two is `new`."""
    schemas = writer.schema(event_type, form, "writer"), reader.schema(event_type, form, "reader")
    names = f"{_name(writer)} writer", f"{_name(reader)} reader"
    advice = {
        "required": f"{ADVICE_REQUIRED[direction]}, or {_beside(event_type, new)}",
        "value": f"{ADVICE[direction]}, or {_beside(event_type, new)}",
        "unknown": "teach it to schemas/tools/rules.py, or leave it out of the model",
    }
    refusals = [Refusal(one.path, one.told(*names), advice[one.kind]) for one in rules.misfits(*schemas)]
    tried, example = 0, None
    try:
        tried, example = values.tried(*schemas, count)
    except rules.Unshown as error:
        broke = f"no values of {names[0]} can be tried: {error}"
        refusals.append(Refusal("$", broke, "teach it to schemas/tools/values.py, or leave it out of the model"))
    if example and not refusals:
        broke = f"by the rules {names[1]} takes all that {names[0]} writes, and yet it refuses one value"
        refusals.append(Refusal("$", broke, "correct schemas/tools/rules.py"))
    return Check(event_type, form, direction, writer.version or reader.version, refusals, tried, example)


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
    refusals = []
    if event_type in new.topics:
        for what in ("topic", "written_by"):
            before, now = old.topics[event_type][what], new.topics[event_type][what]
            if before != now:
                broke = f"it was `{before}` in {old.version} and is `{now}` now"
                refusals.append(Refusal(what, broke, f"leave it `{before}`, or {_beside(event_type, new)}"))
    elif why := releases.why_not_ended(event_type, history):
        broke = f"the event type is gone, neighbours of {old.version} still have it; {why}"
        refusals.append(Refusal("type", broke, f"keep it beside the new version: {SECTION}"))
    return Check(event_type, "topic", Direction.FORWARD, old.version, refusals)


def _name(contract: Contract) -> str:
    return f"the {contract.version}" if contract.version else "the new"


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
    try:
        history = releases.changelog(repository)
        if problems := list(releases.broken(repository)):
            raise Unreleasable("\n".join(problems))
    except Unreleasable as error:
        print(error)
        return 1
    earlier = releases.released(repository)
    refused: list[str] = []
    for one in compare(new or releases.current(), earlier, history):
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
        checks = list(compare(contract, releases.released(repository), releases.changelog(repository)))
        if refused := [sentence for one in checks for sentence in one.told()]:
            raise Unreleasable("\n".join(refused))
        folder = releases.release(contract, releases.version_of(repository), repository)
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
