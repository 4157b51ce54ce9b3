"""Build the image twice, compare, run it without root on a read-only root file system, write its SBOM. A line each.

deploy/image [--base IMAGE] [--tag NAME]

Needs root and Debian's buildah, but no engine and no registry of images: without --base the base is made on the spot
from Debian's packages. That stands in for docker.io/library/python; what it cannot show is said at the end.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deploy.tools import programs
from deploy.tools.programs import ROOT, MissingProgram

STORE: Final = ROOT / ".cache" / "image"
STAND_IN: Final = "localhost/campaign-stats-base:debian12"
PACKAGES: Final = "python3,python3-venv,python3-pip,ca-certificates"
SBOM: Final = ROOT / "build" / "sbom.cdx.json"
LOCK: Final = ROOT / "deploy" / "requirements.lock"
BUILD_S: Final = 900
STEP_S: Final = 60
ANSWERS_S: Final = 20.0
OF_THE_BUILD: Final = ("container", "Hostname")  # random names that buildah writes down, in no file and no OCI field
SERVERS: Final = ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS")


class Wrong(Exception):
    """A step found something; the message says what."""


def command(*words: str, timeout_s: float = STEP_S) -> str:
    """Standard output of a program. Raises Wrong with the end of what it said."""
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=timeout_s
    )  # fmt: skip
    if done.returncode != 0:
        raise Wrong(f"{' '.join(words[:6])} ...: exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout.strip()


def buildah(*words: str, timeout_s: float = BUILD_S) -> str:
    """buildah with a store of its own, which needs no kernel module."""
    program = programs.debian("buildah", "buildah")
    store = ("--root", str(STORE / "storage"), "--runroot", str(STORE / "run"), "--storage-driver", "vfs")
    return command(program, *store, *words, timeout_s=timeout_s)


def stand_in() -> str:
    """A base from Debian's packages, made once: Debian 12 with its Python 3.11."""
    if STAND_IN in buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        return STAND_IN
    debootstrap = programs.debian("debootstrap", "debootstrap")
    STORE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=STORE, prefix="base-") as name:
        root = Path(name) / "root"
        command(debootstrap, "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), timeout_s=BUILD_S)
        (root / "usr/local/bin/python").symlink_to("../../bin/python3")
        container = buildah("from", "scratch")
        buildah("add", "-q", container, str(root), "/")
        buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        buildah("commit", "-q", container, STAND_IN)
        buildah("rm", container)
    return STAND_IN


def build(base: str, tag: str, pull: str) -> dict[str, Any]:
    """Build without any cache; what buildah knows about the image."""
    moment, revision = "1577836800", "unknown"
    if (ROOT / ".git").exists() and shutil.which("git"):
        moment, revision = command("git", "log", "-1", "--format=%ct %H").split()
    arguments = {"PYTHON": base, "SOURCE_DATE_EPOCH": moment, "REVISION": revision}
    own_pip = [  # how this machine reaches the index; only while a step runs, never in a layer
        f"--volume={path}:{path}:ro" for path in ("/etc/pip.conf", "/etc/ssl/certs") if Path(path).exists()
    ]
    buildah(
        "build", "--isolation", "chroot", "--format", "docker", "--no-cache", pull, "--timestamp", moment,
        *(f"--build-arg={name}={value}" for name, value in arguments.items()),
        *own_pip, "-f", "deploy/Dockerfile", "-t", tag, ".",
    )  # fmt: skip
    document: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", tag))
    return document


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two images differ, but for the names of the containers they were built in."""
    found = []
    layers = [[layer["digest"] for layer in json.loads(image["Manifest"])["layers"]] for image in (one, other)]
    found += [f"layer {number}: {a} and {b}" for number, (a, b) in enumerate(zip(*layers, strict=True), 1) if a != b]
    configurations = [_without(json.loads(image["Config"]), OF_THE_BUILD) for image in (one, other)]
    found += [
        f"configuration, {key}: {configurations[0].get(key)} and {configurations[1].get(key)}"
        for key in sorted(configurations[0].keys() | configurations[1].keys())
        if configurations[0].get(key) != configurations[1].get(key)
    ]
    return found


def _without(document: Any, names: Sequence[str]) -> Any:
    if isinstance(document, dict):
        return {key: _without(value, names) for key, value in document.items() if key not in names}
    return document


@contextmanager
def mounted(tag: str) -> Iterator[Path]:
    """The image's files."""
    container = buildah("from", "--pull-never", tag)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


def inside(root: Path, image: Mapping[str, Any], *words: str, **settings: str) -> subprocess.Popen[str]:
    """A process in the image as it is meant to run: its user, a read-only root, no new rights, process 1."""
    configured = image["OCIv1"]["config"]
    script = (
        'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && mount --rbind /dev "$0/dev"'
        ' && mount -t proc proc "$0/proc" && user=$1 && shift'
        ' && exec setpriv --no-new-privs chroot --userspec="$user" --groups= "$0" "$@"'
    )
    environment = dict(one.split("=", 1) for one in configured["Env"])
    return subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, str(root), configured["User"],
         *words],
        env={**environment, **settings}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def answer(root: Path, image: Mapping[str, Any], *words: str, **settings: str) -> tuple[int, str]:
    """Exit code and output of a command in the image."""
    with inside(root, image, *words, **settings) as process:
        said, _ = process.communicate(timeout=STEP_S)
    return process.returncode, said.strip()


def expect(code: int, said: str, wanted: int, what: str) -> None:
    """Raises Wrong for another exit code, and for a traceback whatever the code."""
    if code != wanted or "Traceback" in said:
        raise Wrong(f"{what}: exit code {code} instead of {wanted}: {said[-1500:]}")


def try_confinement(root: Path, image: Mapping[str, Any]) -> str:
    """Who it runs as, and that it cannot write."""
    probe = "import os; print(os.getuid(), os.getgid(), os.getgroups(), os.statvfs('/').f_flag & os.ST_RDONLY)"
    code, said = answer(root, image, "/opt/campaign-stats/bin/python", "-c", probe)
    expect(code, said, 0, "python")
    if said != "10001 10001 [] 1":
        raise Wrong(f"user, group, further groups, read-only: {said} instead of 10001 10001 [] 1")
    return "user 10001, no further groups, read-only root"


def try_help(root: Path, image: Mapping[str, Any]) -> str:
    """The entry point as the image names it."""
    code, said = answer(root, image, *image["OCIv1"]["config"]["Entrypoint"], "--help")
    expect(code, said, 0, "campaign-stats --help")
    return "exit code 0"


def try_doctor(root: Path, image: Mapping[str, Any]) -> str:
    """On the servers in the environment, else on ports where nobody listens."""
    servers = {name: os.environ[name] for name in SERVERS if name in os.environ}
    if len(servers) == len(SERVERS):
        given = {name: value for name, value in os.environ.items() if name.startswith("CAMPAIGN_STATS_")}
        code, said = answer(root, image, "campaign-stats", "doctor", **servers, **given)
        expect(code, said, 0, "campaign-stats doctor")
        return f"on the servers of the environment: {said.splitlines()[-1]}"
    code, said = answer(root, image, "campaign-stats", "doctor", **_nobody())
    expect(code, said, 2, "campaign-stats doctor without servers")
    if said.count("cannot be asked") + said.count("cannot be reached") + said.count("cannot connect") < 2:
        raise Wrong(f"campaign-stats doctor without servers does not say that both are away: {said}")
    return f"no servers (set {' and '.join(SERVERS)}): it says that both are away, exit code 2"


def try_run(root: Path, image: Mapping[str, Any]) -> str:
    """CMD as process 1, without servers: alive by the image's own HEALTHCHECK; SIGTERM ends it with 0."""
    configured = image["OCIv1"]["config"]
    check = json.loads(image["Config"])["config"]["Healthcheck"]["Test"][1:]
    settings = {**_nobody(), "CAMPAIGN_STATS_HTTP_PORT": str(_free_port())}
    with inside(root, image, *configured["Entrypoint"], *configured["Cmd"], **settings) as process:
        try:
            deadline = time.monotonic() + ANSWERS_S
            while (health := answer(root, image, *check, **settings))[0] != 0:
                if time.monotonic() > deadline or process.poll() is not None:
                    process.kill()
                    raise Wrong(
                        f"not alive after {ANSWERS_S} s: {health[1]}; it said: {process.communicate()[0][-1500:]}"
                    )
                time.sleep(0.2)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            begun = time.monotonic()
            os.kill(int(children[0]), getattr(signal, configured["StopSignal"]))
            said, _ = process.communicate(timeout=STEP_S)
        finally:
            process.kill()
    expect(process.returncode, said, 0, "campaign-stats run, ended by SIGTERM")
    return f"{health[1]}; {configured['StopSignal']}: exit code 0 after {time.monotonic() - begun:.1f} s"


def _nobody() -> dict[str, str]:
    return {
        "DATABASE_URL": f"postgresql://nobody@127.0.0.1:{_free_port()}/none",
        "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{_free_port()}",
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def write_sbom() -> str:
    """CycloneDX of what the image installs; the same bytes from the same lock."""
    SBOM.parent.mkdir(exist_ok=True)
    document = json.loads(
        command(programs.pypi("cyclonedx-py"), "requirements", str(LOCK), "--output-reproducible", "--of", "JSON")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    document["metadata"]["component"] = {  # its own --pyproject refuses `license = "MIT"`
        "type": "application",
        "bom-ref": project["name"],
        **{key: project[key] for key in ("name", "version", "description")},
        "licenses": [{"license": {"id": project["license"]}}],
    }
    SBOM.write_text(json.dumps(document, indent=2) + "\n")
    components = {one["name"].lower(): one for one in document["components"]}
    locked = {line.split("==")[0] for line in LOCK.read_text().splitlines() if "==" in line}
    if missing := locked - components.keys():
        raise Wrong(f"{SBOM.relative_to(ROOT)} lacks {', '.join(sorted(missing))}")
    return f"{SBOM.relative_to(ROOT)}, {len(components)} components, each with its hashes"


def step(what: str, work: Callable[[], str]) -> bool:
    """Do it and say how it went."""
    begun = time.monotonic()
    try:
        found, mark = work(), "ok"
    except (Wrong, MissingProgram, subprocess.TimeoutExpired) as error:
        found, mark = str(error), "WRONG"
    print(f"{mark:<6}{what:<12} {found} ({time.monotonic() - begun:.1f} s)", flush=True)
    return mark == "ok"


def problems() -> Sequence[str]:
    """What deploy/check asks: the steps that went wrong."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main([])
    wrong = [line.removeprefix("WRONG").strip() for line in said.getvalue().splitlines() if line.startswith("WRONG")]
    return wrong if code == 0 or wrong else [said.getvalue().strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every step went well, else 1."""
    parser = argparse.ArgumentParser(prog="deploy/image", description=__doc__.partition("\n")[0])
    parser.add_argument("--base", help="an image to build on, pulled if need be, instead of Debian's own Python")
    parser.add_argument("--tag", default="localhost/campaign-stats:latest", help="what to call the result")
    asked = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("deploy/image needs root: it mounts the image and changes into it")
        return 1
    images: list[dict[str, Any]] = []
    base = [asked.base] if asked.base else []

    def get_base() -> str:
        base.append(stand_in())
        return f"{STAND_IN}, from Debian's packages"

    def build_once() -> str:
        images.append(build(base[0], asked.tag, "--pull" if asked.base else "--pull-never"))
        digest = json.loads(images[-1]["Manifest"])["layers"][-1]["digest"]
        return f"{digest} is the layer of /opt/campaign-stats"

    def compare() -> str:
        if found := differences(*images):
            raise Wrong("two builds differ: " + "; ".join(found))
        return f"both builds are the same: every layer, and the configuration but for {' and '.join(OF_THE_BUILD)}"

    steps = [("first build", build_once), ("second build", build_once), ("reproducible", compare)]
    if not asked.base:
        steps.insert(0, ("base", get_base))
    if not all(step(what, work) for what, work in steps):
        return 1
    tries = (("confinement", try_confinement), ("--help", try_help), ("doctor", try_doctor), ("run", try_run))
    with mounted(asked.tag) as root:
        done = [step(what, lambda work=work: work(root, images[-1])) for what, work in tries]  # type: ignore[misc]
    buildah("rmi", "--prune", "--force")  # what only the builds needed
    done.append(step("sbom", write_sbom))
    if not asked.base:
        print(
            "not shown here: the base python:3.11-slim-bookworm itself (no registry was asked: give --base),"
            " an engine's seccomp and cgroups. Docker's builder writes file times into layers: give it"
            " --output type=image,rewrite-timestamp=true"
        )
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
