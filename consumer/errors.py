"""Everything this service raises on purpose.

ServiceError
  ConfigError     wrong setting, missing table or topic; only at start; all problems listed at once; exit code 2
  InvalidEvent    bytes that can never be read: dead letter, count, go on
  Unavailable     an outage (design, section 6): keep everything, back off with jitter, `degraded`
  NotNow          the door cannot recount this campaign now; ask again in a while
  OwnershipLost   partitions taken away, or a refused commit: drop the work, its new owner repeats it
"""

import traceback
from collections.abc import Sequence
from typing import Final, Literal

from schemas.events import DeadLetterReason

MAY_NOT: Final = "the user may not"
"""How the detail of an Unavailable begins that only a person can end, by giving a right back."""


class ServiceError(Exception):
    """Any of the below."""


class ConfigError(ServiceError):
    """A person must put something right before the service can start. `problems`: one sentence each, with its fix."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class InvalidEvent(ServiceError):
    """Bytes that can never be read. The message names JSON path, expectation and fix, never a value."""

    def __init__(self, reason: DeadLetterReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Unavailable(ServiceError):
    """A dependency is away, full, read-only or not as it should be. Nothing was lost; try again later."""

    def __init__(self, dependency: Literal["database", "kafka", "relay"], detail: str) -> None:
        super().__init__(f"{dependency}: {detail}")
        self.dependency = dependency
        self.detail = detail


class TooSlow(Exception):
    """A statement of a recount was cancelled or waited too long for a lock: an error of that chunk, not an outage.

    `is_lock`: it waited for a lock, which is nobody's failure.
    """

    def __init__(self, *, is_lock: bool) -> None:
        super().__init__("waited too long for a lock" if is_lock else "took longer than statement_timeout")
        self.is_lock = is_lock


class NotWritten(Exception):
    """A trigger or rule of the product let no recount through, without an error: an error of that chunk."""


class NotNow(ServiceError):
    """A call at the door that cannot be served now. `retry_after_s`: whole seconds to wait before asking again."""

    def __init__(self, sentence: str, retry_after_s: int) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class OwnershipLost(ServiceError):
    """The partitions belong to somebody else now."""


def described(error: BaseException) -> dict[str, object]:
    """An error as fields of a log line: its class, SQLSTATE and stack, but not its message, which may quote a row."""
    return {
        "error": type(error).__name__,
        "sqlstate": getattr(error, "sqlstate", None),
        "stack": "".join(traceback.format_tb(error.__traceback__)),
    }


def stacks_of(error: BaseException) -> str:
    """As Python would print it, causes first, but without the messages: any but our own may quote a row or a record."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = "" if cause is None else f"{stacks_of(cause)}then:\n"
    inside = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    sqlstate = getattr(error, "sqlstate", None)
    said = f": {error}" if isinstance(error, ServiceError) else f" ({sqlstate})" if sqlstate else ""
    stack = "".join(traceback.format_tb(error.__traceback__))
    return f"{before}{''.join(map(stacks_of, inside))}{stack}{type(error).__name__}{said}\n"
