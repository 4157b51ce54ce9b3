"""The benchmark's own word: what makes it fail, and what it is silent about."""

import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from tests.benchmarks import __main__ as bench
from tests.benchmarks.report import Figure, Report, at_least, at_most
from tests.benchmarks.stage import Failed, Stage

FLOOR = at_least(6)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (Report("m", [Figure("f", [5.0, 6.0, 7.0], limit=FLOOR)]), []),
        (Report("m", [Figure("f", [5.0, 5.9, 70.0], limit=FLOOR)]), ["f: 5.90, the limit is >= 6"]),
        (Report("m", [Figure("f", [0.1, 0.3, 0.2], limit=at_most(0.2))]), []),
        (Report("m", [Figure("f", [0.3, 0.3, 0.2], limit=at_most(0.2))]), ["f: 0.30, the limit is <= 0.2"]),
        (Report("m", [Figure("f", [9.0, 9.0], limit=FLOOR)]), ["f: only 2 of 3 rounds count"]),
        (Report("m", [Figure("f", [9.0, 9.0], limit=FLOOR)], rounds=2), []),
        (Report("m", [Figure("f", [1.0] * 3, limit=at_least(6, is_aim=True))]), []),
        (Report("m", [Figure("f", [])]), ["f: no run counts"]),
        (Report("m", [Figure("f", [1.0])]), []),
        (Report("m", problems=["wrong stats"]), ["m: INVALID, does not count: wrong stats"]),
    ],
)  # fmt: skip
def test_what_a_measurement_fails_for(report: Report, expected: Sequence[str]) -> None:
    assert report.failures() == expected


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (6.5, 0, "written to build/bench.json"),
        (5.5, 1, "FAILED: f: 5.50, the limit is >= 6"),
        (Failed("it did not join"), 1, "FAILED: n: INVALID, does not count: it did not join"),
        (RuntimeError("a bug of ours"), 1, "FAILED: n: INVALID, does not count: a bug of ours"),
        ("never", 1, "it was not done after 0 minutes"),
    ],
)
def test_the_exit_code_says_whether_every_limit_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: float | Exception | str, code: int, said: str
) -> None:
    async def conditions(*_: object) -> dict[str, Any]:
        return {"cores": 2}

    async def first(_: Stage) -> Report:
        return Report("m", [Figure("g", [7.0] * 3, limit=FLOOR)])

    async def second(_: Stage) -> Report:
        if isinstance(ending, Exception):
            raise ending
        if isinstance(ending, float):
            return Report("n", [Figure("f", [ending] * 3, limit=FLOOR)])
        await asyncio.sleep(60)
        raise AssertionError("it has a deadline")

    monkeypatch.setattr(bench, "REPOSITORY", tmp_path)
    monkeypatch.setattr(bench, "_conditions", conditions)
    monkeypatch.delenv("ONLY", raising=False)
    monkeypatch.setitem(bench.DEADLINE_S, "", 0.2 if ending == "never" else 60.0)
    page = io.StringIO()
    stage, measures = cast(Stage, SimpleNamespace()), {"m": first, "n": second}
    found = asyncio.run(bench._measure(stage, measures, "", 0.001, Console(file=page, width=120)))
    assert found == code
    written = json.loads((tmp_path / "build/bench.json").read_text())["measures"]
    assert any(measure["failures"] for measure in written.values()) is bool(code)
    assert written["m"]["figures"]["g"]["median"] == 7.0, "what was measured is kept"
    assert said in page.getvalue()


def test_a_peer_that_cannot_be_built_or_found_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(bench, "PEERS_PYTHON", tmp_path / "python")
    told = bench._missing(with_peers=True)
    assert any("Java 17 or Maven is missing" in line for line in told)
    assert any("Kafka Streams cannot be built" in line for line in told)
    for name in ("faststream", "quixstreams", "confluent"):
        assert any(name in line.lower() for line in told), name
    assert not any("peer" in line for line in bench._missing(with_peers=False))


def test_what_nobody_measures_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ONLY", "drian")
    assert bench.main() == 2
    assert "ONLY=drian is unknown" in capsys.readouterr().err
