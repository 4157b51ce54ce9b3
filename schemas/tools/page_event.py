"""One event on the page: what it promises, its fields, good examples as they stand in a record, bad ones and why."""

import json
from html import escape
from typing import Any

from schemas.catalogue import Channel
from schemas.tools import examples
from schemas.tools.examples import Bad
from schemas.tools.fields import fields_table, rows
from schemas.tools.json_schema import name_of, shaped
from schemas.tools.listing import listing, wrong_line
from schemas.tools.markdown import blocks, heading, inline


def who(channel: Channel) -> str:
    """Who writes it, seen from a neighbour."""
    return f'<span class="tag {"you" if channel.is_read else "we"}">{channel.written_by}</span>'


def event(channel: Channel) -> str:
    """The section of one event type."""
    at = channel.type
    promises = "".join(f"<li>{inline(one)}</li>" for one in channel.promises)
    shape = shaped(channel.model, "writer")
    fullest_first = sorted(examples.good(at).items(), key=lambda one: -len(one[1]))
    good = "\n".join(
        _good(channel, name, value.decode(), is_open=number == 0) for number, (name, value) in enumerate(fullest_first)
    )
    return f"""<section class="event" aria-labelledby="{at}">
{heading(3, at, escape(at))}
<p class="lede">{inline(channel.summary)}</p>
<dl class="facts">
<div><dt>Who writes</dt><dd>{who(channel)}</dd></div>
<div><dt>Topic</dt><dd><code>{escape(channel.topic)}</code></dd></div>
<div><dt>Key</dt><dd>The campaign's id in lower case, also <code>subject</code>.</dd></div>
<div><dt>You</dt><dd>{inline(channel.action)}</dd></div>
<div><dt>Promised</dt><dd><ul>{promises}</ul></dd></div>
<div><dt>Order</dt><dd>{inline(channel.ordering)}</dd></div>
<div><dt>Kept</dt><dd>{inline(channel.retention)}</dd></div>
</dl>
{heading(4, f"{at}-data", "Data")}
{blocks(shape["description"], at)}
{fields_table(f"Data of {at}", at, rows(shape))}
<p>Around it stands the <a href="#{"incoming" if channel.is_read else "outgoing"}">envelope</a>.</p>
{heading(4, f"{at}-good", "Examples")}
{good}
{heading(4, f"{at}-bad", "Bad examples")}
{_bad_ones(channel)}
</section>
"""


def _good(channel: Channel, name: str, text: str, *, is_open: bool) -> str:
    parsed: dict[str, Any] = json.loads(text)  # Any: an event is as deep as its writer likes
    file = f"examples/{channel.type}/good/{name}.json"
    shown = listing(text, "Structured mode: the record's value", "json/" + name_of(channel.type, "event", "writer"))
    if channel.is_read:
        headers = {f"ce_{key}": value for key, value in parsed.items() if key not in ("data", "datacontenttype")}
        lines = "\n".join(f"{key}: {value}" for key, value in {"content-type": "application/json", **headers}.items())
        data = json.dumps(parsed["data"], indent=2, ensure_ascii=False)
        shown += listing(lines, "Binary mode: the record's headers")
        shown += listing(data, "Binary mode: its value", "json/" + name_of(channel.type, "data", "writer"))
    return f"""<details id="{channel.type}-good-{name}"{" open" if is_open else ""}>
<summary>{escape(name.replace("-", " ").capitalize())}</summary>
{shown}
<p><a href="{file}">{file}</a></p>
</details>"""


def _bad_ones(channel: Channel) -> str:
    """Each with its place and reason; what becomes of it only once where that is the same for all."""
    found = [one for one in examples.bad() if one.type == channel.type]
    fates = {_fate(one) for one in found}
    if len(fates) == 1:
        general = f'<p id="{channel.type}-fate">On a topic that the service reads each would be {fates.pop()}</p>'
        said = ["No reader takes it." if one.refused_by == "reader" else "Readers take it." for one in found]
        return general + "\n".join(map(_bad, found, [f"No writer may send it. {one}" for one in said]))
    return "\n".join(_bad(one, f"It becomes {_fate(one)}", is_read=True) for one in found)


def _fate(bad: Bad) -> str:
    reason = f'<a href="#dead-letter-reason-{bad.reason}"><code>{bad.reason}</code></a>'
    return f"a dead letter, {reason}: <q>{escape(bad.error, quote=False)}</q>"


def _bad(bad: Bad, said: str, *, is_read: bool = False) -> str:
    place = f' <code class="at">{escape(bad.at)}</code>' if bad.at else ""
    at = bad.name.removesuffix(".json").replace("/", "-")
    return f"""<details class="bad" id="{at}" data-refused-by="{bad.refused_by}">
<summary>{inline(bad.because)}{place}</summary>
<p>{said}</p>
{listing(bad.value.decode(errors="replace"), wrong=wrong_line(bad, is_read=is_read))}
<p><a href="examples/{bad.name}">examples/{bad.name}</a></p>
</details>"""
