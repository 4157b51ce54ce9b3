"""Payloads as they stand in a record, for the page: JSON in colours, the wrong line of a bad example marked."""

import re
from html import escape
from typing import Final

from schemas.tools.examples import Bad

_TEXT: Final = r'"(?:[^"\\]|\\.)*"'
_TOKEN: Final = re.compile(rf"(?P<k>{_TEXT}(?=\s*:))|(?P<s>{_TEXT})|(?P<n>-?\b\d[\d.eE+-]*|\b[a-z]+\b)")


def listing(text: str, caption: str = "", schema: str = "", *, wrong: int | None = None) -> str:
    """A block of code. `schema`: what the text is valid against, in `schemas/`; `wrong`: number of a line, from 0."""
    lines = (_coloured(text) if schema else escape(text, quote=False)).rstrip("\n").split("\n")
    if wrong is not None:
        lines[wrong] = f"<mark>{lines[wrong]}</mark>"
    against = f' data-schema="{escape(schema)}"' if schema else ""
    code = f'<pre tabindex="0"><code{against}>' + "\n".join(lines) + "</code></pre>"
    return f"<figure><figcaption>{escape(caption)}</figcaption>{code}</figure>" if caption else code


def _coloured(text: str) -> str:
    """JSON, its names (k), texts (s) and other values (n) told apart for the style sheet."""
    parts = list[str]()
    done = 0
    for token in _TOKEN.finditer(text):
        coloured = f'<i class="{token.lastgroup}">{escape(token[0], quote=False)}</i>'
        parts += [escape(text[done : token.start()], quote=False), coloured]
        done = token.end()
    return "".join([*parts, escape(text[done:], quote=False)])


def wrong_line(bad: Bad, *, is_read: bool) -> int | None:
    """Number from 0 of the line at which a bad example is wrong, None when something is missing. Indented by 2."""
    if found := re.match(r"(line|byte) (\d+)", bad.error):
        before = int(found[2])
        return before - 1 if found[1] == "line" else bad.value[:before].count(b"\n")
    place = bad.error.partition(":")[0] if is_read else bad.at or "$"
    lines, at = bad.value.decode().splitlines(), None
    for depth, name in enumerate(place.split(".")[1:], 1):
        start, after = f'{"  " * depth}"{name}":', -1 if at is None else at
        at = next((number for number, line in enumerate(lines) if number > after and line.startswith(start)), None)
        if at is None:
            return None
    return at
