"""The simulation behind deploy/scaling.md: its arithmetic, on constants that are easy to follow."""

import pytest

from tests.benchmarks.simulate import Constants, Load, distinct, fewest, read, simulate

CONSTANTS = Constants(
    hint_us=4.0,
    recount_us=40.0,
    database_us=60.0,
    generation_us=3_000.0,
    generation_database_us=1_000.0,
    generation_s=0.005,
    kafka_us=1.0,
    told=0.5,
    hint_bytes=400,
    event_bytes=1_000,
)


@pytest.mark.parametrize("draws", [1, 10, 1_000, 100_000])
@pytest.mark.parametrize("campaigns", [1, 50, 5_000])
def test_distinct_is_the_expected_number_of_campaigns(draws: int, campaigns: int) -> None:
    weights = [1 / rank for rank in range(1, campaigns + 1)]
    exact = sum(1 - (1 - weight / sum(weights)) ** draws for weight in weights)
    assert distinct(draws, campaigns) == pytest.approx(exact, rel=0.03)


def test_a_steady_load_finds_a_generation_that_takes_as_long_as_its_hints_take_to_come() -> None:
    found = simulate(CONSTANTS, Load(10_000, 1_000_000, 300_000_000), 1)
    assert found is not None
    recounts = distinct(10_000 * found.generation_s, 1_000_000)
    assert found.generation_s == pytest.approx(0.005 + recounts * 100e-6, rel=0.01)
    assert found.recounts_per_s == pytest.approx(recounts / found.generation_s, rel=0.01)
    assert found.database_cores == pytest.approx((recounts * 60e-6 + 0.001) / found.generation_s, rel=0.01)


def test_a_process_that_cannot_read_as_fast_as_hints_come_falls_behind() -> None:
    load = Load(300_000, 100, 30_000)
    assert simulate(CONSTANTS, load, 1) is None
    assert fewest(CONSTANTS, load).processes == 2


def test_fresh_generations_take_more_processes_when_there_are_more_campaigns() -> None:
    found = [fewest(CONSTANTS, Load(100_000, campaigns, 300 * campaigns)) for campaigns in (1_000, 100_000, 10_000_000)]
    assert found[0].processes < found[1].processes < found[2].processes
    assert all(outcome.generation_s < 1.0 and outcome.process_busy < 1.0 for outcome in found)


def test_constants_come_from_what_was_measured() -> None:
    run = {"contestant": "service", "counts": True, "events": 1_000, "recounts": 100,
           "cpu_s": 0.009, "postgres_s": 0.006, "kafka_s": 0.001}  # fmt: skip
    document = {
        "measures": {
            "reading": {"figures": {"aiokafka, our checks: CPU us/event": {"median": 4.0}}},
            "drain": {"runs": [run, {**run, "counts": False, "cpu_s": 9.0}]},
            "latency": {
                "figures": {
                    "service: hints/generation": {"median": 5.0},
                    "service: ms/generation": {"median": 4.0},
                    "service: CPU us/hint": {"median": 504.0},
                    "service: CPU us/hint in PostgreSQL": {"median": 260.0},
                }
            },
        }
    }
    found = read(document)
    assert (found.hint_us, found.recount_us, found.database_us) == pytest.approx((4.0, 50.0, 60.0))
    assert (found.kafka_us, found.told) == pytest.approx((1.0, 1.0))
    assert (found.generation_us, found.generation_database_us) == pytest.approx((450.0 * 5, 200.0 * 5))
    assert found.generation_s == pytest.approx(0.004 - 5 * 110e-6)
