"""Every validator of deploy/, one line each: `ok`, or what is wrong with file, line or setting, and the fix.

deploy/check [NAME ...] [--quick] [--list]
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from deploy.tools import agreement, catalogue, dashboard, image, rules, validators
from deploy.tools.programs import MissingProgram

AT_ONCE: Final = 2  # most of them wait for a program


@dataclass(frozen=True, slots=True)
class Check:
    """`problems` returns what is wrong, a sentence each with place and fix; empty when all is well.

    `is_quick`: needs no program that is not in .venv, so `make test` runs it too.
    """

    name: str
    what: str
    problems: Callable[[], Sequence[str]]
    is_quick: bool = False


CHECKS: Final[tuple[Check, ...]] = (
    Check("metrics", "the catalogue is what the code says, its series are bounded", catalogue.problems, is_quick=True),
    Check(
        "rules",
        "alerts are what the list says, of metrics that exist, each with a runbook",
        rules.problems,
        is_quick=True,
    ),
    Check(
        "dashboard",
        "Grafana's panels are those of the status page, of metrics that exist",
        dashboard.problems,
        is_quick=True,
    ),
    Check("rules-test", "promtool: every alert fires when it should and else is silent", rules.promtool_problems),
    Check("metrics-lint", "promtool check metrics on a scrape", catalogue.promtool_problems),
    *(
        Check(name, what, lambda check=check: check(agreement.files()), is_quick=True)  # type: ignore[misc]
        for name, what, check in agreement.CHECKS
    ),
    Check("locks", "each package by its hash; the image has what the tests run with", validators.lock_problems, True),
    Check("dockerfile", "hadolint and checkov", validators.dockerfile_problems),
    Check("compose", "the Compose specification's schema", validators.compose_problems),
    Check("kubernetes", "rendered; Kubernetes' schemas, strictly; checkov", validators.kubernetes_problems),
    Check("systemd", "the unit as systemd reads it, and how little it leaves open", validators.unit_problems),
    Check("image", "built twice, the same; runs without root on a read-only root (minutes)", image.problems),
)


def problems_of(check: Check) -> Sequence[str]:
    """What is wrong; a program that is missing, or a validator that fails itself, is a problem too."""
    try:
        return check.problems()
    except (MissingProgram, agreement.BrokenFile) as problem:
        return [str(problem)]
    except Exception as error:
        return [f"the check itself failed: {type(error).__name__}: {error}; `git diff deploy/` says what changed"]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything is ok, 1 when something is wrong, 2 for a name that no check has."""
    parser = argparse.ArgumentParser(prog="deploy/check", description="Check the files in deploy/, a line each.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--quick", action="store_true", help="only those that need nothing installed")
    parser.add_argument("--list", action="store_true", help="say what there is")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.names) - {check.name for check in CHECKS}:
        print(f"no check is called {', '.join(sorted(unknown))}; deploy/check --list says what there is")
        return 2
    chosen = [
        check
        for check in CHECKS
        if (not asked.names or check.name in asked.names) and (check.is_quick or not asked.quick)
    ]
    if asked.list:
        for check in chosen:
            print(f"{check.name:<14} {check.what}")
        return 0
    wrong = 0
    with ThreadPoolExecutor(AT_ONCE) as workers:
        running = [workers.submit(_timed, check) for check in reversed(chosen)]  # those that take long begin first
        for check, done in zip(chosen, reversed(running), strict=True):
            problems, seconds = done.result()
            wrong += bool(problems)
            print(f"{'WRONG' if problems else 'ok':<6}{check.name:<14} {check.what} ({seconds:.1f} s)")
            for problem in problems:
                print(f"      {problem}")
            sys.stdout.flush()
    return 1 if wrong else 0


def _timed(check: Check) -> tuple[Sequence[str], float]:
    begun = time.monotonic()
    return problems_of(check), time.monotonic() - begun


if __name__ == "__main__":
    sys.exit(main())
