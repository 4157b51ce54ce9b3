"""The bounce guard's rule: integers in, a verdict out. Nothing here reads a clock, a database or a float."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Literal

MOST: Final = 2**31 - 1  # as the columns of guard_limits and the window's query take
BASIS_POINTS: Final = 10_000

Level = Literal["default", "user", "campaign"]
Field = Literal["mode", "threshold_bp", "min_sent", "window"]


class Mode(StrEnum):
    """What the guard does when its rule says `trip`."""

    ENFORCE = "enforce"
    OBSERVE = "observe"
    OFF = "off"


class Verdict(StrEnum):
    """The first that applies, in this order."""

    OFF = "off"
    NOT_EMAIL = "not_email"
    NOT_ACTIVE = "not_active"
    TOO_FEW_SENT = "too_few_sent"
    BELOW_RATE = "below_rate"
    TRIP = "trip"


@dataclass(frozen=True, slots=True)
class Limits:
    """`threshold_bp` basis points (1-10 000), `min_sent` contacts (>= 1), `window` (0 = all, else >= min_sent).

    The defaults are the rule of design section 3: 5 % of at least 100, over the latest 500.
    """

    mode: Mode = Mode.ENFORCE
    threshold_bp: int = 500
    min_sent: int = 100
    window: int = 500

    def problems(self) -> list[str]:
        """What is wrong with this combination, a sentence each; empty when it can be used."""
        found = []
        if not 1 <= self.threshold_bp <= BASIS_POINTS:
            found.append(f"threshold_bp is {self.threshold_bp}: use 1 to {BASIS_POINTS} basis points")
        if not 1 <= self.min_sent <= MOST:
            found.append(f"min_sent is {self.min_sent}: use 1 to {MOST}")
        if self.window != 0 and not self.min_sent <= self.window <= MOST:
            found.append(f"window is {self.window}: use 0 (all), or min_sent ({self.min_sent}) to {MOST}")
        return found


@dataclass(frozen=True, slots=True)
class Override:
    """Limits of one campaign or one user; None = the next level decides. `mode` is text because people write it."""

    mode: str | None = None
    threshold_bp: int | None = None
    min_sent: int | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """Limits that hold for a campaign, where each came from, and what had to be ignored (one sentence a level)."""

    limits: Limits
    origin: dict[Field, Level]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """What the guard looks at: contacted prospects in the current window, and how many of those bounced (<= sent)."""

    sent: int
    bounced: int


def resolve(default: Limits, user: Override | None, campaign: Override | None) -> Resolved:
    """Merge the levels, per field campaign > user > default.

    The combination is checked after merging; when it is wrong the most specific level that mends it is ignored.
    """
    if user is None and campaign is None:
        return Resolved(
            default, {"mode": "default", "threshold_bp": "default", "min_sent": "default", "window": "default"}
        )
    ignored: list[str] = []
    layers: list[tuple[Level, Override]] = []
    for level, override in (("user", user), ("campaign", campaign)):
        if override is None:
            continue
        if override.mode is not None and override.mode not in set(Mode):
            ignored.append(f"{level} limits: mode is not one of enforce, observe, off")
        else:
            layers.append((level, override))  # type: ignore[arg-type]  # the loop's literals are exactly Level
    choices = [layers, *([layer] for layer in layers if len(layers) == 2), []]
    for chosen in choices:
        limits, origin = _merge(default, chosen)
        problems = limits.problems()
        if not problems:
            return Resolved(limits, origin, tuple(ignored))
        ignored.append(f"{' and '.join(level for level, _ in chosen) or 'default'} limits: {'; '.join(problems)}")
    raise ValueError("; ".join(default.problems()))


def _merge(default: Limits, layers: list[tuple[Level, Override]]) -> tuple[Limits, dict[Field, Level]]:
    limits = default
    origin: dict[Field, Level] = {
        "mode": "default",
        "threshold_bp": "default",
        "min_sent": "default",
        "window": "default",
    }
    for level, override in layers:
        if override.mode is not None:
            limits, origin["mode"] = replace(limits, mode=Mode(override.mode)), level
        if override.threshold_bp is not None:
            limits, origin["threshold_bp"] = replace(limits, threshold_bp=override.threshold_bp), level
        if override.min_sent is not None:
            limits, origin["min_sent"] = replace(limits, min_sent=override.min_sent), level
        if override.window is not None:
            limits, origin["window"] = replace(limits, window=override.window), level
    return limits, origin


def is_candidate(counts: Mapping[str, int], limits: Limits, *, paused_before: bool) -> bool:
    """Whether the window must be read: False only if the rule cannot trip whatever the window holds.

    `counts` are exclusive counts per status. Cancelled prospects are left out of S because only some were contacted;
    that makes S smaller and the filter more careful. After a guard pause the window may be as short as min_sent.
    """
    bounced = counts.get("bounced", 0)
    contacted = sum(counts.get(status, 0) for status in ("sent", "replied", "bounced", "completed", "timed_out"))
    fewest = limits.min_sent
    if not paused_before:
        fewest = max(fewest, min(contacted, limits.window) if limits.window else contacted)
    return bounced * BASIS_POINTS >= limits.threshold_bp * fewest


def applies(campaign_type: str, status: str, mode: Mode) -> Verdict | None:
    """The verdict that needs no numbers, or None when the window decides."""
    if mode is Mode.OFF:
        return Verdict.OFF
    if campaign_type != "email":
        return Verdict.NOT_EMAIL
    if status != "active":
        return Verdict.NOT_ACTIVE
    return None


def judge(campaign_type: str, status: str, limits: Limits, window: Window) -> Verdict:
    """The rule: `S >= min_sent and B * 10_000 >= threshold_bp * S` (design, section 3)."""
    verdict = applies(campaign_type, status, limits.mode)
    if verdict is not None:
        return verdict
    if window.sent < limits.min_sent:
        return Verdict.TOO_FEW_SENT
    if window.bounced * BASIS_POINTS < limits.threshold_bp * window.sent:
        return Verdict.BELOW_RATE
    return Verdict.TRIP


def rate_bp(window: Window) -> int:
    """Bounce rate in basis points, floored; 0 when nothing was sent."""
    return window.bounced * BASIS_POINTS // window.sent if window.sent else 0


def bounces_left(limits: Limits, window: Window) -> int:
    """How many more bounces among the prospects contacted so far the rule would still bear before it trips."""
    needed = -(-limits.threshold_bp * max(window.sent, limits.min_sent) // BASIS_POINTS)  # ceil
    return max(0, needed - window.bounced)
