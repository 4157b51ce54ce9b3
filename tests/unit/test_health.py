"""The one way to wait for a dependency, and what is said of it meanwhile."""

from collections.abc import Callable, Iterator

import pytest
from structlog.testing import capture_logs

from consumer import health as health_module
from consumer.errors import OwnershipLost, ServiceError, Unavailable
from consumer.health import Dependency, Health


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """How long it backs off is none of this file's business."""
    monkeypatch.setattr(health_module, "FIRST_BACKOFF_S", 0.0)
    with capture_logs():
        yield


class Operation:
    """Ends as planned, one try after the other; notes who was degraded when each began."""

    def __init__(self, health: Health, *plan: Exception | str) -> None:
        self.health = health
        self.plan = list(plan)
        self.degraded: list[list[Dependency]] = []

    async def __call__(self) -> str:
        self.degraded.append(self.health.degraded)
        what = self.plan.pop(0)
        if isinstance(what, Exception):
            raise what
        return what


def away() -> Unavailable:
    return Unavailable("kafka", "no broker")


async def test_it_is_degraded_for_as_long_as_a_dependency_stays_unavailable_and_no_longer() -> None:
    health = Health()
    operation = Operation(health, away(), away(), away(), "done")
    assert await health.persist("pipeline", operation) == "done"
    assert operation.degraded == [[], ["kafka"], ["kafka"], ["kafka"]]
    assert health.degraded == []


@pytest.mark.parametrize("error", [lambda: OwnershipLost("taken away"), lambda: ServiceError("no")])
async def test_another_error_after_an_outage_goes_through_and_leaves_nothing_degraded(
    error: Callable[[], ServiceError],
) -> None:
    health, answer = Health(), error()
    operation = Operation(health, away(), away(), answer)
    with pytest.raises(ServiceError) as raised:
        await health.persist("pipeline", operation)
    assert raised.value is answer
    assert operation.degraded == [[], ["kafka"], ["kafka"]]
    assert health.degraded == []


async def test_an_answer_for_one_engine_leaves_degraded_what_another_waits_for() -> None:
    health = Health()
    health.lost("kafka", "relay", "no broker")
    with pytest.raises(OwnershipLost):
        await health.persist("pipeline", Operation(health, away(), OwnershipLost("taken away")))
    assert health.degraded == ["kafka"]
    health.recovered("relay")
    assert health.degraded == []


async def test_while_the_process_stops_unavailable_goes_through_and_stays_degraded() -> None:
    health = Health(stopping=True)
    operation = Operation(health, away())
    with pytest.raises(Unavailable):
        await health.persist("pipeline", operation)
    assert (operation.plan, health.degraded) == ([], ["kafka"])


async def test_an_outage_is_logged_once_and_again_only_when_it_turns_out_that_a_right_is_lacking() -> None:
    health = Health()
    with capture_logs() as logged:
        for why in ("no broker", "no answer", "the user may not Read topic a", "no broker",
                    "the user may not Read topic a", "the user may not Read group g"):  # fmt: skip
            health.lost("kafka", "fetch", why)
        health.recovered("fetch")
        health.lost("kafka", "fetch", "the user may not Read topic a")
    assert [line["why"] for line in logged if line["event"] == "dependency lost"] == [
        "no broker", "the user may not Read topic a", "the user may not Read group g", "the user may not Read topic a",
    ]  # fmt: skip
