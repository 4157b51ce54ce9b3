"""`make schemas`: writes every generated document; with --check only says which differ from what is checked in."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import orjson

from schemas.tools import json_schema

SCHEMAS: Final = Path(__file__).resolve().parents[1]


def generated() -> Iterator[tuple[str, str]]:
    """Path below `schemas/` and text of every generated document."""
    for name, schema in json_schema.documents():
        yield f"json/{name}", orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode() + "\n"


def main() -> int:
    """Write the documents and remove those that are no longer generated; exit code 1 if --check finds a difference."""
    differing: list[str] = []
    written = dict(generated())
    for name, text in written.items():
        path = SCHEMAS / name
        if not path.exists() or path.read_text() != text:
            differing.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    for path in SCHEMAS.glob("json/*"):
        name = str(path.relative_to(SCHEMAS))
        if name not in written:
            differing.append(name)
            if "--check" not in sys.argv:
                path.unlink()
    for name in differing:
        print(f"{'differs' if '--check' in sys.argv else 'written'} schemas/{name}")
    return 1 if differing and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
