"""The page: fresh, whole, safe, good to look at. What is checked is what it shows, not the files that it is made of."""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import pytest
from pydantic import BaseModel

from schemas import catalogue, door, events
from schemas.tools import examples, json_schema, markdown, page, screenshots
from schemas.tools.__main__ import SCHEMAS, contract_version
from schemas.tools.fields import anchor_of
from schemas.tools.readme import LISTS
from schemas.tools.screenshots import Report, faults, look
from tests.witnesses import node_modules

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
NAMES = {f"{size}-{scheme}": pixels for size, pixels in SIZES.items() for scheme in ("light", "dark")}


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags = Counter[str]()
        self.levels: list[int] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.texts: dict[str, str] = {}  # id -> all text below it
        self.shown: list[tuple[str, str]] = []  # what it is valid against, and the text
        self.payloads: dict[str, tuple[str, str]] = {}  # id of a bad example -> its payload, the marked part of it
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in has.items()]
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if "id" in has:
            self.ids.append(has["id"])
            self.texts[has["id"]] = ""
        if "data-schema" in has:
            self.shown.append((has["data-schema"], ""))
        if "data-refused-by" in has:
            self.payloads[has["id"]] = ("", "")
        if tag not in VOID:
            self._open.append((tag, has))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        for _, has in self._open:
            if "id" in has:
                self.texts[has["id"]] += data
            if "data-schema" in has:
                schema, text = self.shown[-1]
                self.shown[-1] = (schema, text + data)
            if "data-refused-by" in has and "pre" in tags:
                payload, marked = self.payloads[has["id"]]
                self.payloads[has["id"]] = (payload + data, marked + (data if "mark" in tags else ""))

    def targets(self) -> list[str]:
        """Everything that a browser may follow or fetch."""
        return [value for _, name, value in self.attributes if name in ("href", "src", "srcset", "action", "poster")]


@pytest.fixture(scope="module")
def shown() -> Page:
    """The page that is checked in."""
    return Page((SCHEMAS / "index.html").read_text())


def plain(text: str) -> str:
    """A text of the models as the page shows it, without marks."""
    return text.replace("`", "")


def test_what_is_checked_in_is_what_the_models_say() -> None:
    """If this fails: `make docs`."""
    assert (SCHEMAS / "index.html").read_text() == page.render(contract_version())


def test_every_link_leads_somewhere_and_none_to_another_host(shown: Page) -> None:
    assert [one for one, times in Counter(shown.ids).items() if times > 1] == []
    targets = shown.targets()
    assert {one for one in targets if one.startswith("#") and one[1:] not in shown.ids} == set()
    others = {one for one in targets if not one.startswith("#")} - {"data:,"}
    assert {one for one in others if not re.fullmatch(r"[\w./-]+", one)} == set()
    assert {one for one in others if not (SCHEMAS / one).exists()} == set()
    assert others >= {"asyncapi.yaml", "openapi.yaml", "README.md", "examples/bad.json"}
    assert others >= {f"json/{name}" for name, _ in json_schema.documents()}
    assert [one for one in shown.attributes if "://" in one[2]] == []


def test_nothing_is_fetched_or_run(shown: Page) -> None:
    assert not {"script", "img", "iframe", "object", "embed", "video", "audio", "form", "base"} & set(shown.tags)
    assert [one for one in shown.attributes if one[1].startswith("on")] == []
    style = page.STYLE.read_text()
    assert "url(" not in style
    assert "@import" not in style
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in shown.attributes


def test_it_can_be_found_through_by_headings_landmarks_and_language(shown: Page) -> None:
    assert shown.levels[0] == 1
    assert shown.levels.count(1) == 1
    assert max(after - before for before, after in zip(shown.levels, shown.levels[1:], strict=False)) == 1
    assert [shown.tags[one] for one in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]
    assert ("html", "lang", "en") in shown.attributes
    assert ("meta", "content", "light dark") in shown.attributes
    assert ("a", "href", "#main") in shown.attributes  # past the contents
    contents = {one for tag, name, one in shown.attributes if (tag, name) == ("a", "href") and one.startswith("#")}
    assert {f"#{channel.type}" for channel in catalogue.CHANNELS} <= contents


def writers_schema(named: str) -> dict[str, Any]:
    """What `data-schema` names."""
    file, _, model = named.partition("#")
    if file == "openapi.yaml":
        return json_schema.shaped(getattr(door, model), "writer")
    document: dict[str, Any] = json.loads((SCHEMAS / file).read_text())
    return document


def test_every_example_shown_is_one(shown: Page) -> None:
    """The text between the tags, so that escaping and colours are checked too."""
    for named, text in shown.shown:
        judge = jsonschema_rs.Draft202012Validator(writers_schema(named), validate_formats=True)
        judge.validate(json.loads(text))
    sentences = sum(len(one.sentences) for one in door.REFUSALS)
    expected = Counter({"openapi.yaml#SyncStatsAnswer": 1, "openapi.yaml#DoorError": sentences})
    for channel in catalogue.CHANNELS:
        good = examples.parsed(channel.type)
        structured = f"json/{json_schema.name_of(channel.type, 'event', 'writer')}"
        expected[structured] = len(good)
        assert sorted(map(str, good.values())) == sorted(str(json.loads(b)) for a, b in shown.shown if a == structured)
        if channel.is_read:
            expected[f"json/{json_schema.name_of(channel.type, 'data', 'writer')}"] = len(good)
        for name, event in good.items():
            text = shown.texts[f"{channel.type}-good-{name}"]
            assert (f"ce_id: {event['id']}\n" in text) == channel.is_read, name
    assert Counter(named for named, _ in shown.shown) == expected


def test_every_bad_example_shown_is_wrong_where_it_is_marked_and_says_what_becomes_of_it(shown: Page) -> None:
    bad = list(examples.bad())
    assert len(shown.payloads) == len(bad)
    for one in bad:
        at = one.name.removesuffix(".json").replace("/", "-")
        payload, marked = shown.payloads[at]
        assert payload == one.value.decode(errors="replace").rstrip("\n"), at
        said = shown.texts[at] + shown.texts.get(f"{one.type}-fate", "")
        assert [part for part in (plain(one.because), one.at or "", one.reason, one.error) if part not in said] == [], (
            at
        )
        if one.reason in ("not_json", "not_utf8"):
            assert marked, at
            continue
        judge = jsonschema_rs.Draft202012Validator(
            writers_schema(f"json/{json_schema.name_of(one.type, 'event', 'writer')}"), validate_formats=True
        )
        assert not judge.is_valid(json.loads(payload)), at
        depth, name = (one.at or "").count("."), (one.at or "").rpartition(".")[2]
        assert bool(marked) or depth < 2, at  # above that something may be missing, which nothing can show
        assert not marked or depth == 0 or marked.strip().startswith(f'"{name}":'), at


def fields(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    """Path and description of every field of a model and of those within it."""
    for name, field in model.model_fields.items():
        yield above + name, field.description or ""
        for one in (field.annotation, *get_args(field.annotation)):
            if isinstance(one, type) and issubclass(one, BaseModel):
                yield from fields(one, f"{above}{name}.")


def test_every_field_of_every_model_is_there_under_its_anchor(shown: Page) -> None:
    models: dict[str, type[BaseModel]] = {channel.type: channel.model for channel in catalogue.CHANNELS}
    models |= {"incoming": events.Incoming, "outgoing": events.Envelope}
    models |= {"door": door.SyncStatsAnswer}
    found = 0
    for anchor, model in models.items():
        for path, description in fields(model):
            text = shown.texts[f"{anchor}-{path}"]
            assert path.rpartition(".")[2] in text
            assert plain(description).rstrip(".") in text, (anchor, path)
            found += 1
    assert found > 100
    assert "door-campaign.sender_accounts.email_address" in shown.texts
    assert plain(door.DoorError.model_fields["error"].description or "?") in shown.texts["door-error"]


def test_every_promise_is_there(shown: Page) -> None:
    for channel in catalogue.CHANNELS:
        said = shown.texts["main"]
        assert channel.topic in shown.texts[f"topic-{channel.topic}"]
        assert plain(channel.action) in shown.texts[f"topic-{channel.topic}"]
        for one in (channel.summary, *channel.promises, channel.ordering, channel.retention):
            assert plain(one) in said, one


def test_every_value_of_a_closed_list_is_there_and_what_to_make_of_another(shown: Page) -> None:
    for _, values in LISTS:
        for one in values:
            assert plain(one.meaning) in shown.texts[f"{anchor_of(values)}-{one}"]
        assert "newer" in shown.texts[f"{anchor_of(values)}-unknown"]
    for name, text in catalogue.DEAD_LETTER_HEADERS.items():
        assert plain(text) in shown.texts[f"header-{name}"]


def test_every_answer_of_the_door_is_there(shown: Page) -> None:
    for one in door.REFUSALS:
        text = shown.texts[f"door-{one.status}"]
        said = (plain(one.when), plain(one.action), *map(json.dumps, one.sentences), one.header or "")
        assert [part for part in said if part not in text] == [], one.status


def test_every_change_is_there(shown: Page) -> None:
    headings = re.findall(r"^## (.+)$", page.CHANGELOG.read_text(), re.MULTILINE)
    assert headings
    for one in headings:
        assert shown.texts[f"changes-{markdown.slug(one)}"] == plain(one)


def test_what_looks_like_markup_is_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nasty = '<script>alert("&")</script> & `<b>` "quoted"'
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(
        f"# Changelog\n\n## Unreleased\n\n### <i>Added</i>\n- {nasty}\n- [{nasty[:8]}](javascript:alert(1))\n"
        "- [elsewhere](https://example.com/)\n\n```\n<u>code</u>\n```\n"
    )
    monkeypatch.setattr(page, "CHANGELOG", changelog)
    first = catalogue.CHANNELS[0]
    changed = replace(first, summary=nasty, action=nasty, promises=(nasty,), ordering=nasty, retention=nasty)
    monkeypatch.setattr(page, "CHANNELS", (changed, *catalogue.CHANNELS[1:]))
    html = Page(page.render('1.0"><script>'))
    assert not {"script", "b", "u"} & set(html.tags)
    assert html.texts["main"].count(plain(nasty)) == 7
    assert html.texts["changes-unreleased-i-added-i"] == "<i>Added</i>"
    assert "<u>code</u>" in html.texts["main"]
    assert "elsewhere (https://example.com/)" in html.texts["main"]
    assert [one for one in html.targets() if ":" in one] == ["data:,"]


def test_markdown_gets_anchors() -> None:
    text = (
        "## 0.2.0 - 2026-01-02\nOne\ntwo `a<b` **c**.\n\n- x\n  y\n- [z](#z)\n\n### Fixed\n```json\n{\n\n}\n```\nend\n"
    )
    assert markdown.blocks(text, "changes").splitlines() == [
        '<h3 id="changes-0.2.0"><a href="#changes-0.2.0">0.2.0 - 2026-01-02</a></h3>',
        "<p>One",
        "two <code>a&lt;b</code> <strong>c</strong>.</p>",
        "<ul>",
        "<li>x",
        "y</li>",
        '<li><a href="#z">z</a></li>',
        "</ul>",
        '<h4 id="changes-0.2.0-fixed"><a href="#changes-0.2.0-fixed">Fixed</a></h4>',
        '<pre tabindex="0"><code>{',
        "",
        "}",
        "</code></pre>",
        "<p>end</p>",
    ]
    assert markdown.section("## A\nx\n\n<!-- made -->\ny\n## B\nz\n", "A") == "x"
    with pytest.raises(ValueError, match="no section"):
        markdown.section("## A\n", "B")


def pixels(png: Path) -> tuple[int, int]:
    """Width and height, as the file's header has them."""
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def no_screenshots(directory: Path) -> list[str]:
    """What is not as it should be: four of the right size, neither blank nor large, light ones other than dark ones."""
    pictures = {path.name: path for path in directory.glob("*.png")}
    wanted = {f"{name}.png": size for name, size in NAMES.items()}
    wrong = sorted(pictures.keys() ^ wanted.keys())
    wrong += [name for name in pictures.keys() & wanted.keys() if pixels(pictures[name]) != wanted[name]]
    wrong += [name for name, path in pictures.items() if not 20_000 < path.stat().st_size < 300_000]
    return wrong if len({path.read_bytes() for path in pictures.values()}) == len(NAMES) else [*wrong, "alike"]


def test_the_screenshots_that_are_checked_in_are_screenshots() -> None:
    assert no_screenshots(screenshots.SCREENSHOTS) == []


def test_what_is_no_screenshot_is_noticed(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.png").write_bytes((screenshots.SCREENSHOTS / "phone-dark.png").read_bytes())
    (tmp_path / "more.png").write_bytes(b"")
    assert sorted(no_screenshots(tmp_path)) == [
        "alike",
        "desktop-dark.png",
        "desktop-light.png",
        "more.png",
        "more.png",
    ]


GOOD: Report = {
    "requests": [],
    "overflow": dict.fromkeys(NAMES, False),
    "console": [],
    "axe": {name: [{"id": "region", "impact": "moderate", "nodes": 1, "first": "<p>"}] for name in NAMES},
    "anchors_missing": [],
    "contents": {name: screenshots.CONTENTS[name.partition("-")[0]] for name in NAMES},
}


@pytest.mark.parametrize(
    ("part", "wrong", "said"),
    [
        ("requests", ["https://example.com/"], "the page asks the network for https://example.com/"),
        ("overflow", {"phone-dark": True}, "the page is wider than the screen: phone-dark"),
        ("console", ["Uncaught"], "the console has an error: Uncaught"),
        ("anchors_missing", ["x"], "a link leads nowhere: #x"),
        ("contents", {"phone-dark": {"before": True}}, "phone-dark: the contents do not fold"),
        (
            "axe",
            {"phone-dark": [{"id": "y", "impact": "serious", "nodes": 2, "first": "<a>"}]},
            "phone-dark: y (serious)",
        ),
    ],
)
def test_a_fault_that_chromium_saw_is_told(part: str, wrong: object, said: str) -> None:
    assert list(faults(GOOD)) == []
    [told] = faults(GOOD | {part: wrong})  # type: ignore[arg-type]  # one part at a time
    assert told.startswith(said)


def test_without_chromium_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["screenshots", "node_modules"])
    assert screenshots.main() == 1
    assert "package `chromium`" in capsys.readouterr().err


@pytest.mark.chromium
def test_it_is_good_on_a_phone_and_a_desktop_in_light_and_dark(tmp_path: Path) -> None:
    report = look(node_modules(), screenshots=tmp_path)
    assert list(faults(report)) == []
    assert set(report["axe"]) == set(report["contents"]) == set(NAMES)
    assert set(report["overflow"]) == {*NAMES, "narrowest-light", "narrowest-dark"}
    assert no_screenshots(tmp_path) == []


@pytest.mark.chromium
def test_a_broken_page_is_reported(tmp_path: Path) -> None:
    """The control: every check above can fail."""
    wrong = (
        '<div style="width: 2000px">wide</div><a href="#nowhere">dead</a>'
        '<p style="color: #777; background: #888">pale</p><img src="https://example.com/a.png" alt="elsewhere"></main>'
    )
    broken = re.sub(r"<meta http-equiv[^>]*>", "", (SCHEMAS / "index.html").read_text())
    broken = broken.replace("nav:target {", "nav:nowhere {").replace("</main>", wrong)
    (tmp_path / "broken.html").write_text(broken)
    found = "\n".join(faults(look(node_modules(), tmp_path / "broken.html", tmp_path)))
    assert "the network for https://example.com/a.png" in found
    assert "leads nowhere: #nowhere" in found
    assert "console has an error" in found
    for name in NAMES:
        assert f"wider than the screen: {name}" in found
        assert f"{name}: color-contrast (serious)" in found
    assert "phone-light: the contents do not fold" in found
