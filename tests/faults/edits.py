"""Ways to break the service on purpose: by replacing text in its code.

Text that is not there exactly once is an error, so no breakage outlives the code it breaks.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from types import FunctionType

from consumer.database import pool, transaction


@dataclass(frozen=True, slots=True)
class Edit:
    """In `place`, `old` becomes `new`.

    A place: `module:qualified.name` of a function, `name.sql`, or `function(types)` of one in the database.
    """

    place: str
    old: str
    new: str

    def of(self, text: str) -> str:
        """The edited text."""
        if text.count(self.old) != 1:
            raise AssertionError(f"{self.place} does not hold once: {self.old}")
        return text.replace(self.old, self.new)


def is_in_this_process(edit: Edit) -> bool:
    """Whether it is code or a statement of ours, not a function in the database."""
    return ":" in edit.place or edit.place.endswith(".sql")


@contextmanager
def broken(edits: Sequence[Edit]) -> Iterator[None]:
    """The service in this process is broken inside, and whole again afterwards."""
    with ExitStack() as undo:
        for place in dict.fromkeys(edit.place for edit in edits):
            here = [edit for edit in edits if edit.place == place]
            undo.enter_context(_function(place, here) if ":" in place else _statement(place, here))
        yield


def _edited(text: str, edits: Sequence[Edit]) -> str:
    return reduce(lambda so_far, edit: edit.of(so_far), edits, text)


@contextmanager
def _function(place: str, edits: Sequence[Edit]) -> Iterator[None]:
    """The code inside the function changes, so that everybody who imported it has the broken one."""
    module_name, _, path = place.partition(":")
    module = sys.modules[module_name]
    found: object = reduce(getattr, path.split("."), module)
    function = inspect.unwrap(found) if callable(found) else found
    assert isinstance(function, FunctionType)
    made: dict[str, object] = {}
    source = textwrap.dedent(inspect.getsource(function))
    code = compile(_edited(source, edits), f"<broken {path}>", "exec")
    exec(code, vars(module), made)
    changed = made[path.rpartition(".")[2]]
    changed = inspect.unwrap(changed) if callable(changed) else changed
    assert isinstance(changed, FunctionType)
    whole, function.__code__ = function.__code__, changed.__code__
    try:
        yield
    finally:
        function.__code__ = whole


@contextmanager
def _statement(place: str, edits: Sequence[Edit]) -> Iterator[None]:
    whole, name = vars(transaction)["statement"], place.removesuffix(".sql")
    changed = _edited(whole(name), edits)

    def read_as(statement: object) -> None:
        for module in (pool, transaction):
            setattr(module, "statement", statement)  # noqa: B010  # cached

    read_as(lambda wanted: changed if wanted == name else whole(wanted))
    try:
        yield
    finally:
        read_as(whole)
