"""Markdown as README.md and CHANGELOG.md use it, as HTML with anchors. Everything is escaped.

A link to another host becomes text with its address: the page refers to nothing outside.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

INSIDE: Final = re.compile(r"#?[\w./-]+(#[\w.-]+)?")
_MARKDOWN: Final = MarkdownIt("js-default", {"html": False, "linkify": False}).enable("table")


def inline(text: str) -> str:
    """Text without blocks."""
    tokens = _MARKDOWN.parseInline(text)
    _turn_links_outside_into_text(tokens)
    return _rendered(tokens)


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
    tokens = _MARKDOWN.parse(text)
    above: list[str] = []
    for token, content in zip(tokens, [*tokens[1:], None], strict=True):
        _turn_links_outside_into_text([token])
        if token.type == "heading_open" and content is not None:
            level = int(token.tag[1])
            above = [*above[: level - 2], slug(content.content)]
            token.tag = f"h{level + 1}"
            at = "-".join([anchor, *above])
            token.attrSet("id", at)
            link, end = Token("link_open", "a", 1, attrs={"href": f"#{at}"}), Token("link_close", "a", -1)
            content.children = [link, *(content.children or []), end]
        elif token.type == "heading_close":
            token.tag = f"h{int(token.tag[1]) + 1}"
        elif token.type == "fence":
            token.type, token.info = "code_block", ""
            token.attrSet("tabindex", "0")
    return _rendered(tokens).strip()


def _rendered(tokens: Sequence[Token]) -> str:
    return str(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


def _turn_links_outside_into_text(tokens: Sequence[Token]) -> None:
    for token in tokens:
        kept: list[Token] = []
        outside: list[str] = []
        for child in token.children or []:
            if child.type == "link_open" and not INSIDE.fullmatch(str(child.attrs["href"])):
                outside.append(str(child.attrs["href"]))
            elif child.type == "link_close" and outside:
                kept.append(Token("text", "", 0, content=f" ({outside.pop()})"))
            elif child.type != "image":
                kept.append(child)
        if token.children is not None:
            token.children = kept
