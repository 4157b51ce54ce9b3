"""A JSON Schema as a table for people: each field with its type in words, whether it is always there, its meaning."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

import orjson

from schemas.events import ANY_ID_PATTERN, CAMPAIGN_ID_PATTERN, TRACEPARENT_PATTERN, Listed
from schemas.tools.json_schema import Schema
from schemas.tools.markdown import inline
from schemas.tools.readme import LISTS

PATTERNS: Final[Mapping[str, str]] = {
    rf"^{CAMPAIGN_ID_PATTERN}$": "campaign id: a UUID of RFC 9562",
    rf"^{ANY_ID_PATTERN}$": "id: 8-4-4-4-12 hex",
    TRACEPARENT_PATTERN: "text of W3C Trace Context",
}
FORMATS: Final[Mapping[str, str]] = {
    "uuid": "UUID in lower case",
    "date-time": "RFC 3339 time",
    "uri": "URI",
}


def anchor_of(values: type[Listed]) -> str:
    """Where the page has a closed list: DeadLetterReason -> dead-letter-reason."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", values.__name__).lower()


ANCHORS: Final = {tuple(str(one) for one in values): anchor_of(values) for _, values in LISTS}


@dataclass(frozen=True, slots=True)
class Row:
    """One field. `path`: with the names of the objects around it, `[]` behind a list's; `words`: its type, HTML."""

    path: str
    words: str
    is_always: bool
    meaning: str


def rows(schema: Schema, *, into: bool = True) -> Iterator[Row]:
    """Every field in order, those of an object below it, unless it is not gone `into`."""
    yield from _below(schema, schema.get("$defs", {}), "", into)


def _below(node: Schema, defs: Mapping[str, Schema], above: str, into: bool) -> Iterator[Row]:
    for name, field in node.get("properties", {}).items():
        items = field.get("items", {})
        inner = defs.get(str(items.get("$ref") or field.get("$ref")).rpartition("/")[2], {})
        path = f"{above}{name}"
        yield Row(path, _words(field), name in node.get("required", ()), _meaning(field, inner))
        if into:
            yield from _below(inner, defs, f"{path}[]." if items else f"{path}.", into)


def _meaning(field: Schema, inner: Schema) -> str:
    """What the field says, and what its object says besides."""
    own, general = str(field.get("description", "")), str(inner.get("description", ""))
    return general if general.startswith(own.rstrip(".")) else f"{own} {general}".strip()


def _words(field: Schema) -> str:
    """A type as HTML."""
    if "const" in field:
        return f"always {_code(field['const'])}"
    if "enum" in field:
        anchor = ANCHORS.get(tuple(field["enum"]))
        listed = ", ".join(_code(value) for value in field["enum"])
        return f'<a href="#{escape(anchor)}">one of a list</a>: {listed}' if anchor else f"one of {listed}"
    if "anyOf" in field:
        return " or ".join(_words(one) for one in field["anyOf"])
    if "$ref" in field:
        return "object"
    match field.get("type"):
        case "string":
            known = PATTERNS.get(field.get("pattern", "")) or FORMATS.get(field.get("format", ""))
            if known and str(field.get("pattern", "")).endswith("Z$"):
                known += " in UTC"
            return escape(known or ("text, not empty" if field.get("minLength") else "text"))
        case "integer":
            return "integer, 0 or more" if field.get("minimum") == 0 else "integer"
        case "boolean":
            return "boolean"
        case "object":
            values = field.get("additionalProperties")
            return f"object: name to {_words(values)}" if isinstance(values, dict) else "object"
        case "array":
            return f"list: {_words(field['items'])}"
        case "null":
            return "null"
        case _:
            return "any JSON"


def _code(value: object) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return f"<code>{escape(text, quote=False)}</code>"


def fields_table(label: str, anchor: str, fields: Iterable[Row]) -> str:
    """Each field under the anchor `<anchor>-<path>`."""
    return table(
        "fields",
        label,
        ("Field", "Type", "Present", "Meaning"),
        [(f"{anchor}-{row.path.replace('[]', '')}", _cells(row)) for row in fields],
    )


def _cells(row: Row) -> tuple[str, ...]:
    above, dot, name = row.path.rpartition(".")
    around = f'<span class="above">{escape(above + dot)}</span><wbr>' if above else ""
    present = "always" if row.is_always else '<span class="maybe">may be absent</span>'
    return f"<code>{around}{escape(name)}</code>", row.words, present, inline(row.meaning)


def table(kind: str, label: str, heads: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """`lines`: anchor and cells, HTML. The first cell heads its row and links to it, if it is no link yet.

    `kind`: what the style sheet knows it by. On a phone each row is a card.
    """
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heads)
    body = ""
    for at, (first, *rest) in lines:
        linked = first if first.startswith("<a ") else f'<a href="#{escape(at)}">{first}</a>'
        named = zip(heads[1:], rest, strict=True)
        cells = "".join(f'<td data-label="{escape(name)}">{cell}</td>' for name, cell in named)
        body += f'<tr id="{escape(at)}"><th scope="row">{linked}</th>{cells}</tr>\n'
    return f"""<table class="{kind}" aria-label="{escape(label)}">
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>"""
