"""The limits that SECURITY.md names are those of the code."""

from importlib import import_module

import pytest

from tests.documents import rows_under
from tests.servers import REPOSITORY

LIMITS = rows_under("| what | constant | value |", REPOSITORY / "SECURITY.md")


@pytest.mark.parametrize(("constant", "value"), [row[1:] for row in LIMITS], ids=[row[1] for row in LIMITS])
def test_a_limit_is_as_documented(constant: str, value: str) -> None:
    module, _, name = constant.rpartition(".")
    assert getattr(import_module(module), name) == float(value)
