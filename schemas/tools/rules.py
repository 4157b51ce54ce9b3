"""Whether every document that one schema takes another takes too, shown from their text.

Over the vocabulary that `json_schema.py` emits, and sound: what cannot be shown is a misfit. jsonschema-rs decides the
same (`covers`) but says neither where nor why, and is at a loss where a traceparent must have no U+0000; the tests hold
the two against each other.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import jsonschema_rs

from schemas.events import NO_NUL
from schemas.tools.json_schema import Schema

TYPES: Final = ("null", "boolean", "number", "string", "array", "object")  # every integer is a number
NEVER: Final[Schema] = {"enum": []}
OF_TYPE: Final[Mapping[str, frozenset[str]]] = {
    "integer": frozenset(("minimum", "maximum")),
    "number": frozenset(("minimum", "maximum")),
    "string": frozenset(("pattern", "format", "minLength", "maxLength")),
    "array": frozenset(("items",)),
    "object": frozenset(("properties", "required", "additionalProperties", "patternProperties")),
}
KNOWN: Final = frozenset(("type", "enum", "anyOf")).union(*OF_TYPE.values())
ANNOTATIONS: Final = frozenset(
    ("$schema", "$id", "$defs", "$comment", "title", "description", "default", "examples", "deprecated")
)
LOWER: Final = {"minimum": "below", "minLength": "shorter than"}
UPPER: Final = {"maximum": "above", "maxLength": "longer than"}
PLAIN: Final = re.compile(r"\^(?:[\w:-]|\[[\w-]+\]|\\d|\{\d+(?:,\d*)?\}|[+*?])*\$")
"""A pattern of the whole text, of characters and classes that are named: no text that it takes holds U+0000."""


class Unshown(Exception):
    """The schema is written in a way that is not known here; the text says in which."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """At `path` the writer `does` what the reader does not take: it `takes` something else. Both go on after a name.

    `kind`: what the fix depends on; for "unknown" `does` is a sentence of its own.
    """

    path: str
    does: str
    takes: str = ""
    kind: Literal["value", "required", "gone", "unknown"] = "value"

    def told(self, writer: str, reader: str) -> str:
        """As a sentence about these two."""
        return self.does if self.kind == "unknown" else f"{writer} {self.does}, {reader} {self.takes}"


def inlined(schema: Schema) -> Schema:
    """The same schema alone and plain: no references and annotations; `const` as `enum`, `type` as a list.

    Raises Unshown for references into itself or out of it.
    """
    return _inlined(schema, schema.get("$defs", {}), frozenset())


def _inlined(node: bool | Schema, definitions: Mapping[str, Schema], around: frozenset[str]) -> Schema:
    if isinstance(node, bool):
        return {} if node else NEVER
    constraints = {key: one for key, one in node.items() if key not in ANNOTATIONS and not key.startswith("x-")}
    if "$ref" in constraints:
        name = str(constraints["$ref"]).removeprefix("#/$defs/")
        if name in around or name not in definitions or len(constraints) > 1:
            raise Unshown(f"the reference to `{name}` leads into itself, to nothing, or stands beside other keywords")
        return _inlined(definitions[name], definitions, around | {name})

    plain: Schema = {}
    for key, value in constraints.items():
        if key in ("properties", "patternProperties"):
            plain[key] = {name: _inlined(one, definitions, around) for name, one in value.items()}
        elif key in ("additionalProperties", "items"):
            plain[key] = _inlined(value, definitions, around)
        elif key == "anyOf":
            plain[key] = [_inlined(one, definitions, around) for one in value]
        elif key == "const" and "enum" not in constraints:
            plain["enum"] = [value]
        elif key == "type":
            plain[key] = [value] if isinstance(value, str) else value
        elif key not in KNOWN and '"$' in json.dumps(value):
            raise Unshown(f"`{key}` with a reference in it")
        else:
            plain[key] = value
    return plain


def misfits(writer: Schema, reader: Schema) -> list[Misfit]:
    """Where something that `writer` takes may be refused by `reader`; empty: it is shown that nothing is."""
    try:
        return _compare(inlined(writer), inlined(reader), "$")
    except Unshown as error:
        return [Misfit("$", f"nothing can be shown: {error}", kind="unknown")]


def opened(writer: Schema) -> Schema:
    """What a writer promises those who read it: all of its schema, but fields and listed values may be added."""

    def below(node: bool | Schema) -> bool | Schema:
        return node if isinstance(node, bool) else opened(node)

    wide = {key: one for key, one in writer.items() if key != "enum" or writer.get("type") != "string"}
    for key, one in wide.items():
        if key in ("properties", "patternProperties", "$defs"):
            wide[key] = {name: below(field) for name, field in one.items()}
        elif key in ("additionalProperties", "items"):
            wide[key] = True if one is False and key != "items" else below(one)
        elif key == "anyOf":
            wide[key] = [below(alternative) for alternative in one]
    return wide


def lost(writer: Schema, earlier: Schema) -> list[Misfit]:
    """Fields and listed values that an earlier writer has and this one has no more; `misfits` sees no value of them."""
    try:
        return list(_lost(inlined(writer), inlined(earlier), "$"))
    except Unshown:  # `misfits` says so
        return []


def _lost(writer: Schema, earlier: Schema, path: str) -> Iterator[Misfit]:
    """Of two inlined schemas."""
    mine = [_below(one) for one in _alternatives(writer)]
    for one in _alternatives(earlier):
        if one.get("type") == ["string"]:
            gone = [_text(value) for value in one.get("enum", ()) if not takes(writer, value)]
            if gone:
                yield Misfit(path, f"never writes {', '.join(gone)}", "did, and subscribers may rely on it", "gone")
        for name, field in _below(one).items():
            kept = [below[name] for below in mine if name in below]
            if kept:
                yield from _lost({"anyOf": kept}, field, path + name)
            else:
                yield Misfit(path + name, "has it no more", "had it, and subscribers may rely on it", "gone")


def _below(node: Schema) -> dict[str, Schema]:
    """End of the path -> schema of everything that may be inside."""
    below = {f".{name}": one for name, one in node.get("properties", {}).items()}
    below |= {f".*{pattern}": one for pattern, one in node.get("patternProperties", {}).items()}
    below |= {end: node[key] for end, key in ((".*", "additionalProperties"), ("[*]", "items")) if key in node}
    return {end: one for end, one in below.items() if one != NEVER}


def _compare(writer: Schema, reader: Schema, path: str) -> list[Misfit]:
    """Of two inlined schemas."""
    if _text(writer) == _text(reader):  # not ==, to which 1 is True
        return []
    if "enum" in writer:
        refused = [_text(one) for one in writer["enum"] if takes(writer, one) and not takes(reader, one)]
        return [Misfit(path, f"may write {', '.join(refused)}", _takes(reader))] if refused else []
    if reader == NEVER:
        return [Misfit(path, "may write it", "takes no such field")]
    if set(writer) == {"anyOf"}:
        return [misfit for one in writer["anyOf"] for misfit in _compare(one, reader, path)]

    found: list[Misfit] = []
    refused = []
    for type_ in writer.get("type", TYPES):
        ways = [_of_type(type_, writer, one, path) for one in _alternatives(reader) if _is_of(one, type_)]
        if ways:
            best: list[Misfit] = min(ways, key=len)
            found += best
        else:
            refused.append(type_)
    if refused:
        found.append(Misfit(path, f"may write {' or '.join(refused)}", _takes(reader)))
    return found


def _of_type(type_: str, writer: Schema, reader: Schema, path: str) -> list[Misfit]:
    """Of the values of one type only, which both take."""
    asked = OF_TYPE.get(type_, frozenset())
    strange = ((writer.keys() | reader.keys()) - KNOWN) | ({"anyOf"} & (writer.keys() | reader.keys()))
    if strange:
        names = ", ".join(f"`{name}`" for name in sorted(strange))
        return [Misfit(path, f"{names} is not known to the rules, so nothing is shown", kind="unknown")]
    if "enum" in reader:
        return [Misfit(path, f"may write any {type_}", _takes(reader))]
    if type_ == "object":
        return list(_objects(writer, reader, path))
    if type_ == "array":
        return _compare(writer.get("items", {}), reader.get("items", {}), f"{path}[*]")

    found: list[Misfit] = []
    for key in sorted(asked & reader.keys()):
        mine, theirs = writer.get(key), reader[key]
        if key in LOWER:
            fits = theirs <= (mine if mine is not None else 0 if key == "minLength" else float("-inf"))
        elif key in UPPER:
            fits = mine is not None and mine <= theirs
        else:
            fits = mine == theirs or (key == "pattern" and _within(mine, theirs))
        if not fits:
            how = (LOWER | UPPER).get(key)
            does = f"may write what is {how} {theirs}" if how else f"writes text of {key} {mine or 'none'}"
            shown = "" if how or mine is None else ", and that all of the one is in the other is not shown"
            found.append(Misfit(path, does, f"takes only {key} {theirs}{shown}"))
    return found


def _objects(writer: Schema, reader: Schema, path: str) -> Iterator[Misfit]:
    for name in reader.get("required", ()):
        if name not in writer.get("required", ()):
            yield Misfit(f"{path}.{name}", "may leave it out", "requires it", kind="required")
    for name in dict.fromkeys([*writer.get("properties", {}), *reader.get("properties", {})]):
        yield from _all_fit(given(writer, name), given(reader, name), f"{path}.{name}")
    # Names that neither side lists. Those of a pattern that both sides have are no additional ones.
    patterns = reader.get("patternProperties", {})
    rest = [reader.get("additionalProperties", {})]
    for pattern, schema in writer.get("patternProperties", {}).items():
        asked = [*patterns.values(), *([] if pattern in patterns else rest)]
        yield from _all_fit([schema], asked, f"{path}.*")
    yield from _all_fit([writer.get("additionalProperties", {})], [*patterns.values(), *rest], f"{path}.*")


def _all_fit(written: list[Schema], asked: list[Schema], path: str) -> Iterator[Misfit]:
    """`written` all hold of what is written there, so it is enough that one of them fits each that is `asked`."""
    for one in asked:
        best: list[Misfit] = min((_compare(mine, one, path) for mine in written), key=len)
        yield from best


def given(node: Schema, name: str) -> list[Schema]:
    """The schemas that all hold of the field of this name."""
    named = [node["properties"][name]] if name in node.get("properties", {}) else []
    named += [one for pattern, one in node.get("patternProperties", {}).items() if takes({"pattern": pattern}, name)]
    return named or [node.get("additionalProperties", {})]


def takes(schema: Schema, value: Any) -> bool:
    """Whether this very value is taken."""
    return validator(_text(schema)).is_valid(value)


@cache
def validator(text: str) -> jsonschema_rs.Validator:
    """Of a schema as JSON text; formats count, messages do not repeat values."""
    return jsonschema_rs.Draft202012Validator(json.loads(text), validate_formats=True, mask="it")


def _within(pattern: str | None, wider: str) -> bool:
    """The one inclusion of patterns that the models need."""
    return wider == NO_NUL and pattern is not None and PLAIN.fullmatch(pattern) is not None


def _alternatives(node: Schema) -> list[Schema]:
    if set(node) != {"anyOf"}:
        return [node]
    return [leaf for one in node["anyOf"] for leaf in _alternatives(one)]


def _is_of(node: Schema, type_: str) -> bool:
    types = node.get("type", TYPES)
    return type_ in types or (type_ == "integer" and "number" in types)


def _takes(reader: Schema) -> str:
    """What it takes in a few words."""
    words: list[str] = []
    for one in _alternatives(reader):
        words += [_text(value) for value in one["enum"]] if "enum" in one else one.get("type", ("some values",))
    return f"takes only {' or '.join(words)}"


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
