"""The bounce guard's rule as a pure function: the documented vectors, its edges, and what must never happen."""

from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from consumer.guard import (
    Limits,
    Mode,
    Override,
    Resolved,
    Verdict,
    Window,
    applies,
    bounces_left,
    is_candidate,
    judge,
    rate_bp,
    resolve,
)

CONTACTED = ("sent", "replied", "bounced", "completed", "timed_out")


@st.composite
def usable_limits(draw: st.DrawFn) -> Limits:
    """Every combination the guard accepts, often near the default."""
    min_sent = draw(st.sampled_from((1, 2, 10, 100)) | st.integers(1, 2_000))
    window = draw(st.sampled_from((0, min_sent, min_sent + 1)) | st.integers(min_sent, 5_000))
    threshold = draw(st.sampled_from((1, 333, 500, 9_999, 10_000)) | st.integers(1, 10_000))
    return Limits(Mode.ENFORCE, threshold, min_sent, window)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Any window; a bounce belongs to its send."""
    sent = draw(st.integers(0, 5_000))
    return Window(sent, draw(st.integers(0, sent)))


@pytest.mark.parametrize(
    ("bounced", "sent", "verdict"),
    [
        (99, 99, Verdict.TOO_FEW_SENT),
        (5, 100, Verdict.TRIP),
        (4, 100, Verdict.BELOW_RATE),
        (5, 101, Verdict.BELOW_RATE),
        (6, 120, Verdict.TRIP),
        (6, 121, Verdict.BELOW_RATE),
        (25, 500, Verdict.TRIP),
        (24, 500, Verdict.BELOW_RATE),
        (0, 0, Verdict.TOO_FEW_SENT),
        (100, 100, Verdict.TRIP),
    ],
)
def test_the_default_rule_is_five_per_cent_of_at_least_a_hundred(bounced: int, sent: int, verdict: Verdict) -> None:
    assert judge("email", "active", Limits(), Window(sent, bounced)) is verdict


@pytest.mark.parametrize(("bounced", "verdict"), [(49, Verdict.BELOW_RATE), (50, Verdict.TRIP)])
def test_without_a_window_all_contacts_are_judged(bounced: int, verdict: Verdict) -> None:
    assert judge("email", "active", Limits(window=0), Window(1_000, bounced)) is verdict


def test_bounces_among_the_oldest_contacts_count_only_without_a_window() -> None:
    oldest_first = [True] * 60 + [False] * 940

    def verdict(limits: Limits, campaign_type: str = "email") -> Verdict:
        latest = oldest_first[-limits.window :] if limits.window else oldest_first
        return judge(campaign_type, "active", limits, Window(len(latest), sum(latest)))

    assert verdict(Limits(window=500)) is Verdict.BELOW_RATE
    assert verdict(Limits(window=0)) is Verdict.TRIP
    assert verdict(Limits(window=0), "linkedin") is Verdict.NOT_EMAIL


@pytest.mark.parametrize(
    ("campaign_type", "status", "mode", "verdict"),
    [
        ("linkedin", "paused", Mode.OFF, Verdict.OFF),
        ("linkedin", "paused", Mode.ENFORCE, Verdict.NOT_EMAIL),
        ("email", "paused", Mode.ENFORCE, Verdict.NOT_ACTIVE),
        ("email", "draft", Mode.OBSERVE, Verdict.NOT_ACTIVE),
        ("email", "launching", Mode.ENFORCE, Verdict.NOT_ACTIVE),
        ("email", "completed", Mode.ENFORCE, Verdict.NOT_ACTIVE),
        ("email", "active", Mode.OBSERVE, Verdict.TRIP),
        ("email", "active", Mode.ENFORCE, Verdict.TRIP),
    ],
)
def test_the_first_verdict_that_applies_stands(campaign_type: str, status: str, mode: Mode, verdict: Verdict) -> None:
    assert judge(campaign_type, status, Limits(mode), Window(100, 100)) is verdict
    assert applies(campaign_type, status, mode) is (None if verdict is Verdict.TRIP else verdict)


@given(usable_limits(), windows())
@example(Limits(), Window(100, 5))
@example(Limits(), Window(101, 5))
def test_the_rule_is_the_exact_fraction(limits: Limits, window: Window) -> None:
    is_over = (
        window.sent >= limits.min_sent
        and window.sent > 0
        and Fraction(window.bounced, window.sent) >= Fraction(limits.threshold_bp, 10_000)
    )
    assert (judge("email", "active", limits, window) is Verdict.TRIP) == is_over


@given(usable_limits(), st.integers(0, 5_000), st.data())
def test_the_rule_turns_exactly_at_its_threshold(limits: Limits, more: int, data: st.DataObject) -> None:
    sent = limits.min_sent + more
    threshold = Fraction(limits.threshold_bp, 10_000) * sent
    fewest = -(-threshold.numerator // threshold.denominator)
    assert judge("email", "active", limits, Window(sent, fewest)) is Verdict.TRIP
    assert judge("email", "active", limits, Window(sent, fewest - 1)) is Verdict.BELOW_RATE


@given(usable_limits(), windows(), st.integers(0, 5_000))
def test_more_bounces_never_untrip(limits: Limits, window: Window, more: int) -> None:
    assume(judge("email", "active", limits, window) is Verdict.TRIP)
    assert (
        judge("email", "active", limits, Window(window.sent, min(window.sent, window.bounced + more))) is Verdict.TRIP
    )


@st.composite
def campaigns(draw: st.DrawFn) -> tuple[dict[str, int], Limits, Window, bool]:
    """Counts, limits and a window that the rows of such a campaign could give, built prospect by prospect."""
    limits = draw(usable_limits().filter(lambda limits: limits.min_sent <= 12))
    limits = Limits(limits.mode, limits.threshold_bp, limits.min_sent, min(limits.window, 30))
    newest_first = draw(st.lists(st.sampled_from((*CONTACTED, "bounced", "cancelled")), max_size=60))
    counts: dict[str, int] = {"pending": draw(st.integers(0, 3))}
    for status in newest_first:
        counts[status] = counts.get(status, 0) + 1
    counts["cancelled"] = counts.get("cancelled", 0) + draw(st.integers(0, 5))  # never contacted
    paused_before = draw(st.booleans())
    since = draw(st.integers(0, len(newest_first))) if paused_before else len(newest_first)
    looked_at = newest_first[:since][: limits.window or None]
    return counts, limits, Window(len(looked_at), looked_at.count("bounced")), paused_before


@given(campaigns())
def test_no_campaign_that_would_trip_is_left_out_of_the_candidates(
    campaign: tuple[dict[str, int], Limits, Window, bool],
) -> None:
    counts, limits, window, paused_before = campaign
    if judge("email", "active", limits, window) is Verdict.TRIP:
        assert is_candidate(counts, limits, paused_before=paused_before)


@pytest.mark.parametrize(
    ("counts", "limits", "paused_before", "expected"),
    [
        ({"sent": 95, "bounced": 5}, Limits(), False, True),
        ({"sent": 96, "bounced": 4}, Limits(), False, False),
        ({"sent": 10, "bounced": 5}, Limits(), False, True),  # cancelled ones may make up the hundred
        ({"sent": 476, "bounced": 24}, Limits(), False, False),
        ({"sent": 400, "completed": 500, "bounced": 25}, Limits(), False, True),  # no more than the window matters
        ({"sent": 400, "completed": 500, "bounced": 25}, Limits(window=0), False, False),
        ({"sent": 476, "bounced": 24}, Limits(), True, True),  # the window after a pause may be short
        ({"sent": 476, "bounced": 4}, Limits(), True, False),
        ({"pending": 1_000}, Limits(), False, False),
    ],
)
def test_the_window_is_read_only_where_it_could_matter(
    counts: dict[str, int], limits: Limits, paused_before: bool, expected: bool
) -> None:
    assert is_candidate(counts, limits, paused_before=paused_before) is expected


USER = Override("observe", 600, 50, 700)
CAMPAIGN = Override("off", 700, 60, 800)


@pytest.mark.parametrize(
    ("user", "campaign", "limits", "origins"),
    [
        (None, None, Limits(), ("default", "default", "default", "default")),
        (Override(), Override(), Limits(), ("default", "default", "default", "default")),
        (USER, None, Limits(Mode.OBSERVE, 600, 50, 700), ("user", "user", "user", "user")),
        (None, CAMPAIGN, Limits(Mode.OFF, 700, 60, 800), ("campaign", "campaign", "campaign", "campaign")),
        (USER, CAMPAIGN, Limits(Mode.OFF, 700, 60, 800), ("campaign", "campaign", "campaign", "campaign")),
        (
            USER,
            Override(threshold_bp=900),
            Limits(Mode.OBSERVE, 900, 50, 700),
            ("user", "campaign", "user", "user"),
        ),
        (
            Override(min_sent=20),
            Override(window=0),
            Limits(Mode.ENFORCE, 500, 20, 0),
            ("default", "default", "user", "campaign"),
        ),
    ],
)
def test_each_field_comes_from_the_most_specific_level(
    user: Override | None, campaign: Override | None, limits: Limits, origins: tuple[str, ...]
) -> None:
    names = ("mode", "threshold_bp", "min_sent", "window")
    assert resolve(Limits(), user, campaign) == Resolved(limits, dict(zip(names, origins, strict=True)))  # type: ignore[arg-type]  # the names above


@pytest.mark.parametrize(
    ("user", "campaign", "limits", "ignored"),
    [
        (Override(min_sent=600), Override(window=700), Limits(min_sent=600, window=700), 0),  # right once merged
        (Override(threshold_bp=0), Override(threshold_bp=900), Limits(threshold_bp=900), 0),
        (Override(threshold_bp=0), None, Limits(), 1),
        (Override(threshold_bp=10_001), None, Limits(), 1),
        (Override(min_sent=0), None, Limits(), 1),
        (Override(window=99), None, Limits(), 1),
        (Override(window=-1), None, Limits(), 1),
        (None, Override("loud", threshold_bp=900), Limits(), 1),
        (Override(threshold_bp=600), Override("loud"), Limits(threshold_bp=600), 1),
        (Override("Enforce", 600), Override(threshold_bp=700), Limits(threshold_bp=700), 1),
    ],
)
def test_a_wrong_level_is_ignored_and_named(
    user: Override | None, campaign: Override | None, limits: Limits, ignored: int
) -> None:
    resolved = resolve(Limits(), user, campaign)
    assert resolved.limits == limits
    assert len(resolved.ignored) == ignored


@pytest.mark.parametrize(
    ("user", "campaign", "limits", "level"),
    [
        (Override(threshold_bp=600), Override(window=99), Limits(threshold_bp=600), "campaign"),
        (Override(window=99), Override(threshold_bp=700), Limits(threshold_bp=700), "user"),
        (Override(min_sent=550, window=560), Override(window=540), Limits(min_sent=550, window=560), "campaign"),
    ],
)
def test_the_other_level_still_holds_when_one_is_wrong(
    user: Override, campaign: Override, limits: Limits, level: str
) -> None:
    resolved = resolve(Limits(), user, campaign)
    assert resolved.limits == limits
    assert any(level in sentence for sentence in resolved.ignored)


overrides = st.none() | st.builds(
    Override,
    st.none() | st.sampled_from((*Mode, "loud")),
    st.none() | st.integers(-1, 10_001),
    st.none() | st.integers(-1, 900),
    st.none() | st.integers(-1, 900),
)


@given(overrides, overrides)
def test_whatever_people_write_into_the_table_the_limits_that_hold_are_usable(
    user: Override | None, campaign: Override | None
) -> None:
    resolved = resolve(Limits(), user, campaign)
    assert resolved.limits.problems() == []
    given_at = {"default": Override("enforce", 500, 100, 500), "user": user, "campaign": campaign}
    for name, level in resolved.origin.items():
        assert getattr(given_at[level], name) == getattr(resolved.limits, name)


@given(usable_limits(), windows())
def test_bounces_left_is_how_many_more_it_takes_to_trip(limits: Limits, window: Window) -> None:
    left = bounces_left(limits, window)
    exact = Fraction(limits.threshold_bp * max(window.sent, limits.min_sent), 10_000) - window.bounced
    assert left == max(0, -(-exact.numerator // exact.denominator))
    if window.sent >= limits.min_sent:
        enough = Window(window.sent, window.bounced + left)
        assert judge("email", "active", limits, enough) is Verdict.TRIP
        if left:
            one_fewer = Window(window.sent, window.bounced + left - 1)
            assert judge("email", "active", limits, one_fewer) is Verdict.BELOW_RATE


@pytest.mark.parametrize(
    ("sent", "bounced", "rate"), [(0, 0, 0), (3, 1, 3_333), (3, 2, 6_666), (121, 6, 495), (7, 7, 10_000)]
)
def test_the_rate_is_floored(sent: int, bounced: int, rate: int) -> None:
    assert rate_bp(Window(sent, bounced)) == rate


@given(windows())
def test_the_shown_rate_never_exceeds_the_true_one(window: Window) -> None:
    if window.sent:
        assert 0 <= Fraction(window.bounced, window.sent) * 10_000 - rate_bp(window) < 1
