"""`make schemas`: writes every generated document; with --check only says which differ from what is checked in."""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import orjson
import yaml

from schemas.tools import asyncapi, json_schema, openapi, page, readme

SCHEMAS: Final = Path(__file__).resolve().parents[1]
BY_HAND: Final = "# Written by `make schemas` from the models in schemas/; do not edit.\n"


class _Yaml(yaml.SafeDumper):
    """Without anchors, and with paragraphs as people write them."""

    def ignore_aliases(self, data: object) -> bool:
        """Always: a repeated part is written out."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Yaml.add_representer(str, _text)


def contract_version() -> str:
    """The version in pyproject.toml."""
    return str(tomllib.loads((SCHEMAS.parent / "pyproject.toml").read_text())["project"]["version"])


def to_yaml(document: object) -> str:
    """Keys in the order given."""
    text = yaml.dump(document, Dumper=_Yaml, sort_keys=False, allow_unicode=True, width=120)
    return BY_HAND + text


def generated() -> Iterator[tuple[str, str]]:
    """Path below `schemas/` and text of every generated document."""
    for name, schema in json_schema.documents():
        yield f"json/{name}", orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode() + "\n"
    version = contract_version()
    yield "asyncapi.yaml", to_yaml(asyncapi.document(version))
    yield "openapi.yaml", to_yaml(openapi.document(version))
    yield "README.md", readme.render((SCHEMAS / "README.md").read_text())
    yield "index.html", page.render(version)


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
