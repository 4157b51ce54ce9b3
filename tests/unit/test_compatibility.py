"""The gate of the contracts: what passes, what is refused, where and with which fix."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import strategies as st
from pydantic import AwareDatetime, BaseModel, Field, WithJsonSchema, create_model

from schemas import door, events
from schemas.catalogue import CHANNELS, DEAD_LETTER_HEADERS
from schemas.events import NO_NUL, CampaignId, Count, Stats
from schemas.tools import compatibility, releases, rules, values
from schemas.tools.compatibility import Check, Direction, compare
from schemas.tools.json_schema import Form, Schema, shaped
from schemas.tools.releases import Contract

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

    `forward`, `backward`, `itself`, `promise`: JSON path at which this direction is refused, in the data or, without
    `is_data`, in the whole event; "" where it passes. `fix`: part of the sentence, else that a new version stands
    beside the old one.
    `unseen`: directions in which the rules refuse and no value can show why, for the reason `because`.
    """

    name: str
    event_type: str = events.PAUSED
    model: type[BaseModel] | None = None
    documents: Callable[[dict[str, Schema]], None] | None = None
    forward: str = ""
    backward: str = ""
    itself: str = ""
    promise: str = ""
    fix: str = ""
    unseen: tuple[Direction, ...] = ()
    because: str = ""
    is_data: bool = True

    @property
    def refused(self) -> dict[Direction, str]:
        """Direction -> path."""
        places = zip(Direction, (self.forward, self.backward, self.itself, self.promise), strict=True)
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
stats_updated, sync_rejected, paused = of(events.STATS_UPDATED), of(events.SYNC_REJECTED), of(events.PAUSED)


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
NULLABLE = Annotated[
    dict[str, int] | None,
    WithJsonSchema({"type": ["object", "null"], "additionalProperties": {"type": "integer"}}),
]
PASS = [
    Change("nothing", **paused()),
    Change("an optional field is added", **paused(note=(str | None, None))),
    Change("an optional object is added", **paused(note=(Note | None, None))),
    Change("an optional list is added", **paused(notes=(list[Note] | None, None))),
    Change("an optional field of a nested object is added", **of_campaign(stats=(MORE_STATS, ...))),
    Change("an optional field that the service reads goes", **sync_requested("reason")),
    Change("a listed value is added", **paused(reason=(listed("bounce_rate", "complaints"), ...))),
    Change("a better description", **paused(version=(int, Field(description="Told better.", title="Version")))),
    Change("readers take what is below the minimum", **paused(sent=(int, Field(**narrower(minimum=0))))),
    Change("readers take fractions too", **paused(rate_bp=(float, Field(ge=0, **narrower(type="integer"))))),
    Change("writers send less", **paused(sent=(Count, Field(**narrower(minimum=1))))),
    Change("writers never pause beyond a bound", **paused(version=(int, Field(**narrower(maximum=5))))),
    Change("writers send plain text", **status_changed(to_status=(PLAIN_TEXT, ...))),
    Change("what was any JSON is told", **of_campaign(skip_other_campaigns=(object, Field(**narrower(type="null"))))),
    Change("fields in another order", **paused("campaign_id", campaign_id=(events.LowerId, ...))),
    Change("a model gets another name", event_type=events.STATS_UPDATED, documents=_renamed_definition),
    Change("an attribute is added", **attribute("tracestate", type="string")),
]
WIDENING = "the narrower pattern is within the wider one, which the rules cannot show"
NO_VALUES = "no values of the new writer can be made up"
NO_VALUE = "a field or a listed value that is never written shows in no value"
FORWARD, BACKWARD, ITSELF, PROMISE = Direction
FAIL = [
    Change(
        "a required field goes",
        **paused("rate_bp"),
        forward="$.rate_bp",
        promise="$.rate_bp",
        fix="keep it required in the model, or publish campaign.paused.v2 beside v1: schemas/README.md",
    ),
    Change(
        "a required field is added",
        **paused(note=(str, ...)),
        backward="$.note",
        fix="make it optional in the model, or publish campaign.paused.v2 beside v1: schemas/README.md",
    ),
    Change(
        "a field is renamed",
        **paused("rate_bp", rate=(Count, ...)),
        forward="$.rate_bp",
        backward="$.rate",
        promise="$.rate_bp",
    ),
    Change("an optional field is required", **stats_updated(drift=(dict[str, int], ...)), backward="$.drift"),
    Change(
        "a required field is optional", **paused(pending=(Count | None, None)), forward="$.pending", promise="$.pending"
    ),
    Change(
        "a required field may be null", **paused(pending=(Count | None, ...)), forward="$.pending", promise="$.pending"
    ),
    Change("null is no longer taken", **of_campaign(daily_limit=(int, ...)), backward="$.campaign.daily_limit"),
    Change(
        "a number is text", **paused(rate_bp=(str, ...)), forward="$.rate_bp", backward="$.rate_bp", promise="$.rate_bp"
    ),
    Change(
        "a whole number may be a fraction",
        **paused(rate_bp=(float, Field(ge=0))),
        forward="$.rate_bp",
        promise="$.rate_bp",
    ),
    Change(
        "a boolean is a number",
        **of_campaign(stop_on_reply=(int | None, ...)),
        forward="$.campaign.stop_on_reply",
        backward="$.campaign.stop_on_reply",
        promise="$.campaign.stop_on_reply",
    ),
    Change("a field may hold anything", **paused(pending=(object, ...)), forward="$.pending", promise="$.pending"),
    Change("a minimum is raised", **paused(sent=(int, Field(ge=1))), backward="$.sent"),
    Change("a minimum goes", **paused(sent=(int, ...)), forward="$.sent", promise="$.sent"),
    Change("a maximum is set", **paused(rate_bp=(int, Field(ge=0, le=10_000))), backward="$.rate_bp"),
    Change("text must not be empty", **of_campaign(name=(str, Field(min_length=1))), backward="$.campaign.name"),
    Change("text must be short", **of_campaign(name=(str, Field(max_length=5))), backward="$.campaign.name"),
    Change("text gets a pattern", **of_campaign(name=(str, Field(pattern="^[a-z]+$"))), backward="$.campaign.name"),
    Change("text is an id", **of_campaign(name=(UUID, ...)), backward="$.campaign.name"),
    Change("a time is any text", **paused(paused_at=(str, ...)), forward="$.paused_at", promise="$.paused_at"),
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
        promise="$.trigger",
        unseen=(PROMISE,),
        because=NO_VALUE,
    ),
    Change(
        "a required field of a nested object goes",
        **of_campaign(stats=(LESS_STATS, ...)),
        forward="$.campaign.stats.total",
        promise="$.campaign.stats.total",
    ),
    Change(
        "counts by status are text",
        **paused(prospects_by_status=(dict[str, str], ...)),
        forward="$.prospects_by_status.*",
        backward="$.prospects_by_status.*",
        promise="$.prospects_by_status.*",
    ),
    Change(
        "counts by status are a list",
        **paused(prospects_by_status=(list[Count], ...)),
        forward="$.prospects_by_status",
        backward="$.prospects_by_status",
        promise="$.prospects_by_status",
    ),
    Change(
        "writers send what their own readers refuse",
        **paused(sent=(Count, Field(**narrower(minimum=-1)))),
        forward="$.sent",
        itself="$.sent",
        promise="$.sent",
    ),
    Change(
        "a constant is another",
        **attribute("source", const="s"),
        forward="$.source",
        backward="$.source",
        promise="$.source",
    ),
    Change(
        "a constant is any text",
        **attribute("specversion", type="string"),
        forward="$.specversion",
        promise="$.specversion",
    ),
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
        promise="$.window",
        fix="teach it to schemas/tools/",
        unseen=(FORWARD, ITSELF, PROMISE),
        because=NO_VALUES,
    ),
    Change(
        "a reference that leads nowhere",
        **in_event(lambda schema: schema["properties"].update(data={"$ref": "#/$defs/Gone"}), "writer"),
        forward="$",
        itself="$",
        promise="$",
        fix="teach it to schemas/tools/",
        unseen=(FORWARD, ITSELF, PROMISE),
        because=NO_VALUES,
    ),
    # What every released reader takes, and a subscriber may have relied on all the same.
    Change(
        "an optional field goes",
        **stats_updated("drift"),
        promise="$.drift",
        fix="keep it in the model, or publish campaign.stats_updated.v2 beside v1: schemas/README.md",
        unseen=(PROMISE,),
        because=NO_VALUE,
    ),
    Change(
        "an optional field of a nested object goes",
        **of_campaign(stats=(variant(Stats, "connected"), ...)),
        promise="$.campaign.stats.connected",
        unseen=(PROMISE,),
        because=NO_VALUE,
    ),
    Change(
        "an optional attribute goes",
        **in_event(lambda schema: schema["properties"].pop("causationid")),
        promise="$.causationid",
        fix="keep it in the model, or publish",
        unseen=(PROMISE,),
        because=NO_VALUE,
    ),
    Change(
        "a listed value goes",
        **stats_updated(trigger=(listed("reconciliation"), ...)),
        promise="$.trigger",
        fix="keep it in the model, or publish",
        unseen=(PROMISE,),
        because=NO_VALUE,
    ),
    Change(
        "a listed value is renamed",
        **sync_rejected(reason=(listed("gone", "failed"), ...)),
        promise="$.reason",
        fix="keep it in the model, or publish",
        unseen=(PROMISE,),
        because=NO_VALUE,
    ),
    Change(
        "ids in any case",
        **paused(campaign_id=(UUID, ...)),
        promise="$.campaign_id",
        fix="let the model write only what it promised, or publish campaign.paused.v2 beside v1",
    ),
    Change("times in any zone", **paused(paused_at=(AwareDatetime, ...)), promise="$.paused_at"),
    Change("what was left out may be null", **stats_updated(drift=(NULLABLE, None)), promise="$.drift"),
]


@pytest.mark.parametrize("change", PASS, ids=lambda change: change.name)
def test_a_change_that_breaks_nobody_passes(change: Change) -> None:
    done = checks(change)
    assert [sentence for one in done for sentence in one.told()] == []
    read = {(one.form, one.direction): one.tried for one in done if one.of == change.event_type and one.form != "topic"}
    directions = set(Direction) - ({PROMISE} if CHANNEL[change.event_type].is_read else set())
    assert set(read) == {(form, direction) for form in releases.FORMS for direction in directions}
    assert all(read.values())


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
    pairs = {FORWARD: (new, old), BACKWARD: (old, new), ITSELF: (new, new), PROMISE: (new, old)}
    for direction in change.refused:
        writer = pairs[direction][0].schema(change.event_type, form, "writer")
        reader = pairs[direction][1].schema(change.event_type, form, "reader")
        if direction is PROMISE:
            reader = rules.opened(old.schema(change.event_type, form, "writer"))
        if direction in change.unseen and change.because == NO_VALUES:
            with pytest.raises(rules.Unshown):
                values.tried(writer, reader, COUNT)
        else:
            tried, example = values.tried(writer, reader, COUNT)
            assert tried > 0
            assert (example is None) is (direction in change.unseen)


# The names: topics, dead letters, the door.

STATUSES = releases.current([]).door["statuses"]


def named(of: str, part: str, **other: object) -> Contract:
    """The contract of one event type with other names for its topic, the dead letters or the door."""
    new = releases.current([CHANNEL[of]])
    topics: dict[str, object] = {of: {**new.topics[of], **other}}
    parts: dict[str, dict[str, object]] = {
        "topics": topics,
        "dead_letters": {**new.dead_letters, **other},
        "door": {**new.door, **other},
    }
    return replace(new, **{part: parts[part]})  # type: ignore[arg-type]  # the name decides


@pytest.mark.parametrize(
    ("of", "what", "other", "said"),
    [
        (events.PAUSED, "topic", "campaign.stopped", "it was `campaign.paused` in 0.1.0 and is `campaign.stopped` now"),
        (events.PAUSED, "written_by", "you", "it was `the service` in 0.1.0 and is `you` now"),
        (events.PAUSED, "key", "", "it was `^[0-9a-f]{8}(?:-"),
        (events.PAUSED, "content_type", "application/json", "it was `application/cloudevents+json` in 0.1.0"),
        (events.PAUSED, "modes", ["structured", "binary"], "it was `['structured']` in 0.1.0"),
        (events.SYNC_REQUESTED, "modes", ["structured"], "`binary` is gone, and neighbours may rely on it"),
    ],
)
def test_what_a_topic_is_does_not_change(of: str, what: str, other: object, said: str) -> None:
    [sentence] = refused(named(of, "topics", **{what: other}), released(of))
    assert sentence.startswith(f"{of} topic FORWARD since 0.1.0: {what}: {said}")
    assert f"publish {of.removesuffix('1')}2 beside v1: schemas/README.md" in sentence


@pytest.mark.parametrize(
    ("part", "what", "other", "said"),
    [
        ("dead_letters", "topic", "dead", "topic: it was `campaign-stats.dead-letters` in 0.1.0 and is `dead` now"),
        ("dead_letters", "headers", list(DEAD_LETTER_HEADERS)[1:], "headers: `dead-letter-topic` is gone"),
        ("dead_letters", "reasons", ["not_json"], "reasons: `unreadable`, `too_large`, `not_utf8`, `not_cloudevent`"),
        ("door", "path", "/sync", "path: it was `/api/campaigns/{id}/sync-stats` in 0.1.0 and is `/sync` now"),
        ("door", "method", "PUT", "method: it was `POST` in 0.1.0 and is `PUT` now"),
        ("door", "statuses", {**STATUSES, "429": []}, "statuses.429: `Retry-After` is gone"),
        ("door", "statuses", {one: STATUSES[one] for one in STATUSES if one != "404"}, "statuses: `404` is gone"),
    ],
)
def test_names_of_dead_letters_and_of_the_door_stay(part: str, what: str, other: object, said: str) -> None:
    [sentence] = refused(named(events.PAUSED, part, **{what: other}), released(events.PAUSED))
    whose = "dead letters topic" if part == "dead_letters" else "sync-stats door call"
    assert sentence.startswith(f"{whose} FORWARD since 0.1.0: {said}")
    assert "Fix: leave it `" in sentence or "Fix: keep `" in sentence
    assert "beside" in sentence


@pytest.mark.parametrize(
    ("part", "what", "more"),
    [
        ("topics", "modes", ["structured", "binary", "batched"]),
        ("dead_letters", "headers", [*DEAD_LETTER_HEADERS, "dead-letter-host"]),
        ("dead_letters", "reasons", [*map(str, events.DeadLetterReason), "too_old"]),
        ("door", "statuses", {**STATUSES, "400": ["Retry-After"], "410": []}),
    ],
)
def test_more_names_break_nobody(part: str, what: str, more: object) -> None:
    assert refused(named(events.SYNC_REQUESTED, part, **{what: more}), released(events.SYNC_REQUESTED)) == []


def answering(model: type[BaseModel], form: str = "answer") -> Contract:
    """The contract without events, with another answer of the door."""
    new = releases.current([])
    return replace(new, door={**new.door, form: {side: shaped(model, side) for side in releases.SIDES}})


def answer(**fields: Any) -> type[BaseModel]:
    """The door's answer with a campaign that has other fields."""
    return variant(door.SyncStatsAnswer, campaign=(variant(door.SyncedCampaign, **fields), ...))


ACCOUNT = variant(door.SenderAccount, id=(UUID, ...))


@pytest.mark.parametrize(
    ("new", "refusals"),
    [
        (answering(answer(note=(str | None, None))), {}),
        (answering(answer(type=(listed("email", "linkedin", "letter"), ...))), {}),
        (answering(answer(note=(str, ...))), {BACKWARD: "$.campaign.note"}),
        (answering(answer(signature=(str | None, None))), {FORWARD: "$.campaign.signature", PROMISE: "$.campaign.sig"}),
        (answering(answer(type=(listed("email"), ...))), {PROMISE: "$.campaign.type"}),
        (answering(answer(sender_accounts=(list[ACCOUNT], ...))), {PROMISE: "$.campaign.sender_accounts[*].id"}),  # type: ignore[valid-type]
        (answering(variant(door.SyncStatsAnswer, "prospects_by_status")), {PROMISE: "$.prospects_by_status"}),
        (answering(variant(door.DoorError, "error"), "error"), {FORWARD: "$.error", PROMISE: "$.error"}),
    ],
)
def test_an_answer_of_the_door_is_held_like_an_event(new: Contract, refusals: dict[Direction, str]) -> None:
    done = list(compare(new, [replace(releases.current([]), version="0.1.0")], count=COUNT))
    found = {one.direction: one for one in done if one.refusals}
    assert found.keys() == refusals.keys()
    for direction, path in refusals.items():
        told = "\n".join(found[direction].told())
        assert f"{direction} since 0.1.0: {path}" in told
        assert "answer so at a path of its own" in told


# Event types come and go, releases add up.


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
    assert {(one.direction, one.since) for one in found} == {(one, "0.1.0") for one in (FORWARD, BACKWARD, PROMISE)}


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


def test_an_argument_that_nobody_knows_is_no_check() -> None:
    assert compatibility.main(["relase"]) == 2


def test_the_contract_fits_everything_that_was_released() -> None:
    """With few values; `make compat` tries more."""
    assert list(releases.broken()) == []
    done = compare(releases.current(), releases.released(), releases.history(), count=10)
    assert [sentence for one in done for sentence in one.told()] == []
