"""The gate of the contracts: what passes, what is refused, where and with which fix; and that releases stay."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import strategies as st
from pydantic import BaseModel, Field, create_model

from schemas import events
from schemas.catalogue import CHANNELS
from schemas.events import NO_NUL, CampaignId, Count, Stats
from schemas.tools import compatibility, releases, rules, values
from schemas.tools.compatibility import Check, Direction, compare
from schemas.tools.json_schema import Form, Schema
from schemas.tools.releases import Contract, Unreleasable

COUNT = 40  # values of each writer; a counterexample of every change below is among them
CHANNEL = {channel.type: channel for channel in CHANNELS}


def variant(model: type[BaseModel], *without: str, **fields: Any) -> type[BaseModel]:
    """The model under its own name, without some fields and with others, as `create_model` takes them."""
    kept = {
        name: (info.annotation, info)
        for name, info in model.model_fields.items()
        if name not in without and name not in fields
    }
    made: type[BaseModel] = create_model(
        model.__name__, __config__=model.model_config, __doc__=model.__doc__, **{**kept, **fields}
    )
    return made


@dataclass(frozen=True)
class Change:
    """A model that changes, or documents that do where no model can.

    `forward`, `backward`, `itself`: JSON path at which this direction is refused, in the data or, without `is_data`, in
    the whole event; "" where it passes. `fix`: part of the sentence, else that a new version stands beside the old one.
    `unseen`: directions in which the rules refuse and no value can show why, for the reason `because`.
    """

    name: str
    event_type: str = events.PAUSED
    model: type[BaseModel] | None = None
    documents: Callable[[dict[str, Schema]], None] | None = None
    forward: str = ""
    backward: str = ""
    itself: str = ""
    fix: str = ""
    unseen: tuple[Direction, ...] = ()
    because: str = ""
    is_data: bool = True

    @property
    def refused(self) -> dict[Direction, str]:
        """Direction -> path."""
        places = zip(Direction, (self.forward, self.backward, self.itself), strict=True)
        return {direction: path for direction, path in places if path}

    def contract(self) -> Contract:
        """The contract of this event type alone, changed."""
        channel = CHANNEL[self.event_type]
        contract = releases.current([replace(channel, model=self.model or channel.model)])
        if self.documents:
            documents = deepcopy(dict(contract.schemas))
            self.documents(documents)
            contract = replace(contract, schemas=documents)
        return contract


def released(*types: str, version: str = "0.1.0") -> Contract:
    """What was released before the change."""
    return replace(releases.current([CHANNEL[one] for one in types]), version=version)


def checks(change: Change) -> list[Check]:
    """Everything the gate says of it."""
    return list(compare(change.contract(), [released(change.event_type)], count=COUNT))


def of(type_: str) -> Callable[..., dict[str, Any]]:
    """Makes the part of a Change that says what of this event's model changes."""
    return lambda *without, **fields: {"event_type": type_, "model": variant(CHANNEL[type_].model, *without, **fields)}


status_changed, sync_requested = of(events.STATUS_CHANGED), of(events.SYNC_REQUESTED)
stats_updated, paused = of(events.STATS_UPDATED), of(events.PAUSED)


def of_campaign(**fields: Any) -> dict[str, Any]:
    """The same one level deeper."""
    return stats_updated(campaign=(variant(events.Campaign, **fields), ...))


def in_event(change: Callable[[Schema], object], *sides: str, type_: str = events.PAUSED) -> dict[str, Any]:
    """A change of the whole event's schemas that no model can make."""

    def edit(documents: dict[str, Schema]) -> None:
        for side in sides or ("writer", "reader"):
            change(documents[f"{type_}.event.{side}.json"])

    return {"event_type": type_, "documents": edit, "is_data": False}


def attribute(name: str, **keywords: Any) -> dict[str, Any]:
    """An attribute of the event with another schema."""
    return in_event(lambda schema: schema["properties"].update({name: keywords}))


def narrower(**keywords: Any) -> dict[str, Any]:
    """What a writer may send where a reader takes more."""
    return {"json_schema_extra": {"x-writer": keywords}}


def listed(*values: str) -> Any:
    """Text of a list that may grow."""
    return Annotated[str, Field(json_schema_extra={"x-listed": list(values)})]


def _renamed_definition(documents: dict[str, Schema]) -> None:
    for name, schema in documents.items():
        documents[name] = json.loads(json.dumps(schema).replace("/Stats", "/Counts").replace('"Stats"', '"Counts"'))


class Note(BaseModel):
    """Something new."""

    text: str


PLAIN_TEXT = Annotated[
    str, Field(min_length=1, json_schema_extra={"pattern": NO_NUL, "x-writer": {"pattern": "^[a-z_]+$"}})
]
MORE_STATS = variant(Stats, opened=(Count | None, None))
LESS_STATS = variant(Stats, "total")
PASS = [
    Change("nothing", **paused()),
    Change("an optional field is added", **paused(note=(str | None, None))),
    Change("an optional object is added", **paused(note=(Note | None, None))),
    Change("an optional list is added", **paused(notes=(list[Note] | None, None))),
    Change("an optional field of a nested object is added", **of_campaign(stats=(MORE_STATS, ...))),
    Change("an optional field goes", **stats_updated("drift")),
    Change("a listed value is added", **paused(reason=(listed("bounce_rate", "complaints"), ...))),
    Change("a listed value goes", **stats_updated(trigger=(listed("reconciliation"), ...))),
    Change("a better description", **paused(version=(int, Field(description="Told better.", title="Version")))),
    Change("readers take what is below the minimum", **paused(sent=(int, Field(**narrower(minimum=0))))),
    Change("readers take fractions too", **paused(rate_bp=(float, Field(ge=0, **narrower(type="integer"))))),
    Change("writers send less", **paused(sent=(Count, Field(**narrower(minimum=1))))),
    Change("writers send plain text", **status_changed(to_status=(PLAIN_TEXT, ...))),
    Change("what was any JSON is told", **of_campaign(skip_other_campaigns=(object, Field(**narrower(type="null"))))),
    Change("fields in another order", **paused("campaign_id", campaign_id=(events.LowerId, ...))),
    Change("a model gets another name", event_type=events.STATS_UPDATED, documents=_renamed_definition),
    Change("an attribute is added", **attribute("tracestate", type="string")),
]
WIDENING = "the narrower pattern is within the wider one, which the rules cannot show"
NO_VALUES = "no values of the new writer can be made up"
FORWARD, BACKWARD, ITSELF = Direction
FAIL = [
    Change(
        "a required field goes",
        **paused("rate_bp"),
        forward="$.rate_bp",
        fix="keep it required in the model, or publish campaign.paused.v2 beside v1: schemas/README.md",
    ),
    Change(
        "a required field is added",
        **paused(note=(str, ...)),
        backward="$.note",
        fix="make it optional in the model, or publish campaign.paused.v2 beside v1: schemas/README.md",
    ),
    Change("a field is renamed", **paused("rate_bp", rate=(Count, ...)), forward="$.rate_bp", backward="$.rate"),
    Change("an optional field is required", **stats_updated(drift=(dict[str, int], ...)), backward="$.drift"),
    Change("a required field is optional", **paused(pending=(Count | None, None)), forward="$.pending"),
    Change("a required field may be null", **paused(pending=(Count | None, ...)), forward="$.pending"),
    Change("null is no longer taken", **of_campaign(daily_limit=(int, ...)), backward="$.campaign.daily_limit"),
    Change("a number is text", **paused(rate_bp=(str, ...)), forward="$.rate_bp", backward="$.rate_bp"),
    Change("a whole number may be a fraction", **paused(rate_bp=(float, Field(ge=0))), forward="$.rate_bp"),
    Change(
        "a boolean is a number",
        **of_campaign(stop_on_reply=(int | None, ...)),
        forward="$.campaign.stop_on_reply",
        backward="$.campaign.stop_on_reply",
    ),
    Change("a field may hold anything", **paused(pending=(object, ...)), forward="$.pending"),
    Change("a minimum is raised", **paused(sent=(int, Field(ge=1))), backward="$.sent"),
    Change("a minimum goes", **paused(sent=(int, ...)), forward="$.sent"),
    Change("a maximum is set", **paused(rate_bp=(int, Field(ge=0, le=10_000))), backward="$.rate_bp"),
    Change("text must not be empty", **of_campaign(name=(str, Field(min_length=1))), backward="$.campaign.name"),
    Change("text must be short", **of_campaign(name=(str, Field(max_length=5))), backward="$.campaign.name"),
    Change("text gets a pattern", **of_campaign(name=(str, Field(pattern="^[a-z]+$"))), backward="$.campaign.name"),
    Change("text is an id", **of_campaign(name=(UUID, ...)), backward="$.campaign.name"),
    Change("a time is any text", **paused(paused_at=(str, ...)), forward="$.paused_at"),
    Change(
        "a pattern is narrowed",
        **sync_requested(user_id=(CampaignId | None, None)),
        forward="$.user_id",
        backward="$.user_id",
        unseen=(FORWARD,),
        because=WIDENING,
    ),
    Change(
        "a pattern is widened",
        **sync_requested(campaign_id=(events.AnyId, ...)),
        forward="$.campaign_id",
        backward="$.campaign_id",
        unseen=(BACKWARD,),
        because=WIDENING,
    ),
    Change(
        "a list is closed without one of its values",
        **stats_updated(trigger=(Literal["sync_requested", "status_changed"], ...)),
        backward="$.trigger",
    ),
    Change(
        "a required field of a nested object goes",
        **of_campaign(stats=(LESS_STATS, ...)),
        forward="$.campaign.stats.total",
    ),
    Change(
        "counts by status are text",
        **paused(prospects_by_status=(dict[str, str], ...)),
        forward="$.prospects_by_status.*",
        backward="$.prospects_by_status.*",
    ),
    Change(
        "counts by status are a list",
        **paused(prospects_by_status=(list[Count], ...)),
        forward="$.prospects_by_status",
        backward="$.prospects_by_status",
    ),
    Change(
        "writers send what their own readers refuse",
        **paused(sent=(Count, Field(**narrower(minimum=-1)))),
        forward="$.sent",
        itself="$.sent",
    ),
    Change("a constant is another", **attribute("source", const="s"), forward="$.source", backward="$.source"),
    Change("a constant is any text", **attribute("specversion", type="string"), forward="$.specversion"),
    Change("a text has a format", **attribute("id", type="string", format="uuid"), backward="$.id"),
    Change(
        "an attribute is required",
        **in_event(lambda schema: schema["required"].append("traceparent")),
        backward="$.traceparent",
    ),
    Change(
        "extensions are not taken any more",
        **in_event(lambda schema: schema.update(additionalProperties=False), "reader", type_=events.STATUS_CHANGED),
        backward="$.*",
        itself="$.*",
    ),
    Change(
        "a keyword that the rules do not know",
        **paused(window=(int, Field(ge=0, multiple_of=5))),
        forward="$.window",
        backward="$.window",
        itself="$",
        fix="teach it to schemas/tools/",
        unseen=(FORWARD, ITSELF),
        because=NO_VALUES,
    ),
    Change(
        "a reference that leads nowhere",
        **in_event(lambda schema: schema["properties"].update(data={"$ref": "#/$defs/Gone"}), "writer"),
        forward="$",
        itself="$",
        fix="teach it to schemas/tools/",
        unseen=(FORWARD, ITSELF),
        because=NO_VALUES,
    ),
]


@pytest.mark.parametrize("change", PASS, ids=lambda change: change.name)
def test_a_change_that_breaks_nobody_passes(change: Change) -> None:
    done = checks(change)
    assert [sentence for one in done for sentence in one.told()] == []
    read = {(one.form, one.direction): one.tried for one in done if one.form != "topic"}
    assert set(read) == {(form, direction) for form in releases.FORMS for direction in Direction}
    assert all(tried > 0 for tried in read.values())


@pytest.mark.parametrize("change", FAIL, ids=lambda change: change.name)
def test_a_change_that_breaks_somebody_is_refused_with_its_fix(change: Change) -> None:
    done = checks(change)
    fix = change.fix or f"publish {change.event_type.removesuffix('1')}2 beside v1: schemas/README.md"
    for form, start in {"event": "$.data", "data": "$"}.items() if change.is_data else [("event", "$")]:
        found = {one.direction: one for one in done if one.form == form and one.refusals}
        assert set(found) == set(change.refused)
        for direction, path in change.refused.items():
            place = path if path == "$" else start + path.removeprefix("$")
            sentences = [told for told in found[direction].told() if f": {place}: " in told]
            assert sentences
            for sentence in sentences:
                assert sentence.startswith(f"{change.event_type} {form} {direction}")
                assert fix in sentence
    if not change.is_data:
        assert not [one for one in done if one.form == "data" and one.refusals]


@pytest.mark.parametrize("change", FAIL, ids=lambda change: change.name)
def test_values_alone_find_it_too(change: Change) -> None:
    old, new = released(change.event_type), change.contract()
    form: Form = "data" if change.is_data else "event"
    pairs = {FORWARD: (new, old), BACKWARD: (old, new), ITSELF: (new, new)}
    for direction in change.refused:
        writer = pairs[direction][0].schema(change.event_type, form, "writer")
        reader = pairs[direction][1].schema(change.event_type, form, "reader")
        if direction in change.unseen and change.because == NO_VALUES:
            with pytest.raises(rules.Unshown):
                values.tried(writer, reader, COUNT)
        else:
            tried, example = values.tried(writer, reader, COUNT)
            assert tried > 0
            assert (example is None) is (direction in change.unseen)


@pytest.mark.parametrize(("what", "other"), [("topic", "campaign.stopped"), ("written_by", "you")])
def test_another_topic_and_another_writer_are_refused(what: str, other: str) -> None:
    new = releases.current([CHANNEL[events.PAUSED]])
    changed = replace(new, topics={events.PAUSED: {**new.topics[events.PAUSED], what: other}})
    [sentence] = refused(changed, released(events.PAUSED))
    assert sentence.startswith(f"campaign.paused.v1 topic FORWARD since 0.1.0: {what}: it was ")
    assert "publish campaign.paused.v2 beside v1: schemas/README.md" in sentence


def test_an_event_type_may_come_but_not_go() -> None:
    one, both = (events.SYNC_REJECTED,), (events.SYNC_REJECTED, events.PAUSED)
    assert refused(releases.current([CHANNEL[name] for name in both]), released(*one)) == []
    [sentence] = refused(releases.current([CHANNEL[name] for name in one]), released(*both))
    assert sentence.startswith("campaign.paused.v1 topic FORWARD since 0.1.0: type: the event type is gone")
    assert "keep it beside the new version: schemas/README.md" in sentence


def test_every_release_counts_not_only_the_latest() -> None:
    """A field that was away for a release comes back as something else: the first release's neighbours knew it."""
    first = Change("", **paused(note=(str | None, None))).contract()
    second = Change("", **paused()).contract()
    third = Change("", **paused(note=(int | None, None))).contract()
    earlier = [replace(first, version="0.1.0"), replace(second, version="0.2.0")]
    found = [one for one in compare(third, earlier, count=COUNT) if one.refusals]
    assert {(one.direction, one.since) for one in found} == {(FORWARD, "0.1.0"), (BACKWARD, "0.1.0")}


def test_a_counterexample_is_shown_short() -> None:
    change = next(one for one in FAIL if one.name == "an attribute is required")  # of which the whole event is one
    shown = [line for one in checks(change) for line in one.told() if line.startswith("  for example $ = {")]
    assert shown
    assert max(len(line) for line in shown) < 260


def refused(new: Contract, *earlier: Contract) -> list[str]:
    """Every sentence, with few values."""
    return [sentence for one in compare(new, earlier, count=10) for sentence in one.told()]


# Rules and values watch each other.


def test_rules_that_say_too_much_are_found_out_by_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "misfits", lambda *_: [])
    sentences = [
        told for one in checks(next(one for one in FAIL if one.name == "a number is text")) for told in one.told()
    ]
    assert [told for told in sentences if "correct schemas/tools/rules.py" in told]


def test_values_that_are_none_of_their_schema_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "strategy", lambda _: st.just(1))
    sentences = [told for one in compare(Change("", **paused()).contract(), [], count=7) for told in one.told()]
    assert [told for told in sentences if "values made up from it are wrong" in told]


def test_values_are_the_same_in_every_run() -> None:
    schema = json.dumps(releases.current().schema(events.PAUSED, "data", "writer"))
    assert values.written.__wrapped__(schema, 10) == values.written.__wrapped__(schema, 10)


# What was released stays.


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A project whose first release is due."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n')
    _headings(tmp_path, "## 0.1.0 - 2026-11-28")
    return tmp_path


def _headings(repository: Path, *lines: str) -> None:
    (repository / "CHANGELOG.md").write_text("\n\n".join(["# Changelog", "## Unreleased", *lines]) + "\n")


def rejected(**fields: Any) -> Contract:
    """A small contract: sync_rejected alone."""
    channel = CHANNEL[events.SYNC_REJECTED]
    return releases.current([replace(channel, model=variant(channel.model, **fields))])


def test_a_release_holds_the_documents_and_their_topics(repository: Path) -> None:
    assert compatibility.release(repository, rejected()) == 0
    folder = repository / "schemas" / "released" / "0.1.0"
    assert {path.name for path in folder.iterdir()} == {*rejected().schemas, "topics.json", "SHA256SUMS"}
    assert json.loads((folder / "topics.json").read_text()) == {
        "campaign.sync_rejected.v1": {"topic": "campaign.sync-rejected", "written_by": "the service"}
    }
    assert releases.released(repository) == [replace(rejected(), version="0.1.0")]
    assert compatibility.check(repository, rejected()) == 0


def test_a_release_is_not_overwritten(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compatibility.release(repository, rejected()) == 0
    assert compatibility.release(repository, rejected()) == 0  # the same again is no change
    assert compatibility.release(repository, rejected(note=(str | None, None))) == 1
    assert "raise the version in pyproject.toml" in capsys.readouterr().out
    assert releases.released(repository) == [replace(rejected(), version="0.1.0")]


def test_what_breaks_somebody_is_not_released(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compatibility.release(repository, rejected())
    (repository / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    assert compatibility.release(repository, rejected(note=(str, Field()))) == 1
    assert "publish campaign.sync_rejected.v2 beside v1" in capsys.readouterr().out
    assert [one.version for one in releases.released(repository)] == ["0.1.0"]


def test_before_the_first_release_it_says_so(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _headings(repository)
    assert compatibility.check(repository, rejected()) == 0
    out = capsys.readouterr().out
    assert "No release yet" in out
    assert "ok      campaign.sync_rejected.v1 event ITSELF  rules, 200 values" in out


def test_a_line_for_every_event_form_and_direction(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compatibility.release(repository, rejected())
    capsys.readouterr()
    assert compatibility.check(repository, rejected(note=(str, Field()))) == 1
    lines = capsys.readouterr().out.splitlines()
    for form in ("event", "data"):
        assert f"ok      campaign.sync_rejected.v1 {form} FORWARD since 0.1.0  rules, 200 values" in lines
        assert f"refused campaign.sync_rejected.v1 {form} BACKWARD since 0.1.0  rules, 200 values" in lines
    assert (
        "campaign.sync_rejected.v1 data BACKWARD since 0.1.0: $.note: the 0.1.0 writer may leave it out, "
        "the new reader requires it. Fix: make it optional in the model, or "
        'publish campaign.sync_rejected.v2 beside v1: schemas/README.md, "A new version".'
    ) in lines


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "topics.json").write_text("{}"), "0.1.0/topics.json was changed"),
        (lambda folder: (folder / "topics.json").unlink(), "0.1.0/topics.json is gone"),
        (lambda folder: (folder / "more.json").write_text("{}"), "0.1.0/more.json was added"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "0.1.0/topics.json was added"),
    ],
    ids=["changed", "gone", "added", "no sums"],
)
def test_a_changed_release_is_found(
    repository: Path, break_it: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    compatibility.release(repository, rejected())
    assert list(releases.broken(repository)) == []
    break_it(repository / "schemas" / "released" / "0.1.0")
    assert compatibility.check(repository, rejected()) == 1
    assert said in capsys.readouterr().out


def test_a_version_without_a_folder_is_found_and_a_folder_without_a_version(repository: Path) -> None:
    [sentence] = releases.broken(repository)
    assert "CHANGELOG.md has a release 0.1.0, schemas/released has not" in sentence
    compatibility.release(repository, rejected())
    _headings(repository)
    [sentence] = releases.broken(repository)
    assert "schemas/released/0.1.0 is not in CHANGELOG.md" in sentence


def test_a_heading_without_a_day_is_found(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _headings(repository, "## 0.1.0")
    with pytest.raises(Unreleasable, match="no day"):
        releases.changelog(repository)
    assert compatibility.check(repository, rejected()) == 1


def test_releases_are_in_the_order_of_their_numbers(repository: Path) -> None:
    for version in ("0.10.0", "0.2.0", "0.9.1"):
        releases.release(rejected(), version, repository)
    assert [one.version for one in releases.released(repository)] == ["0.2.0", "0.9.1", "0.10.0"]


def test_an_argument_that_nobody_knows_is_no_check() -> None:
    assert compatibility.main(["relase"]) == 2


def test_the_contract_fits_everything_that_was_released() -> None:
    """With few values; `make compat` tries more."""
    assert list(releases.broken()) == []
    done = compare(releases.current(), releases.released(), releases.changelog(), count=10)
    assert [sentence for one in done for sentence in one.told()] == []
