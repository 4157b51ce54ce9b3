"""The parts of `schemas/README.md` that come from the catalogue and the closed lists, between their markers."""

import re
from typing import Final

from schemas.catalogue import CHANNELS, DEAD_LETTER_HEADERS, DEAD_LETTER_RETENTION, UNKNOWN_VALUES
from schemas.events import DeadLetterReason, Listed, PauseReason, RejectionReason, Trigger
from schemas.tools import examples
from schemas.topics import DEAD_LETTERS

LISTS: Final[tuple[tuple[str, type[Listed]], ...]] = (
    ("`trigger` of a stats_updated, the first that applies", Trigger),
    ("`reason` of a sync_rejected", RejectionReason),
    ("`reason` of a paused", PauseReason),
    ("`dead-letter-reason`, the first that applies", DeadLetterReason),
)


def render(text: str) -> str:
    """The README with its generated parts renewed. Raises ValueError when a marker is missing."""
    for name, part in (("catalogue", _catalogue()), ("lists", _lists()), ("dead-letters", _dead_letters())):
        pattern = re.compile(rf"(<!-- {name}: written by `make schemas` -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, part=part: match[1] + part + match[2], text)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"schemas/README.md: the markers of {name} are missing or doubled")
    return text


def _catalogue() -> str:
    lines = ["| type | topic | who writes | what it says |", "|---|---|---|---|"]
    lines += [
        f"| [`{one.type}`](#{_anchor(one.type)}) | `{one.topic}` | {one.written_by} | {one.summary} |"
        for one in CHANNELS
    ]
    lines.append(
        f"| [dead letter](#dead-letters) | `{DEAD_LETTERS}` | the service | What could not be read, and why. |"
    )
    for one in CHANNELS:
        shown = ", ".join(f"[{name}](examples/{one.type}/good/{name}.json)" for name in examples.good(one.type))
        lines += [
            "",
            f"### {one.type}",
            one.summary,
            "",
            f"- **You**: {one.action}",
            "- **Key**: the campaign's id, lower case.",
            f"- **Promised**: {' '.join(one.promises)}",
            f"- **Order**: {one.ordering}",
            f"- **Kept**: {one.retention}",
            f"- **Examples**: {shown}; wrong ones, each with its reason: [bad.json](examples/bad.json).",
        ]
    return "\n".join(lines) + "\n"


def _anchor(heading: str) -> str:
    return heading.replace(".", "")


def _lists() -> str:
    lines: list[str] = []
    for title, values in LISTS:
        lines += [f"{title}:", "", *(f"- `{value}`: {value.meaning}" for value in values)]
        lines += [f"- any other: {UNKNOWN_VALUES[values]}", ""]
    return "\n".join(lines)


def _dead_letters() -> str:
    lines = [
        *(f"- `{name}`: {text}" for name, text in DEAD_LETTER_HEADERS.items()),
        "",
        f"Kept {DEAD_LETTER_RETENTION}",
    ]
    return "\n".join(lines) + "\n"
