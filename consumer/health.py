"""What is wrong right now: dependencies that are away, and the one way to wait for them."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

import structlog

from consumer.errors import MAY_NOT, ServiceError, Unavailable

T = TypeVar("T")
Dependency = Literal["database", "kafka", "relay"]

DEPENDENCIES: Final[tuple[Dependency, ...]] = ("database", "kafka", "relay")
FIRST_BACKOFF_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 5.0  # design, section 6: recovery is noticed within seconds

log = structlog.get_logger(__name__)


def backoff_s(tries: int) -> float:
    """Seconds to wait after `tries` failures in a row: doubling, jittered so that replicas do not march in step."""
    longest = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(tries, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311  # spreads load, guards nothing


@dataclass(slots=True)
class Health:
    """Shared by engines and doors. Engines say what they meet; doors and the watchdog read it.

    `polled_at`, `progressed_at`: monotonic seconds of the last poll that returned and of the last work that got done.
    """

    started: bool = False
    joined: bool = False
    stopping: bool = False
    polled_at: float = field(default_factory=time.monotonic)
    progressed_at: float = field(default_factory=time.monotonic)
    _away: dict[tuple[Dependency, str], float] = field(default_factory=dict)
    _lacking: dict[str, set[str]] = field(default_factory=dict)

    @property
    def degraded(self) -> list[Dependency]:
        """Dependencies that some engine is waiting for, in a fixed order; may be empty."""
        away = {dependency for dependency, _ in self._away}
        return [dependency for dependency in DEPENDENCIES if dependency in away]

    @property
    def not_ready(self) -> str | None:
        """Why no work should be expected from this process yet or any more; None when it is ready."""
        if self.stopping:
            return "shutting down"
        if not self.started:
            return "starting: waiting for database and topics"
        if not self.joined:
            return "joining the consumer group"
        return None

    def polled(self) -> None:
        """A poll came back."""
        self.polled_at = time.monotonic()

    def progressed(self) -> None:
        """Work got done."""
        self.progressed_at = time.monotonic()

    def lost(self, dependency: Dependency, who: str, why: str) -> None:
        """`who` cannot do its work because of `dependency`; logged once until it recovers, and once more when it turns
        out that a right is lacking.
        """
        is_new = (dependency, who) not in self._away
        if is_new:
            self._away[dependency, who] = time.monotonic()
        if is_new or (why.startswith(MAY_NOT) and why not in self._lacking.get(who, ())):
            log.warning("dependency lost", dependency=dependency, engine=who, why=why)
        if why.startswith(MAY_NOT):
            self._lacking.setdefault(who, set()).add(why)

    def recovered(self, who: str) -> None:
        """`who` works again."""
        self._lacking.pop(who, None)
        for dependency, engine in [key for key in self._away if key[1] == who]:
            seconds = time.monotonic() - self._away.pop((dependency, engine))
            log.info("dependency recovered", dependency=dependency, engine=who, seconds=round(seconds, 3))

    async def persist(self, who: str, operation: Callable[[], Awaitable[T]]) -> T:
        """Repeat `operation` until no dependency is Unavailable; anything else it raises goes through.

        While the process stops, so does Unavailable: what was not done stays where it is.
        """
        tries = 0
        while True:
            try:
                result = await operation()
            except Unavailable as error:
                self.lost(error.dependency, who, error.detail)
                if self.stopping:
                    raise
                await asyncio.sleep(backoff_s(tries))
                tries += 1
            except ServiceError:  # an answer too, such as partitions taken away meanwhile: nobody waits any more
                self.recovered(who)
                raise
            else:
                self.recovered(who)
                return result
