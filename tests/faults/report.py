"""For `make faults`: a line per fault and a summary. Loaded by `-p tests.faults.report`."""

import os
from typing import Any

import pytest

_failed: list[str] = []
_passed: list[str] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """The docstring of a test is its line."""
    outcome = yield
    report = outcome.get_result()
    sentence = (getattr(item.obj, "__doc__", None) or item.name).split("\n")[0].rstrip(".")  # type: ignore[attr-defined]
    variant = f" [{item.callspec.id}]" if hasattr(item, "callspec") else ""
    report.user_properties.append(("fault", sentence + variant))


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """No dots: the lines say it."""
    return (report.outcome, "", "") if report.when == "call" else None


class _Lines:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not report.failed:
            return
        properties = dict(report.user_properties)
        measured = "".join(f"; {value}" for name, value in report.user_properties if name == "measured")
        fault = properties.get("fault", report.nodeid)
        (_failed if report.failed else _passed).append(fault)
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(f"{'FAILED' if report.failed else 'ok':6} {report.duration:6.1f} s  {fault}{measured}")


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that writes to the terminal."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lines(config))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many held."""
    seed = os.environ["CAMPAIGN_STATS_FAULT_SEED"]
    terminalreporter.write_line("")
    terminalreporter.write_line(f"{len(_passed)} held, {len(_failed)} did not; make faults SEED={seed} repeats this")
