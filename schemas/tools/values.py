"""Values that a schema takes, made up from its text, and which of them another schema refuses.

A few hundred values prove nothing by themselves; they are there to catch a rule that is wrong.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from typing import Any, Final
from uuid import UUID

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from schemas.tools import rules
from schemas.tools.json_schema import Schema
from schemas.tools.rules import KNOWN, NEVER, TYPES, Unshown, inlined

COUNT: Final = 200  # of each writer's schema; an optional field, a bound, a value of a list is met in the first dozens
SHOWN: Final = 160  # characters of a counterexample

Strategy = st.SearchStrategy[Any]  # Any: JSON

_SCALARS: Final[Strategy] = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
_ANY: Final[Strategy] = st.recursive(
    _SCALARS,
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=4), below, max_size=2),
    max_leaves=4,
)
_FORMATS: Final[Mapping[str, tuple[Strategy, Any, tuple[Callable[[Any], str], ...]]]] = {
    # what is drawn, one of them, and how it may be written
    "date-time": (
        st.datetimes(),
        datetime(2026, 4, 22, 11, 30, 0, 250_000),  # its zone is in the text
        (
            lambda moment: moment.isoformat(timespec="seconds") + "Z",
            lambda moment: moment.isoformat(timespec="microseconds") + "Z",
            lambda moment: moment.isoformat(timespec="milliseconds") + "+05:30",
        ),
    ),
    "uuid": (st.uuids(), UUID(int=10), (str, lambda one: str(one).upper())),
    "uri": (st.uuids(), UUID(int=10), (lambda one: f"urn:uuid:{one}", lambda one: f"https://example.com/{one.hex}#x")),
}


def tried(writer: Schema, reader: Schema, count: int = COUNT) -> tuple[int, str | None]:
    """How many values were made up for the writer, and the smallest that the reader refuses, cut short, and why.

    Raises Unshown when nothing right can be made up.
    """
    made = written(json.dumps(writer), count)
    validator = rules.validator(json.dumps(reader))
    refused = [one for one in made if not validator.is_valid(one)]
    if not refused:
        return len(made), None
    smallest = min(refused, key=lambda one: len(json.dumps(one)))
    error = next(validator.iter_errors(smallest))
    at = smallest
    for part in error.instance_path:
        at = at[part]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
    shown = json.dumps(at, ensure_ascii=False)
    shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
    return len(made), f"${where} = {shown}: {error.message}"


@cache
def written(schema: str, count: int) -> tuple[Any, ...]:
    """Up to `count` values of the schema in this JSON text, always the same; none that it refuses itself.

    Raises Unshown for a schema of which none can be made up, or only wrong ones.
    """
    made: list[Any] = []

    # Suppressed: nobody waits for this, and it may run inside a test that draws too.
    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy(inlined(json.loads(schema))))
    def collect(value: Any) -> None:
        made.append(value)

    with suppress(Unsatisfiable):  # then there are none
        collect()
    if not made:
        raise Unshown("no value of it could be made up")
    wrong = [one for one in made if not rules.validator(schema).is_valid(one)]
    if wrong:
        raise Unshown(f"{len(wrong)} of {len(made)} values made up from it are wrong; correct schemas/tools/values.py")
    return tuple(made)


def strategy(node: Schema) -> Strategy:
    """Values of an inlined schema. Raises Unshown for a keyword that is not known here."""
    if strange := node.keys() - KNOWN:
        raise Unshown(f"no values can be made up for {', '.join(f'`{name}`' for name in sorted(strange))}")
    if "enum" in node:
        return st.sampled_from(node["enum"]) if node["enum"] else st.nothing()
    if "anyOf" in node:
        return st.one_of([strategy(one) for one in node["anyOf"]])
    if not node:
        return _ANY
    return st.one_of([_STRATEGIES[one](node) for one in node.get("type", TYPES)])


def _integers(node: Schema) -> Strategy:
    low, high = node.get("minimum"), node.get("maximum")
    edges = [one for one in (low, high) if one is not None]
    return st.one_of(st.integers(low, high), *(st.just(one) for one in edges))  # an edge is where a change shows


def _numbers(node: Schema) -> Strategy:
    low, high = node.get("minimum"), node.get("maximum")
    return _integers(node) | st.floats(low, high, allow_nan=False, allow_infinity=False)


def _texts(node: Schema) -> Strategy:
    pattern, shortest, longest = node.get("pattern"), node.get("minLength", 0), node.get("maxLength")
    if "format" in node:
        if node["format"] not in _FORMATS:
            raise Unshown(f"no values can be made up for the format `{node['format']}`")
        drawn, one, ways = _FORMATS[node["format"]]
        fitting = [way for way in ways if pattern is None or re.search(pattern, way(one))]
        texts: Strategy = st.one_of([drawn.map(way) for way in fitting])
    elif pattern is not None:
        texts = st.from_regex(re.sub(r"(?<!\\)\$$", r"\\Z", pattern))  # to Python $ also stands before a last newline
    else:
        return st.text(min_size=shortest, max_size=longest)
    return texts.filter(lambda text: len(text) >= shortest and (longest is None or len(text) <= longest))


def _objects(node: Schema) -> Strategy:
    named, required = node.get("properties", {}), node.get("required", ())
    fields = {name: _field(node, name) for name in dict.fromkeys([*named, *required])}
    whole = st.fixed_dictionaries(
        {name: fields[name] for name in required},
        optional={name: one for name, one in fields.items() if name not in required},
    )
    patterns: Mapping[str, Schema] = node.get("patternProperties", {})
    further: list[Strategy] = [
        st.dictionaries(_texts({"pattern": pattern}).filter(lambda name: name not in fields), strategy(one), max_size=2)
        for pattern, one in patterns.items()
    ]
    additional = node.get("additionalProperties", {})
    if additional != NEVER:
        free = st.text(max_size=8).filter(
            lambda name: name not in fields and not any(rules.takes({"pattern": one}, name) for one in patterns)
        )
        further.append(st.dictionaries(free, strategy(additional), max_size=2))
    return st.tuples(whole, *further).map(lambda parts: {name: one for part in parts for name, one in part.items()})


def _field(node: Schema, name: str) -> Strategy:
    """What all schemas of this field take: made up from the first, the rest are asked."""
    first, *rest = rules.given(node, name)
    return (
        strategy(first).filter(lambda value: all(rules.takes(one, value) for one in rest)) if rest else strategy(first)
    )


_STRATEGIES: Final[Mapping[str, Callable[[Schema], Strategy]]] = {
    "null": lambda _: st.none(),
    "boolean": lambda _: st.booleans(),
    "integer": _integers,
    "number": _numbers,
    "string": _texts,
    "array": lambda node: st.lists(strategy(node.get("items", {})), max_size=3),
    "object": _objects,
}
