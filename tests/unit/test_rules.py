"""The rules are sound: of random pairs of schemas neither a value nor jsonschema-rs contradicts what they let pass.

And what a writer promises is what it had: its fields, its listed values, and more of both.
"""

from collections.abc import Iterator
from copy import deepcopy
from random import Random
from typing import Any

import jsonschema_rs
import pytest

from schemas.tools import rules, values
from schemas.tools.json_schema import Schema

NAMES = ["a", "b", "c1"]
NAME_PATTERNS = ["^[ab]$", "^[a-z][0-9]$"]
SCALARS = ["x", "yy", 0, 1, True, None, 1.5]
TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"]


def some_schema(random: Random, depth: int = 2) -> Schema:
    """Any schema of the vocabulary, its bounds never crossed."""
    kind = random.choice([*TYPES, *TYPES, *["object"] * 5, "enum", "const", "nothing", "anyOf", "two types"])
    if kind == "enum":
        return {"enum": random.sample(SCALARS, random.randint(1, 3))}
    if kind == "const":
        return {"const": random.choice(SCALARS)}
    if kind == "nothing" or (kind in ("anyOf", "array", "object") and depth == 0):
        return {}
    if kind == "anyOf":
        return {"anyOf": [some_schema(random, depth - 1) for _ in range(random.randint(1, 3))]}
    if kind == "two types":
        first, second = random.sample(["null", "boolean", "integer", "string"], 2)
        return {"type": [first, second], **some_keywords(random, first, 0), **some_keywords(random, second, 0)}
    return {"type": kind, **some_keywords(random, kind, depth)}


def some_keywords(random: Random, type_: str, depth: int) -> Schema:
    """Keywords of this type, each as likely to be there as not."""
    all_: dict[str, Any] = {}
    if type_ in ("integer", "number"):
        all_ = {"minimum": random.randint(-2, 0), "maximum": random.randint(1, 3)}
    if type_ == "string":
        all_ = random.choice(
            [
                {"minLength": random.randint(0, 2), "maxLength": random.randint(2, 4)},
                {"pattern": random.choice(["^[^\\u0000]*$", "^[a-z]+$", "^[0-9a-f]{2}-x$"])},
                {"format": random.choice(["uuid", "date-time", "uri"])},
            ]
        )
    if type_ == "array":
        all_ = {"items": some_schema(random, depth - 1)}
    if type_ == "object":
        all_ = {
            "properties": {name: some_schema(random, depth - 1) for name in random.sample(NAMES, random.randint(1, 3))},
            "required": random.sample(NAMES, random.randint(1, 2)),
            "additionalProperties": random.choice([True, False, some_schema(random, depth - 1)]),
            "patternProperties": {random.choice(NAME_PATTERNS): some_schema(random, depth - 1)},
        }
    return {key: one for key, one in all_.items() if random.random() < 0.5}


def changed(random: Random, schema: Schema) -> Schema:
    """The schema loosened, tightened or replaced at one place, maybe deep inside."""
    whole = deepcopy(schema)
    below: list[tuple[Any, Any]] = []  # what holds a schema, and the key of it there
    below += [(whole, key) for key in ("additionalProperties", "items") if isinstance(whole.get(key), dict)]
    below += [(whole[key], name) for key in ("properties", "patternProperties") for name in whole.get(key, ())]
    below += [(whole["anyOf"], number) for number in range(len(whole.get("anyOf", ())))]
    if below and random.random() < 0.6:
        holder, key = random.choice(below)
        holder[key] = changed(random, holder[key])
        return whole
    how = random.choice(["keyword", "keyword", "less", "more", "other", "same"])
    types = whole.get("type", [])
    if how == "keyword" and types:
        return whole | some_keywords(random, types if isinstance(types, str) else types[0], 1)
    if how == "less" and whole:
        del whole[random.choice(sorted(whole))]
    if how == "more":
        return {"anyOf": [some_schema(random, 0), whole]}
    return some_schema(random) if how == "other" else whole


def search_for_a_lie(pairs: int) -> list[bool]:
    """Of each pair whether the rules say that it fits; AssertionError when a value or jsonschema-rs contradicts."""
    said = []
    for seed in range(pairs):
        random = Random(seed)
        writer = some_schema(random)
        reader = changed(random, writer)
        said.append(not rules.misfits(writer, reader))
        if said[-1]:
            one, other = (jsonschema_rs.canonicalize(schema, validate_formats=True) for schema in (writer, reader))
            assert other.covers(one) is not jsonschema_rs.canonical.Containment.NO, (writer, reader)
            if one.satisfiability() is not jsonschema_rs.canonical.Satisfiability.NO:
                _, refused = values.tried(writer, reader, 20)
                assert refused is None, (writer, reader, refused)
    return said


def test_what_the_rules_let_pass_nothing_contradicts() -> None:
    said = search_for_a_lie(300)
    assert min(said.count(True), said.count(False)) > 75  # else little was shown


@pytest.mark.parametrize("blind_to", ["minimum", "maxLength", "pattern", "format"])
def test_rules_without_a_keyword_are_caught_in_a_lie(blind_to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = {type_: keywords - {blind_to} for type_, keywords in rules.OF_TYPE.items()}
    monkeypatch.setattr(rules, "OF_TYPE", blind)
    with pytest.raises(AssertionError):
        search_for_a_lie(900)


def test_rules_that_know_no_required_fields_are_caught_in_a_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rules._objects

    def blind(writer: Schema, reader: Schema, path: str) -> Iterator[rules.Misfit]:
        return objects(writer, reader | {"required": []}, path)

    monkeypatch.setattr(rules, "_objects", blind)
    with pytest.raises(AssertionError):
        search_for_a_lie(900)


def satisfiable(schema: Schema) -> bool:
    """Whether it takes any value; also where that is not known."""
    canonical = jsonschema_rs.canonicalize(schema, validate_formats=True)
    return canonical.satisfiability() is not jsonschema_rs.canonical.Satisfiability.NO


def test_a_writer_keeps_its_own_promise() -> None:
    for seed in range(200):
        schema = some_schema(Random(seed))
        assert rules.lost(schema, schema) == []
        if satisfiable(schema):
            _, refused = values.tried(schema, rules.opened(schema), 20)
            assert refused is None, (schema, refused)


LISTED = {"type": "string", "enum": ["a", "b"]}
WRITER: Schema = {
    "$defs": {"Inner": {"type": "object", "properties": {"type": LISTED}, "additionalProperties": False}},
    "type": "object",
    "properties": {
        "enum": {"$ref": "#/$defs/Inner"},
        "type": {"const": "x", "type": "string"},
        "list": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/Inner"}, {"type": "null"}]}},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
    },
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("written", "is_promised"),
    [
        ({"new": 1}, True),
        ({"enum": {"type": "c", "new": 1}}, True),
        ({"list": [{"type": "c"}, None]}, True),
        ({"enum": {"type": 1}}, False),
        ({"type": "y"}, False),
        ({"list": [1]}, False),
        ({"counts": {"a": "many"}}, False),
    ],
)
def test_a_promise_lets_fields_and_listed_values_be_added_and_nothing_else(written: Schema, is_promised: bool) -> None:
    assert rules.takes(rules.opened(WRITER), written) is is_promised
    assert not is_promised or not rules.takes(WRITER, written)


def without(*path: str | int) -> Schema:
    """The writer without what is there."""
    writer = deepcopy(WRITER)
    node: Any = writer
    for part in path[:-1]:
        node = node[part]
    del node[path[-1]]
    return writer


@pytest.mark.parametrize(
    ("writer", "paths"),
    [
        (WRITER, []),
        (without("properties", "counts"), ["$.counts"]),
        (without("properties", "counts", "additionalProperties"), ["$.counts.*"]),
        (without("$defs", "Inner", "properties", "type"), ["$.enum.type", "$.list[*].type"]),
        (without("$defs", "Inner", "properties", "type", "enum", 0), ["$.enum.type", "$.list[*].type"]),
        (without("$defs", "Inner", "properties", "type", "enum"), []),  # any text is more values
        (without("properties", "list", "items", "anyOf", 1), []),  # null is no field
        (without("$defs", "Inner"), []),  # nothing is known, and `misfits` says so
    ],
)
def test_fields_and_listed_values_that_go_are_found_wherever_they_are(writer: Schema, paths: list[str]) -> None:
    assert [one.path for one in rules.lost(writer, WRITER)] == paths
    assert {one.kind for one in rules.lost(writer, WRITER)} <= {"gone"}
