"""The little Markdown that README.md and CHANGELOG.md use, as HTML: headings, paragraphs, lists, fences, inline marks.

Everything is escaped. A link to another host becomes text with its address: the page refers to nothing outside.
"""

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Final

FENCE: Final = "```"
_INLINE: Final = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<bold>.+?)\*\*|\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


def inline(text: str) -> str:
    """Text without blocks."""
    parts: list[str] = []
    done = 0
    for match in _INLINE.finditer(text):
        parts += [escape(text[done : match.start()], quote=False), _mark(match)]
        done = match.end()
    return "".join([*parts, escape(text[done:], quote=False)])


def _mark(match: re.Match[str]) -> str:
    if match["code"]:
        return f"<code>{escape(match['code'], quote=False)}</code>"
    if match["bold"]:
        return f"<strong>{inline(match['bold'])}</strong>"
    if not re.fullmatch(r"#?[\w./-]+(#[\w.-]+)?", match["target"]):
        return f"{inline(match['text'])} ({escape(match['target'], quote=False)})"
    return f'<a href="{escape(match["target"])}">{inline(match["text"])}</a>'


def heading(level: int, at: str, html: str) -> str:
    """A heading that links to itself."""
    return f'<h{level} id="{escape(at)}"><a href="#{escape(at)}">{html}</a></h{level}>'


def slug(text: str) -> str:
    """An anchor for a heading: its words joined by dashes; a version has its dots and leaves out its date."""
    return re.sub(r"[^a-z0-9.]+", "-", text.partition(" - ")[0].lower()).strip("-")


def section(text: str, title: str) -> str:
    """What stands below the second-level heading `title`, up to its first generated part. ValueError: there is none."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |^<!-- |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"there is no section {title!r}")
    return found[1].strip()


def blocks(text: str, anchor: str) -> str:
    """Whole sections, headings one level deeper; the id of a heading is `anchor`, the headings above it and its own."""
    parts: list[str] = []
    above: list[str] = []
    for mark, group in groupby(_blocks(text), key=lambda block: block[0]):
        texts = [one for _, one in group]
        if mark == "-":
            parts.append(f"<ul>{''.join(f'<li>{inline(one)}</li>' for one in texts)}</ul>")
        elif mark == FENCE:
            parts += [f'<pre tabindex="0"><code>{escape(one, quote=False)}</code></pre>' for one in texts]
        elif mark:
            above = [*above[: len(mark) - 2], slug(texts[-1])]
            parts.append(heading(len(mark) + 1, "-".join([anchor, *above]), inline(texts[-1])))
        else:
            parts += [f"<p>{inline(one)}</p>" for one in texts]
    return "\n".join(parts)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Mark (`##`, `-`, a fence, empty for a paragraph) and text of each block, its lines joined."""
    mark, held = "", list[str]()
    for line in text.splitlines():
        found = re.match(rf"({FENCE}|#+(?= )|-(?= )) *(.*)", line)
        if mark == FENCE:
            if line.startswith(FENCE):
                yield mark, "\n".join(held)
                mark, held = "", []
            else:
                held.append(line)
        elif found or not line.strip() or mark.startswith("#"):
            if held:
                yield mark, " ".join(held)
            mark = found[1] if found else ""
            said = found[2] if found else line.strip()
            held = [said] if said and mark != FENCE else []
        else:
            held.append(line.strip())
    if held:
        yield mark, " ".join(held)
