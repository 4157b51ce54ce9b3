"""The contracts: models take what is promised, refuse what is not, agree with the decoder, and need pydantic only."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from pydantic import BaseModel, ValidationError

from consumer.envelope import Cause, DeadLetter, decode, encode
from schemas import events, topics
from schemas.events import (
    CampaignPausedV1,
    CampaignStatsUpdatedV1,
    CampaignSyncRejectedV1,
    CampaignSyncRequestedV1,
    DeadLetterReason,
    Envelope,
    PauseReason,
    ProspectStatusChangedV1,
    RejectionReason,
    Trigger,
)
from schemas.topics import Topics

ROOT = Path(__file__).resolve().parents[2]
PAUSED = ROOT / "schemas" / "examples" / "campaign.paused.v1" / "good" / "six-of-120.json"
CAMPAIGN = "8c2b2d4e-e29b-41d4-a716-446655440000"
USER = "11111111-1111-1111-1111-111111111111"
VALID: dict[type[BaseModel], dict[str, Any]] = {  # Any: tests change single fields
    ProspectStatusChangedV1: {
        "campaign_id": CAMPAIGN,
        "prospect_id": USER,
        "from_status": "pending",
        "to_status": "sent",
        "user_id": USER,
    },
    CampaignSyncRequestedV1: {"campaign_id": CAMPAIGN, "user_id": USER, "reason": "a person asked"},
    CampaignStatsUpdatedV1: {
        "campaign": {
            "id": CAMPAIGN,
            "user_id": USER,
            "type": "email",
            "name": "Q2 Enterprise Outreach",
            "status": "active",
            "daily_limit": 50,
            "stop_on_reply": True,
            "open_tracking": True,
            "skip_other_campaigns": None,
            "stats": {"total": 120, "sent": 34, "replied": 4, "bounced": 1},
            "last_synced_at": "2026-04-22T11:30:00.000001Z",
            "pause_reason": None,
            "created_at": "2026-04-18T15:12:00Z",
            "updated_at": "2026-04-22T11:30:00Z",
        },
        "prospects_by_status": {"pending": 81, "sent": 34, "replied": 4, "bounced": 1},
        "version": 1_776_856_200_000_000,
        "trigger": "reconciliation",
        "drift": {"sent": -2},
    },
    CampaignSyncRejectedV1: {"campaign_id": CAMPAIGN, "reason": "not_found"},
    CampaignPausedV1: {
        "campaign_id": CAMPAIGN,
        "user_id": USER,
        "reason": "bounce_rate",
        "version": 1,
        "sent": 120,
        "bounced": 6,
        "rate_bp": 500,
        "threshold_bp": 500,
        "min_sent": 100,
        "window": 500,
        "previous_status": "active",
        "prospects_by_status": {"sent": 114, "bounced": 6},
        "pending": 0,
        "paused_at": "2026-04-22T11:30:00Z",
    },
}
OPTIONAL = {
    ProspectStatusChangedV1: {"from_status", "user_id"},
    CampaignSyncRequestedV1: {"user_id", "reason"},
    CampaignStatsUpdatedV1: {"prospects_by_status", "drift"},
    CampaignSyncRejectedV1: set(),
    CampaignPausedV1: set(),
}
FIELDS = [(model, field) for model, data in VALID.items() for field in data]


@pytest.mark.parametrize("model", VALID)
def test_a_valid_event_is_taken_whole(model: type[BaseModel]) -> None:
    assert set(VALID[model]) == set(model.model_fields)
    model.model_validate_json(json.dumps(VALID[model]))


@pytest.mark.parametrize(("model", "field"), FIELDS)
def test_exactly_the_optional_fields_may_be_absent(model: type[BaseModel], field: str) -> None:
    data = json.dumps({name: value for name, value in VALID[model].items() if name != field})
    if field in OPTIONAL[model]:
        model.model_validate_json(data)
    else:
        with pytest.raises(ValidationError):
            model.model_validate_json(data)


@pytest.mark.parametrize(
    ("model", "field", "wrong"),
    [
        (CampaignStatsUpdatedV1, "prospects_by_status", {"sent": -1}),
        (CampaignStatsUpdatedV1, "trigger", 1),
        (CampaignSyncRejectedV1, "reason", None),
        (CampaignPausedV1, "reason", []),
        (CampaignPausedV1, "sent", -1),
        (CampaignPausedV1, "paused_at", "yesterday"),
        (CampaignPausedV1, "campaign_id", "x"),
    ],
)
def test_a_reader_refuses_what_is_of_a_wrong_kind(model: type[BaseModel], field: str, wrong: object) -> None:
    with pytest.raises(ValidationError):
        model.model_validate_json(json.dumps({**VALID[model], field: wrong}))


@pytest.mark.parametrize(
    "value", [None, "", "x", 5, [], CAMPAIGN, CAMPAIGN.upper(), CAMPAIGN + "\n", USER, "a\x00", "a\ud800"]
)
@pytest.mark.parametrize(
    ("model", "field"), [pair for pair in FIELDS if pair[0] in (ProspectStatusChangedV1, CampaignSyncRequestedV1)]
)
def test_the_decoder_and_the_model_agree(model: type[BaseModel], field: str, value: object) -> None:
    """The decoder's fast path has types of its own: neither may take what the other refuses."""
    data = {**VALID[model], field: value}
    type_ = events.STATUS_CHANGED if model is ProspectStatusChangedV1 else events.SYNC_REQUESTED
    event = {"specversion": "1.0", "id": "1", "source": "s", "type": type_, "data": data}
    [decoded] = decode([_Bytes(json.dumps(event).encode())])
    try:
        model.model_validate(data)
    except ValidationError:
        is_valid = False
    else:
        is_valid = True
    # A lone surrogate is no text to pydantic; the decoder, which never keeps these fields, lets it pass.
    ignored_surrogate = value == "a\ud800" and field in ("from_status", "reason")
    assert isinstance(decoded, DeadLetter) is not (is_valid or ignored_surrogate)


class _Bytes:
    topic, partition, offset, key, timestamp = "t", 0, 0, None, 0
    headers: tuple[tuple[str, bytes], ...] = ()

    def __init__(self, value: bytes) -> None:
        self.value = value


def test_the_closed_lists_are_those_of_the_contract_in_their_order() -> None:
    assert list(DeadLetterReason) == [
        "unreadable",
        "too_large",
        "not_utf8",
        "not_json",
        "not_cloudevent",
        "unknown_type",
        "invalid_campaign_id",
        "invalid_data",
    ]
    assert list(Trigger) == ["sync_requested", "status_changed", "reconciliation"]
    assert list(RejectionReason) == ["not_found", "failed"]
    assert list(PauseReason) == ["bounce_rate"]


def test_nothing_that_is_written_asks_for_personal_data() -> None:
    written = (CampaignStatsUpdatedV1, CampaignSyncRejectedV1, CampaignPausedV1, events.Campaign)
    names = {name for model in written for name in model.model_fields}
    assert not names & {
        "email",
        "email_address",
        "first_name",
        "last_name",
        "signature",
        "linkedin_url",
        "display_name",
    }


def test_topics_are_those_of_the_contract() -> None:
    names = Topics()
    assert list(names.read) == ["prospect.status-changed", "campaign.sync-requested"]
    assert list(names.written) == ["campaign.stats-updated", "campaign.sync-rejected", "campaign.paused"]
    assert names.dead_letters == "campaign-stats.dead-letters"
    assert list(names.all) == [*names.read, *names.written, names.dead_letters]
    assert {*topics.READ, *topics.WRITTEN} == set(topics.TOPIC_OF)


def test_the_prefix_stands_literally_before_every_name() -> None:
    assert list(Topics("eu.").all) == ["eu." + name for name in Topics().all]
    assert Topics("eu.").of(events.PAUSED) == "eu.campaign.paused"
    with pytest.raises(KeyError):
        Topics().of("nobody.knows.v1")


IMPORT_ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"aiokafka", "asyncpg", "consumer", "orjson", "structlog", "aiohttp", "typer"}:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import %s
"""


def _import_alone(module: str) -> int:
    command = [sys.executable, "-c", IMPORT_ALONE % module]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode  # our own text


def test_schemas_needs_pydantic_only() -> None:
    assert _import_alone("schemas.events, schemas.topics, schemas.catalogue, schemas.door") == 0
    assert _import_alone("consumer.envelope") != 0  # the control: the hook does refuse
    assert (ROOT / "schemas" / "py.typed").exists()


def _needed(distribution: str) -> set[str]:
    """A distribution and all it requires here, by name."""
    found, wanted = set[str](), [distribution]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            texts = metadata.requires(name) or []
            required = [Requirement(text) for text in texts]
            wanted += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def test_schemas_is_imported_where_nothing_but_pydantic_is_installed(tmp_path: Path) -> None:
    distributions = _needed("pydantic")
    assert not distributions & {"aiokafka", "asyncpg", "orjson"}
    for name in distributions:
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top != ".." and not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    (tmp_path / "schemas").symlink_to(ROOT / "schemas")
    begin = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "

    def run(code: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-I", "-S", "-c", begin + code]  # no site-packages
        return subprocess.run(command, capture_output=True, timeout=60, check=False)

    read = "from schemas.events import Envelope, CampaignPausedV1 as P; import schemas.catalogue, schemas.door; "
    ran = run(read + f"Envelope[P].model_validate_json(open({str(PAUSED)!r}).read()); print('read')")
    assert (ran.returncode, ran.stdout) == (0, b"read\n"), ran.stderr.decode()
    for absent in ("aiokafka", "asyncpg"):
        assert b"ModuleNotFoundError" in run(f"import {absent}").stderr


@pytest.mark.parametrize("model", VALID)
def test_patterns_are_ones_that_any_json_schema_validator_knows(model: type[BaseModel]) -> None:
    schema = json.dumps(model.model_json_schema())
    assert "\\\\A" not in schema
    assert "\\\\z" not in schema


@pytest.mark.parametrize("model", VALID)
def test_readers_ignore_fields_they_do_not_know(model: type[BaseModel]) -> None:
    with_news = model.model_validate_json(json.dumps({**VALID[model], "of_next_year": 1}))
    assert with_news == model.model_validate_json(json.dumps(VALID[model]))


def test_a_whole_event_is_read_with_its_envelope() -> None:
    moment = datetime(2026, 4, 18, 15, 12, tzinfo=UTC)
    value = encode(
        type=events.PAUSED, id="1", time=moment, subject=CAMPAIGN, data=VALID[CampaignPausedV1], cause=Cause("h", "c")
    )
    event = Envelope[CampaignPausedV1].model_validate_json(value)
    assert (event.time, str(event.subject), event.causationid, event.correlationid) == (moment, CAMPAIGN, "h", "c")
    assert event.data.reason is PauseReason.BOUNCE_RATE
