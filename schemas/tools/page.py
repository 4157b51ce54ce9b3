"""`schemas/index.html`: the contracts on one page for people. No script, nothing fetched; same input, same bytes.

Its texts are those of the models, the catalogue, the door, the examples, README.md and CHANGELOG.md: each is said once.
"""

import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Final

from schemas import door
from schemas.catalogue import CHANNELS, DEAD_LETTER_HEADERS, DEAD_LETTER_RETENTION, UNKNOWN_VALUES
from schemas.events import Envelope, Incoming
from schemas.tools import json_schema, openapi
from schemas.tools.fields import anchor_of, fields_table, rows, table
from schemas.tools.listing import listing
from schemas.tools.markdown import blocks, heading, inline, section, slug
from schemas.tools.page_event import event, who
from schemas.tools.readme import LISTS
from schemas.topics import DEAD_LETTERS

SCHEMAS: Final = Path(__file__).resolve().parents[1]
README: Final = SCHEMAS / "README.md"
CHANGELOG: Final = SCHEMAS.parent / "CHANGELOG.md"
STYLE: Final = Path(__file__).with_name("page.css")

SUMMARY: Final = (
    "campaign-stats keeps campaign statistics true and stops campaigns whose mail bounces. This page says what you may "
    "send to it, what it tells you, and what both can rely on: CloudEvents in JSON on Kafka, and one call over HTTP."
)
RULES: Final = ("If you publish", "If you subscribe")
ENVELOPES: Final = (
    ("incoming", "What you publish", Incoming),
    ("outgoing", "What the service publishes", Envelope),
)


def render(version: str) -> str:
    """The whole page. `version`: of the release, which is that of the contract. ValueError: a section is missing."""
    readme, history = README.read_text(), CHANGELOG.read_text()
    history = history[history.index("\n## ") :]
    changes = section(readme, "Change records instead of events")
    lists = [(anchor_of(values), title.partition(",")[0]) for title, values in LISTS]
    sections = (
        ("at-a-glance", "At a glance", _glance(), ()),
        ("events", "Events", "".join(map(event, CHANNELS)), [(one.type, one.type) for one in CHANNELS]),
        ("envelope", "Envelope", _envelopes(), [(at, title) for at, title, _ in ENVELOPES]),
        ("closed-lists", "Closed lists", _lists(readme), lists),
        ("dead-letters", "Dead letters", _dead_letters(readme), ()),
        ("door", "The sync-stats door", _door(version), ()),
        ("guarantees", "Promises", _guarantees(readme), [(slug(one), one) for one in RULES]),
        ("change-records", "Change records", blocks(changes, "change-records"), ()),
        ("compatibility", "A new version", blocks(section(readme, "A new version"), "compatibility"), ()),
        ("files", "Files", _files(), ()),
        ("changes", "Change history", blocks(history, "changes"), _versions(history)),
    )
    contents = _contents((at, title, below) for at, title, _, below in sections)
    main = "\n".join(
        f'<section aria-labelledby="{at}">\n{heading(2, at, escape(title))}\n{text}\n</section>'
        for at, title, text, _ in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="description" content="{escape(SUMMARY)}">
<title>Contracts of campaign-stats {escape(version)}</title>
<link rel="icon" href="data:,">
<style>
{STYLE.read_text().strip()}
</style>
</head>
<body id="top">
<a class="skip" href="#main">Skip to the text</a>
<header class="bar"><a href="#top">campaign-stats</a> <a href="#contents">Contents</a></header>
<nav id="contents" aria-label="Contents">
<p class="brand"><a href="#top">campaign-stats</a> <a class="close" href="#main">Close</a></p>
{contents}
</nav>
<main id="main" tabindex="-1">
<h1>Contracts of campaign-stats <span class="version">{escape(version)}</span></h1>
<p class="lede">{inline(SUMMARY)}</p>
{main}
</main>
<footer>
<p>campaign-stats {escape(version)}. Written by <code>make docs</code> from the models in <code>schemas/</code>.</p>
</footer>
</body>
</html>
"""


def _contents(entries: Iterable[tuple[str, str, Iterable[tuple[str, str]]]]) -> str:
    def link(at: str, title: str) -> str:
        return f'<a href="#{escape(at)}">{inline(title)}</a>'

    parts = []
    for at, title, below in entries:
        inner = "".join(f"<li>{link(*one)}</li>" for one in below)
        parts.append(f"<li>{link(at, title)}{f'<ul>{inner}</ul>' if inner else ''}</li>")
    return "<ul>\n" + "\n".join(parts) + "\n</ul>"


def _glance() -> str:
    def links(is_read: bool) -> str:
        return "".join(
            f'<a href="#{one.type}"><code>{one.type}</code></a>' for one in CHANNELS if one.is_read is is_read
        )

    def line(topic: str, at: str, *cells: str) -> tuple[str, tuple[str, ...]]:
        return f"topic-{topic}", (f'<a href="#{at}"><code>{escape(topic)}</code></a>', *cells)

    lines = [line(one.topic, one.type, who(one), "campaign id", inline(one.action)) for one in CHANNELS]
    operators = "Nothing, unless you operate the service: <code>campaign-stats dead-letters</code>."
    service = '<span class="tag we">the service</span>'
    lines.append(line(DEAD_LETTERS, "dead-letters", service, "as it came", operators))
    return f"""<ol class="flow">
<li><strong>You publish</strong>{links(True)}</li>
<li><strong>The service</strong>
<span>recounts the campaign from its rows, pauses it when its mail bounces, and says so</span></li>
<li><strong>You subscribe</strong>{links(False)}</li>
</ol>
<p>Or ask and wait over HTTP: <a href="#door">the sync-stats door</a>.</p>
{table("topics", "Topics", ("Topic", "Who writes", "Key", "What you do"), lines)}
<p>An installation may have a prefix before every topic's name.</p>"""


def _envelopes() -> str:
    """Once for each direction: the attributes are the same for every event."""
    parts = ["<p>The attributes of CloudEvents 1.0 around <code>data</code>, the same for all events.</p>"]
    for at, title, model in ENVELOPES:
        shape = json_schema.shaped(model, "writer")
        parts += [heading(3, at, title), blocks(shape["description"], at)]
        parts.append(fields_table(title, at, rows(shape, into=False)))
    return "\n".join(parts)


def _lists(readme: str) -> str:
    parts = [blocks(section(readme, "Closed lists"), "closed-lists")]
    for title, values in LISTS:
        at = anchor_of(values)
        lines = [(f"{at}-{one}", (f"<code>{one}</code>", inline(one.meaning))) for one in values]
        lines.append((f"{at}-unknown", ("any other", inline(UNKNOWN_VALUES[values]))))
        parts += [heading(3, at, inline(title)), f"<p>{inline(values.__doc__ or '')}</p>"]
        parts.append(table("list", title.replace("`", ""), ("Value", "Meaning"), lines))
    return "\n".join(parts)


def _dead_letters(readme: str) -> str:
    headers = [(f"header-{name}", (f"<code>{name}</code>", inline(text))) for name, text in DEAD_LETTER_HEADERS.items()]
    return f"""{blocks(section(readme, "Dead letters"), "dead-letters")}
{table("list", "Headers of a dead letter", ("Header", "What it says"), headers)}
<p>Their topic is <code>{DEAD_LETTERS}</code>, kept {inline(DEAD_LETTER_RETENTION)} Their reasons are a
<a href="#dead-letter-reason">closed list</a>.</p>"""


def _door(version: str) -> str:
    document = openapi.document(version)
    [operation] = [methods["post"] for methods in document["paths"].values()]
    [parameter] = operation["parameters"]
    request = f"POST {door.PATH.replace('{id}', parameter['example'])} HTTP/1.1\nAuthorization: Bearer <your token>\n"
    example = json.dumps(door.EXAMPLE.model_dump(mode="json", exclude_unset=True), indent=2, ensure_ascii=False)
    answer = json_schema.shaped(door.SyncStatsAnswer, "writer")
    error = door.DoorError.model_fields["error"].description or ""
    lines = [(f"door-{one.status}", (f"<code>{one.status}</code>", *_refusal(one))) for one in door.REFUSALS]
    return f"""<p class="lede">{inline(document["info"]["description"])}</p>
{heading(3, "door-request", "Request")}
{listing(request, "One call; a body is ignored")}
<dl class="facts">
<div id="door-id"><dt><code>id</code></dt><dd>{inline(parameter["description"])}</dd></div>
<div><dt>Token</dt><dd>{inline(document["components"]["securitySchemes"]["token"]["description"])}</dd></div>
<div><dt>Numbers</dt><dd>{inline(operation["description"])}</dd></div>
</dl>
{heading(3, "door-200", "200: the campaign")}
{listing(example, "application/json", "openapi.yaml#SyncStatsAnswer")}
{fields_table("Answer of the sync-stats door", "door", rows(answer))}
{heading(3, "door-errors", "Errors")}
<p id="door-error">Each has one field, <code>error</code>. {inline(error)}</p>
{table("errors", "Errors of the sync-stats door", ("Status", "When", "What you do", "Answer"), lines)}"""


def _refusal(refusal: door.Refusal) -> tuple[str, str, str]:
    header = openapi.HEADERS[refusal.header]["description"] if refusal.header else ""
    beside = f"<br><code>{refusal.header}</code>: {inline(header)}" if refusal.header else ""
    bodies = [escape(json.dumps({"error": one}, ensure_ascii=False), quote=False) for one in refusal.sentences]
    code = "<br>".join(f'<code data-schema="openapi.yaml#DoorError">{body}</code>' for body in bodies)
    return inline(refusal.when), inline(refusal.action), code + beside


def _guarantees(readme: str) -> str:
    rules = [heading(3, slug(title), title) + "\n" + blocks(section(readme, title), slug(title)) for title in RULES]
    return "\n".join([blocks(section(readme, "Promises"), "guarantees"), *rules])


def _files() -> str:
    sides: tuple[json_schema.Side, ...] = ("writer", "reader")

    def links(event_type: str, form: json_schema.Form) -> str:
        names = {side: json_schema.name_of(event_type, form, side) for side in sides}
        return ", ".join(f'<a href="json/{name}">{side}</a>' for side, name in names.items())

    lines = [
        (f"files-{one.type}", (f"<code>{one.type}</code>", links(one.type, "event"), links(one.type, "data")))
        for one in CHANNELS
    ]
    return f"""<p>JSON Schema 2020-12, closed for those who write an event, open for those who read it.</p>
{table("list", "Schemas", ("Event", "The whole event", "Its data"), lines)}
<ul>
<li><a href="asyncapi.yaml">asyncapi.yaml</a>: AsyncAPI 3 of the topics</li>
<li><a href="openapi.yaml">openapi.yaml</a>: OpenAPI 3.1 of the sync-stats door</li>
<li><a href="examples/bad.json">examples/bad.json</a>: every wrong example with its place and reason</li>
<li><a href="README.md">README.md</a>: the same contracts, for those who read the repository</li>
</ul>"""


def _versions(history: str) -> list[tuple[str, str]]:
    titles = re.findall(r"^## +(.+)$", history, re.MULTILINE)
    return [(f"changes-{slug(title)}", title) for title in titles]
