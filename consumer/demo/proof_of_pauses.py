"""The proof's part about the bounce guard: the documented rule written a second time, over plain rows."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

from consumer.demo.evidence import Audit, Campaign, Check, Event, Evidence

STATS_UPDATED: Final = "campaign.stats_updated.v1"
PAUSED: Final = "campaign.paused.v1"
MAILED: Final = ("sent", "replied", "bounced", "completed", "timed_out", "cancelled")  # with a contacted_at


def prove(evidence: Evidence) -> list[Check]:
    """Every check of this file, in the order to be shown."""
    return [
        pauses_justified(evidence.campaigns, evidence.events),
        pauses_once(evidence.events, evidence.audits, evidence.resumed),
        pauses_stand(evidence.campaigns, evidence.events, evidence.resumed, evidence.paused_before),
        nobody_missed(evidence.campaigns, evidence.events),
        observed_only(evidence.campaigns, evidence.audits),
    ]


def window_of(
    campaign: Campaign, opened_at: datetime | None, at: datetime | None, *, without_last: bool = False
) -> tuple[int, int]:
    """Contacts and bounces in the campaign's window, from the rows, as they were at a moment (None = now).

    Contacts later than `opened_at` (the guard's pause before) count, the latest `window` of them. `without_last` takes
    the last change before the moment away: its transaction may have been open then, and nobody but itself saw it.
    """
    changes: list[tuple[datetime, UUID, str]] = []
    for row in campaign.prospects:
        if row.contacted_at is None or row.status not in MAILED:
            continue
        changes.append((row.contacted_at, row.id, "contact"))
        if row.status == "bounced":
            changes.append((row.bounced_at or row.contacted_at, row.id, "bounce"))
    changes = [change for change in changes if at is None or change[0] <= at]
    changes.sort(key=lambda change: change[0])
    if without_last and changes:
        changes.pop()
    bounced = {row for _, row, kind in changes if kind == "bounce"}
    contacts = [(moment, row) for moment, row, kind in changes if kind == "contact"]
    contacts = [(moment, row) for moment, row in contacts if opened_at is None or moment > opened_at]
    contacts.sort(key=lambda contact: (contact[0], contact[1].int), reverse=True)
    if campaign.window:
        contacts = contacts[: campaign.window]
    return len(contacts), sum(row in bounced for _, row in contacts)


def distinct_pauses(events: Iterable[Event]) -> dict[UUID, list[Event]]:
    """Per campaign its pauses in order, repetitions left out."""
    seen: dict[str, Event] = {}
    for event in events:
        if event.type == PAUSED:
            seen.setdefault(event.id, event)
    pauses: dict[UUID, list[Event]] = defaultdict(list)
    for event in sorted(seen.values(), key=lambda event: int(event.data["version"])):
        pauses[event.campaign].append(event)
    return pauses


def pauses_justified(campaigns: Mapping[UUID, Campaign], events: Iterable[Event]) -> Check:
    """Every pause: the numbers it names are those of the rows at that moment, and they break the rule."""
    check = Check("every pause is justified by its rows, counted at its moment (pauses)")
    for id_, pauses in distinct_pauses(events).items():
        campaign = campaigns[id_]
        opened_at = None
        for pause in pauses:
            data = pause.data
            at = datetime.fromisoformat(data["paused_at"])
            sent, bounced = data["sent"], data["bounced"]
            possible = [window_of(campaign, opened_at, at), window_of(campaign, opened_at, at, without_last=True)]
            check.expect(
                campaign.type == "email"
                and campaign.mode == "enforce"
                and (sent, bounced) in possible
                and (data["threshold_bp"], data["min_sent"], data["window"])
                == (campaign.threshold_bp, campaign.min_sent, campaign.window)
                and breaks_the_rule(campaign, sent, bounced)
                and data["rate_bp"] == bounced * 10_000 // sent,
                f"{campaign.name}: the pause names {bounced} of {sent} bounced, the rows say"
                f" {possible[0][1]} of {possible[0][0]} (limit {campaign.threshold_bp} bp of {campaign.min_sent})",
            )
            opened_at = at
    return check


def pauses_once(events: Sequence[Event], audits: Iterable[Audit], resumed: Mapping[UUID, int]) -> Check:
    """One pause, one id, one audit row, one stats_updated of the same version that says `paused`."""
    check = Check("one pause: one id, one audit row, one stats_updated of its version (pauses)")
    pauses = distinct_pauses(events)
    written = Counter((audit.campaign, audit.version, audit.sent, audit.bounced) for audit in audits if audit.paused)
    told = {
        (event.campaign, event.data["version"])
        for event in events
        if event.type == STATS_UPDATED and event.data["campaign"]["status"] == "paused"
    }
    named = Counter((pause.campaign, pause.data["version"]) for several in pauses.values() for pause in several)
    for several in pauses.values():
        for pause in several:
            version, sent, bounced = pause.data["version"], pause.data["sent"], pause.data["bounced"]
            check.expect(
                named[pause.campaign, version] == 1
                and written.pop((pause.campaign, version, sent, bounced), 0) == 1
                and (pause.campaign, version) in told,
                f"campaign {pause.campaign}, version {version}: {named[pause.campaign, version]} ids,"
                f" or its audit row or its stats_updated is missing or doubled",
            )
    check.problems += [f"campaign {key[0]}: paused in the audit, but never told" for key in written]
    check.problems += [
        f"campaign {id_}: {len(several)} pauses, though it was resumed {resumed.get(id_, 0)} times"
        for id_, several in pauses.items()
        if not 0 <= len(several) - resumed.get(id_, 0) <= 1
    ]
    return check


def pauses_stand(
    campaigns: Mapping[UUID, Campaign], events: Iterable[Event], resumed: Mapping[UUID, int], before: Iterable[UUID]
) -> Check:
    """Rows and events say the same: who was paused and not resumed is; nobody else, but by its own user."""
    check = Check("who is paused was paused by the guard or by its user, and stays so (campaigns)")
    pauses = distinct_pauses(events)
    by_user = set(before)
    for campaign in campaigns.values():
        often, again = len(pauses.get(campaign.id, ())), resumed.get(campaign.id, 0)
        if often > again:
            expected = ("paused", "bounce_rate")
        elif often:
            expected = ("active", "None")
        elif campaign.id in by_user:
            expected = ("paused", "user")
        elif campaign.status == "paused":
            expected = ("not paused", "None")
        else:
            continue
        check.expect(
            (campaign.status, str(campaign.pause_reason)) == expected,
            f"{campaign.name}: is {campaign.status} ({campaign.pause_reason}), expected {expected[0]} ({expected[1]})",
        )
    return check


def nobody_missed(campaigns: Mapping[UUID, Campaign], events: Iterable[Event]) -> Check:
    """Whoever still sends keeps within the rule."""
    check = Check("no campaign that still sends is over its limit (active email campaigns)")
    pauses = distinct_pauses(events)
    for campaign in campaigns.values():
        if campaign.type == "email" and campaign.status == "active" and campaign.mode == "enforce":
            before = pauses.get(campaign.id)
            opened_at = datetime.fromisoformat(before[-1].data["paused_at"]) if before else None
            sent, bounced = window_of(campaign, opened_at, None)
            check.expect(
                not breaks_the_rule(campaign, sent, bounced),
                f"{campaign.name} is active with {bounced} of {sent} bounced",
            )
    return check


def observed_only(campaigns: Mapping[UUID, Campaign], audits: Iterable[Audit]) -> Check:
    """Mode `observe`: the verdict is written down, nothing is paused."""
    check = Check("a campaign that is only observed is noted, not paused (campaigns)")
    sign = ("observe", "trip", False)
    noted = {audit.campaign for audit in audits if (audit.mode, audit.verdict, audit.paused) == sign}
    for campaign in campaigns.values():
        if campaign.mode == "observe" and breaks_the_rule(campaign, *window_of(campaign, None, None)):
            check.expect(
                campaign.status == "active" and campaign.id in noted,
                f"{campaign.name} is {campaign.status}, noted: {campaign.id in noted}",
            )
    return check


def breaks_the_rule(campaign: Campaign, sent: int, bounced: int) -> bool:
    """At least `min_sent` contacts, and bounces of at least `threshold_bp` basis points; integers only."""
    return sent >= campaign.min_sent and bounced * 10_000 >= campaign.threshold_bp * sent
