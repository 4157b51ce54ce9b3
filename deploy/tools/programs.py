"""The validators' programs: found, else installed, else a failure that says what to install. Never skipped."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Final

ROOT: Final = Path(__file__).parents[2]
TOOLS: Final = ROOT / ".cache" / "deploy-tools"
LOCK: Final = Path(__file__).parent / "requirements.lock"
INSTALL_S: Final = 600
RUN_S: Final = 300
_installing: Final = Lock()  # checks run side by side


class MissingProgram(Exception):
    """A program is not there and cannot be installed; the message says how somebody else can."""


@cache
def debian(program: str, package: str) -> str:
    """The path of a program of Debian's `package`, installed if this may be done. Raises MissingProgram."""
    with _installing:
        return _debian(program, package)


def _debian(program: str, package: str) -> str:
    if found := shutil.which(program):
        return found
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package],
        ):
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_S
            )
        if found := shutil.which(program):
            return found
        raise MissingProgram(f"{program} is missing and apt-get could not install {package}: {done.stderr.strip()}")
    raise MissingProgram(f"{program} is missing: apt-get install {package} (as root)")


@cache
def pypi(program: str) -> str:
    """The path of a program from requirements.lock, which is installed into .cache/deploy-tools.

    Raises MissingProgram.
    """
    with _installing:
        return _pypi(program)


def _pypi(program: str) -> str:
    ready = TOOLS / ".ready"
    if not ready.exists() or ready.stat().st_mtime < LOCK.stat().st_mtime:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(TOOLS)],
            [
                str(TOOLS / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check",
                "--require-hashes", "-r", str(LOCK),
            ],
        ):  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
            if done.returncode != 0:
                raise MissingProgram(f"{program}: {LOCK.name} could not be installed: {done.stderr.strip()[-300:]}")
        ready.touch()
    path = TOOLS / "bin" / program
    if not path.exists():
        raise MissingProgram(f"{program} is not among what {LOCK.name} installs")
    return str(path)


def run(*command: str, accepts: str | None = None) -> tuple[int, str]:
    """Exit code and everything a program printed; `accepts` is its standard input."""
    done = subprocess.run(
        command, input=accepts, capture_output=True, text=True, cwd=ROOT, timeout=RUN_S,
        stdin=subprocess.DEVNULL if accepts is None else None,
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).strip()
