"""Version 2 of an event beside version 1, tried out with an invented one: schemas/README.md, "A new version"."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import TypeVar
from uuid import UUID, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consumer import envelope
from consumer.envelope import Cause, DeadLetter, StatusHint
from schemas import events, topics
from schemas.catalogue import CHANNELS, Channel
from schemas.events import CampaignPausedV1, Count, Envelope, LowerId, Moment
from schemas.tools import releases
from schemas.tools.compatibility import compare
from schemas.tools.releases import Contract
from schemas.topics import Topics
from tests.unit import builders
from tests.unit.builders import CAMPAIGN, NOW, OWNER, structured

PAUSED_V2 = "campaign.paused.v2"
TOPIC_V2 = "campaign.paused.v2"
V1 = next(channel for channel in CHANNELS if channel.type == events.PAUSED)


class CampaignPausedV2(BaseModel):
    """The bounce guard paused a campaign. The rate is in parts per million now, and who decided is named."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    campaign_id: LowerId = Field(description="The campaign, in lower case.")
    version: int = Field(description="The same as of v1 and of the stats_updated that comes with it.")
    rate_ppm: Count = Field(description="Bounce rate in parts per million.")
    decided_by: str = Field(description="Who paused it.")
    paused_at: Moment = Field(description="When it was paused, UTC.")


V2 = replace(V1, type=PAUSED_V2, model=CampaignPausedV2)

Data = TypeVar("Data", CampaignPausedV1, CampaignPausedV2)
Record = tuple[str, bytes]  # topic and value


@pytest.fixture(autouse=True, scope="module")
def _topic_of_v2() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(topics.TOPIC_OF, PAUSED_V2, TOPIC_V2)
        yield


def contract(*channels: Channel, version: str | None = None) -> Contract:
    """Of these channels alone."""
    return replace(releases.current(channels), version=version)


def refused(new: Contract, *earlier: Contract, history: Iterable[releases.Release] = ()) -> list[str]:
    """What the gate says against it."""
    return [sentence for one in compare(new, earlier, list(history), 40) for sentence in one.told()]


# How it is introduced, and how long both are published.


def test_both_versions_have_documents_and_a_topic_of_their_own() -> None:
    both = contract(V1, V2)
    for type_, required in ((events.PAUSED, "rate_bp"), (PAUSED_V2, "rate_ppm")):
        for form in releases.FORMS:
            for side in releases.SIDES:
                assert both.schema(type_, form, side)["$id"] == f"urn:campaign-stats:{type_}:{form}:{side}"
        assert both.schema(type_, "event", "reader")["properties"]["type"]["const"] == type_
        assert required in both.schema(type_, "data", "writer")["required"]
    assert [one["topic"] for one in both.topics.values()] == ["campaign.paused", "campaign.paused.v2"]
    assert Topics("eu.").of(PAUSED_V2) == "eu.campaign.paused.v2"


def test_the_gate_takes_v2_beside_v1_and_nothing_else() -> None:
    before = contract(V1, version="0.1.0")
    assert refused(contract(V1, V2), before) == []
    [gone] = refused(contract(V2), before)
    assert gone.startswith("campaign.paused.v1 topic FORWARD since 0.1.0: type: the event type is gone")
    assert 'keep it beside the new version: schemas/README.md, "A new version"' in gone
    in_place = refused(contract(replace(V1, model=CampaignPausedV2)), before)
    assert [told for told in in_place if "FORWARD since 0.1.0: $.data.rate_bp: the new writer may leave it out" in told]
    assert [told for told in in_place if "BACKWARD since 0.1.0: $.data.rate_ppm: the 0.1.0 writer may leave it" in told]
    assert all("publish campaign.paused.v2 beside v1" in told for told in in_place if not told.startswith(" "))


def test_the_gate_refuses_v2_on_the_topic_of_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(topics.TOPIC_OF, PAUSED_V2, V1.topic)
    sentences = refused(contract(V1, V2), contract(V1, version="0.1.0"))
    assert any("`campaign.paused` also has campaign.paused.v2" in sentence for sentence in sentences)


DEPRECATED = "### Deprecated\n- `campaign.paused.v1`; read `campaign.paused.v2`.\n"


@pytest.mark.parametrize(
    ("headings", "why"),
    [
        ("## 0.2.0 - 2027-01-01\n", "no release names `campaign.paused.v1` under `### Deprecated`"),
        (f"## 0.2.0 - 2027-01-01\n{DEPRECATED}", "of 2 minor releases after 0.2.0, which deprecated it, there were 0"),
        (
            f"## 0.3.1 - 2027-06-01\n## 0.3.0 - 2027-05-01\n## 0.2.1 - 2027-04-01\n## 0.2.0 - 2027-01-01\n{DEPRECATED}",
            "of 2 minor releases after 0.2.0, which deprecated it, there were 1",
        ),
        (
            f"## 0.4.0 - 2027-03-31\n## 0.3.0 - 2027-02-01\n## 0.2.0 - 2027-01-01\n{DEPRECATED}",
            "0.2.0 deprecated it; releases must have it for 90 days, until 2027-04-01",
        ),
        (f"## 0.4.0 - 2027-04-01\n## 0.3.0 - 2027-02-01\n## 0.2.0 - 2027-01-01\n{DEPRECATED}", ""),
        (f"## 1.1.0 - 2027-04-01\n## 1.0.0 - 2027-02-01\n## 0.2.0 - 2027-01-01\n{DEPRECATED}", ""),
    ],
    ids=[
        "not deprecated",
        "just deprecated",
        "one minor release",
        "too early by a day",
        "done",
        "over a major release",
    ],
)
def test_v1_goes_two_minor_releases_and_90_days_after_it_was_deprecated(
    headings: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## Unreleased\n\n{headings}\n## 0.1.0 - 2026-11-28\n")
    sentences = refused(
        contract(V2),
        contract(V1, version="0.1.0"),
        contract(V1, V2, version="0.2.0"),
        history=releases.changelog(tmp_path),
    )
    assert bool(sentences) is bool(why)
    assert all(why in sentence for sentence in sentences)


def test_v1_does_not_go_by_a_heading_written_afterwards(tmp_path: Path) -> None:
    """The days and the deprecated types are those that were released."""
    headings = "## 0.4.0 - 2026-07-01\n## 0.3.0 - 2026-05-01\n## 0.2.0 - 2026-03-01\n{}## 0.1.0 - 2026-01-01\n"
    (tmp_path / "CHANGELOG.md").write_text(headings.format(""))
    for version in ("0.1.0", "0.2.0", "0.3.0"):
        releases.release(contract(V1, V2), version, tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(headings.format(DEPRECATED))
    before = contract(V1, V2, version="0.3.0")
    [sentence] = refused(contract(V2), before, history=releases.history(tmp_path))
    assert "no release names `campaign.paused.v1` under `### Deprecated`" in sentence
    assert refused(contract(V2), before, history=releases.changelog(tmp_path)) == []  # the control


# What a subscriber sees.


def written(version: int, by: dict[str, Callable[[int], dict[str, object]]]) -> list[Record]:
    """One pause as it leaves the outbox: the same fact in each version of the event, ids apart, `version` the same."""
    names = {events.PAUSED: f"paused:{version}", PAUSED_V2: f"paused.v2:{version}"}
    return [
        (
            Topics().of(type_),
            envelope.encode(
                type=type_,
                id=str(uuid5(CAMPAIGN, names[type_])),
                time=NOW,
                subject=str(CAMPAIGN),
                data=data(version),
            ),
        )
        for type_, data in by.items()
    ]


def _v1(version: int) -> dict[str, object]:
    return {
        "campaign_id": str(CAMPAIGN),
        "user_id": str(OWNER),
        "reason": "bounce_rate",
        "version": version,
        "sent": 120,
        "bounced": 6,
        "rate_bp": 500,
        "threshold_bp": 500,
        "min_sent": 100,
        "window": 500,
        "previous_status": "active",
        "prospects_by_status": {"sent": 114, "bounced": 6},
        "pending": 0,
        "paused_at": envelope.format_time(NOW + timedelta(microseconds=version)),
    }


def _v2(version: int) -> dict[str, object]:
    return {
        "campaign_id": str(CAMPAIGN),
        "version": version,
        "rate_ppm": 50_000,
        "decided_by": "the bounce guard",
        "paused_at": envelope.format_time(NOW + timedelta(microseconds=version)),
    }


def of_topic(stream: Iterable[Record], topic: str) -> list[bytes]:
    """What a subscriber of this topic alone gets."""
    return [value for its_topic, value in stream if its_topic == topic]


def once_per_id(values: Iterable[bytes], model: type[Envelope[Data]]) -> list[Data]:
    """What a subscriber of one version reacts to."""
    seen: set[str] = set()
    reactions: list[Data] = []
    for value in values:
        event = model.model_validate_json(value)
        if event.id not in seen:
            seen.add(event.id)
            reactions.append(event.data)
    return reactions


def once_per_pause(values: Iterable[bytes]) -> list[tuple[UUID, int]]:
    """What a subscriber reacts to that moves over and reads both versions: the pause, in whichever version it came."""
    seen: set[tuple[UUID, int]] = set()
    reactions: list[tuple[UUID, int]] = []
    for value in values:
        is_v2 = json.loads(value)["type"] == PAUSED_V2
        event: Envelope[CampaignPausedV1] | Envelope[CampaignPausedV2]
        event = (Envelope[CampaignPausedV2] if is_v2 else Envelope[CampaignPausedV1]).model_validate_json(value)
        pause = (event.data.campaign_id, event.data.version)
        if pause not in seen:
            seen.add(pause)
            reactions.append(pause)
    return reactions


VERSIONS = [7, 8, 12]


def both_versions() -> list[Record]:
    """Three pauses, each as v1 and as v2."""
    return [record for version in VERSIONS for record in written(version, {events.PAUSED: _v1, PAUSED_V2: _v2})]


@given(repeats=st.lists(st.integers(0, 5), max_size=6), random=st.randoms())
def test_every_reader_sees_each_pause_once(repeats: list[int], random: Random) -> None:
    """At least once, and between topics in any order: repeats and shuffles change nothing."""
    stream = both_versions()
    stream += [stream[number] for number in repeats]
    random.shuffle(stream)

    old = once_per_id(of_topic(stream, "campaign.paused"), Envelope[CampaignPausedV1])
    new = once_per_id(of_topic(stream, "campaign.paused.v2"), Envelope[CampaignPausedV2])
    assert sorted(one.version for one in old) == VERSIONS
    assert sorted(one.version for one in new) == VERSIONS
    assert {(one.rate_bp, one.reason) for one in old} == {(500, "bounce_rate")}
    assert {(one.rate_ppm, one.decided_by) for one in new} == {(50_000, "the bounce guard")}
    assert sorted(once_per_pause(value for _, value in stream)) == [(CAMPAIGN, version) for version in VERSIONS]


def test_each_version_of_an_event_has_a_stable_id_of_its_own() -> None:
    ids = [json.loads(value)["id"] for _, value in both_versions()]
    assert len(set(ids)) == len(ids)
    assert ids == [json.loads(value)["id"] for _, value in both_versions()]


def test_by_ids_alone_a_reader_of_both_would_react_twice() -> None:
    """The control: why who moves over goes by (campaign, version)."""
    assert len({json.loads(value)["id"] for _, value in both_versions()}) == 2 * len(VERSIONS)


def test_a_reader_of_v1_could_not_read_v2() -> None:
    """The control: why v2 has a topic of its own."""
    [v2] = of_topic(written(7, {PAUSED_V2: _v2}), TOPIC_V2)
    with pytest.raises(ValidationError):
        Envelope[CampaignPausedV1].model_validate_json(v2)


# What the service reads.


def test_a_newer_hint_is_a_hint_before_the_service_knows_its_version() -> None:
    event = builders.hint_event(type="prospect.status_changed.v2", data={"campaign_id": str(CAMPAIGN), "moved": [1]})
    assert envelope.decode([structured(event)]) == [StatusHint(CAMPAIGN, Cause("hint-1", "hint-1"), newer=True)]


def test_a_newer_request_is_only_a_hint_without_an_answer() -> None:
    event = builders.request_event(type="campaign.sync_requested.v2", data={"campaign_id": str(CAMPAIGN)})
    assert envelope.decode([structured(event)]) == [StatusHint(CAMPAIGN, None, newer=True)]


def test_a_newer_version_that_names_no_campaign_is_a_dead_letter() -> None:
    event = builders.hint_event(type="prospect.status_changed.v2", data={"campaign": str(CAMPAIGN)})
    [letter] = envelope.decode([structured(event)])
    assert isinstance(letter, DeadLetter)
    assert letter.reason is events.DeadLetterReason.INVALID_CAMPAIGN_ID
