"""The proof from scratch: evidence in, findings out. Shares no code with the service, on purpose."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from consumer.demo import proof_of_pauses
from consumer.demo.evidence import Asked, Campaign, Check, DeadLetter, Event, Evidence, Prospect

REFERENCE: Final = UUID("8c2b2d4e-e29b-41d4-a716-446655440000")
REFERENCE_STATS: Final = '{"total":120,"sent":34,"replied":4,"bounced":1}'

STATS_UPDATED: Final = "campaign.stats_updated.v1"
SYNC_REJECTED: Final = "campaign.sync_rejected.v1"
ALWAYS: Final = ("total", "sent", "replied", "bounced")
WHEN_SOME: Final = ("completed", "timed_out", "connection_sent", "connected", "message_sent")


def prove(evidence: Evidence) -> list[Check]:
    """Every check, in the order to be shown."""
    return [
        stored_stats(evidence.campaigns),
        reference_case(evidence.campaigns),
        healed(evidence.campaigns, evidence.wrong_before),
        followers(evidence.campaigns, evidence.events),
        *proof_of_pauses.prove(evidence),
        answers(evidence.asked, evidence.events),
        dead_letters(evidence.garbage, evidence.dead_letters),
    ]


def recount(prospects: Iterable[Prospect]) -> tuple[dict[str, int], dict[str, int]]:
    """`stats` as documented, in its order, and the number of prospects in every status."""
    by_status: dict[str, int] = defaultdict(int)
    total = 0
    for prospect in prospects:
        by_status[prospect.status] += 1
        total += 1
    stats = {key: total if key == "total" else by_status.get(key, 0) for key in ALWAYS}
    stats.update((key, by_status[key]) for key in WHEN_SOME if by_status.get(key))
    return stats, dict(by_status)


def as_json(stats: Mapping[str, Any]) -> str:
    """Compact JSON in the documented order (jsonb keeps none); foreign keys come last, so that they are seen."""
    keys = [key for key in (*ALWAYS, *WHEN_SOME) if key in stats] + sorted(stats.keys() - {*ALWAYS, *WHEN_SOME})
    return "{" + ",".join(f'"{key}":{stats[key]}' for key in keys) + "}"


def stored_stats(campaigns: Mapping[UUID, Campaign]) -> Check:
    """The stored stats of every campaign; an explicit zero of the product's own writer counts as absent."""
    prospects = sum(len(campaign.prospects) for campaign in campaigns.values())
    check = Check(f"stored stats equal a recount of all {prospects:,} rows (campaigns)".replace(",", " "))
    for campaign in campaigns.values():
        truth, _ = recount(campaign.prospects)
        stored = {key: value for key, value in campaign.stats.items() if value != 0 or key in ALWAYS}
        check.expect(stored == truth, f"{campaign.name}: stored {as_json(stored)}, counted {as_json(truth)}")
    return check


def reference_case(campaigns: Mapping[UUID, Campaign]) -> Check:
    """The one campaign everybody knows the numbers of."""
    check = Check("the reference case is exactly as documented")
    stats = as_json(campaigns[REFERENCE].stats) if REFERENCE in campaigns else "missing"
    check.expect(stats == REFERENCE_STATS, f"it is {stats}")
    return check


def healed(campaigns: Mapping[UUID, Campaign], wrong_before: Iterable[UUID]) -> Check:
    """Campaigns with wrong numbers at the start: the sweep finds them without any hint."""
    check = Check("numbers that were wrong at the start are right (campaigns)")
    for id_ in wrong_before:
        truth, _ = recount(campaigns[id_].prospects)
        right = all(campaigns[id_].stats.get(key, 0) == truth.get(key, 0) for key in (*ALWAYS, *WHEN_SOME))
        check.expect(right, f"{campaigns[id_].name} is still wrong")
    return check


def followers(campaigns: Mapping[UUID, Campaign], events: Iterable[Event]) -> Check:
    """What somebody knows of a campaign who only follows the topic, newest version first."""
    check = Check("a follower's last stats_updated equals the row (campaigns)")
    latest: dict[UUID, Event] = {}
    for event in events:
        if event.type == STATS_UPDATED and (
            event.campaign not in latest or event.data["version"] > latest[event.campaign].data["version"]
        ):
            latest[event.campaign] = event
    for campaign in campaigns.values():
        told = latest[campaign.id].data if campaign.id in latest else None
        truth, by_status = recount(campaign.prospects)
        check.expect(
            told is not None
            and told["campaign"]["stats"] == truth
            and list(told["campaign"]["stats"]) == list(truth)
            and told.get("prospects_by_status", {}) == by_status
            and [told["campaign"][key] for key in ("id", "user_id", "type", "name", "status", "pause_reason")]
            == [str(campaign.id), str(campaign.user_id), campaign.type, campaign.name, campaign.status,
                campaign.pause_reason],
            f"{campaign.name}: told {told and told['campaign']['status']} {told and told['campaign']['stats']},"
            f" is {campaign.status} {truth}",
        )  # fmt: skip
    return check


def answers(asked: Mapping[str, Asked], events: Iterable[Event]) -> Check:
    """Every sync request: one answer (repetitions have its id) of the expected type, found by its causationid."""
    check = Check("every sync request got its one answer (requests)")
    caused: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.cause is not None:
            caused[event.cause].append(event)
    for request_id, request in asked.items():
        got = caused[request_id]
        check.expect(
            len({event.id for event in got}) == 1
            and all(event.type == request.expected and event.campaign == request.campaign for event in got)
            and all(_fits(event) for event in got),
            f"request {request_id}: expected one {request.expected}, got {[event.type for event in got] or 'nothing'}",
        )
    return check


def _fits(answer: Event) -> bool:
    if answer.type == SYNC_REJECTED:
        return answer.data == {"campaign_id": str(answer.campaign), "reason": "not_found"}
    return bool(answer.data["campaign"]["id"] == str(answer.campaign) and answer.data["trigger"] == "sync_requested")


def dead_letters(garbage: Sequence[bytes], letters: Sequence[DeadLetter]) -> Check:
    """What can never be read is kept, byte by byte, and nothing else is."""
    check = Check("what cannot be read is in the dead letters, nothing else is (records)")
    for value in garbage:
        kept = {letter.place: letter.reason for letter in letters if letter.value == value}
        check.expect(list(kept.values()) == ["not_json"], f"{value[:20]!r}... is there as {list(kept.values())}")
    strangers = [letter for letter in letters if letter.value not in garbage]
    if strangers:
        check.problems.append(f"{len(strangers)} others, the first for the reason {strangers[0].reason}")
    return check
