"""What others' programs say about the ways to run the service. Each takes the file, so that a broken copy can be tried.

What only our own code can know (settings, ports, topics, rights) is in agreement.py.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from deploy.tools.programs import INSTALL_S, ROOT, MissingProgram, debian, pypi, run

DEPLOY: Final = ROOT / "deploy"
DOCKERFILE: Final = DEPLOY / "Dockerfile"
COMPOSE: Final = DEPLOY / "compose" / "compose.yaml"
KUBERNETES: Final = DEPLOY / "kubernetes"
UNIT: Final = DEPLOY / "systemd" / "campaign-stats.service"
KUSTOMIZE: Final = "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1"
CUSTOM: Final = ("KafkaTopic", "KafkaUser", "PodMonitor", "PrometheusRule", "ScaledObject", "TriggerAuthentication")
EXPOSURE: Final = 15  # systemd's measure times ten: 100 is everything open; ours is 10
LOCKS: Final = ("requirements.lock", "build-backend.lock", "tools/requirements.lock")


def place(path: Path) -> str:
    """As people name it: from the top of the repository, if it is there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@cache
def kustomize() -> tuple[str, ...]:
    """The command that renders a folder: kubectl's, kustomize itself, or that built by Go. Raises MissingProgram."""
    if found := shutil.which("kubectl"):
        return found, "kustomize"
    if found := shutil.which("kustomize"):
        return found, "build"
    built = ROOT / ".cache" / "deploy-tools-go"
    if not (built / "kustomize").exists():
        if (go := shutil.which("go")) is None:
            raise MissingProgram(f"kubectl is missing: install it, or kustomize, or Go (then: go install {KUSTOMIZE})")
        done = subprocess.run(
            [go, "install", KUSTOMIZE], env={**os.environ, "GOBIN": str(built)}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=INSTALL_S,
        )  # fmt: skip
        if done.returncode != 0:
            raise MissingProgram(f"kubectl is missing, and go install {KUSTOMIZE} failed: {done.stderr.strip()[-300:]}")
    return str(built / "kustomize"), "build"


def dockerfile_problems(path: Path = DOCKERFILE) -> Sequence[str]:
    """hadolint and checkov."""
    code, said = run(pypi("hadolint"), "--format", "json", str(path))
    try:
        complaints = json.loads(said)
    except ValueError:
        return [f"{place(path)}: hadolint could not read it: {said[:300]}"]
    found = [
        f"{place(path)}, line {one['line']}: {one['message']} (hadolint {one['code']}: mend it, or ignore it"
        " there with a reason)"
        for one in complaints
    ]
    if code != 0 and not found:
        found.append(f"{place(path)}: hadolint failed: {said[:300]}")
    return [*found, *checkov_problems(path, "dockerfile")]


def checkov_problems(path: Path, framework: str, name: str | None = None) -> Sequence[str]:
    """What checkov fails; a rule is skipped in the file, with a reason. `name`: where a rendered file is from."""
    code, said = run(
        pypi("checkov"), "--file", str(path), "--framework", framework, "--output", "json", "--quiet", "--compact",
        "--skip-download",
    )  # fmt: skip
    try:
        report = json.loads(said)
        reports = report if isinstance(report, list) else [report]
        failed = [one for each in reports for one in each["results"]["failed_checks"]]
        passed = sum(each["summary"]["passed"] for each in reports)
    except (ValueError, KeyError, TypeError):
        return [f"{name or place(path)}: checkov said nothing usable (exit code {code}): {said[-300:]}"]
    if not passed and not failed:
        return [f"{name or place(path)}: checkov checked nothing"]
    return [
        f"{name or place(path)}, {one['resource']}: {one['check_name']} (checkov {one['check_id']}: mend it, or skip it"
        " there with a reason)"
        for one in failed
    ]


def compose_problems(path: Path = COMPOSE) -> Sequence[str]:
    """The Compose specification's schema."""
    code, said = run(
        pypi("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "--output-format", "json", str(path)
    )
    if code == 0:
        return []
    try:
        report = json.loads(said)
        errors = [*report.get("errors", []), *report.get("parse_errors", [])]
    except ValueError:
        errors = []
    return [
        f"{place(path)}, {one.get('path', '$')}: {one.get('message', one)} (not as the Compose specification has it)"
        if isinstance(one, dict)
        else f"{place(path)}: {one}"
        for one in errors
    ] or [f"{place(path)}: check-jsonschema failed: {said[-300:]}"]


def kubernetes_problems(folder: Path = KUBERNETES) -> Sequence[str]:
    """Every kustomization that is applied: rendered, then held against Kubernetes' own schemas and checkov's rules."""
    found: list[str] = []
    applied = sorted(path.parent for path in folder.rglob("kustomization.yaml") if path.parent.name != "base")
    if not applied:
        return [f"{place(folder)}: no kustomization.yaml but base/: nothing would be checked"]
    for one in applied:
        code, rendered = run(*kustomize(), str(one))
        if code != 0:
            found.append(f"{place(one)}: kustomize cannot render it: {rendered[-500:]}")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "rendered.yaml"
            path.write_text(rendered)
            found += _schema_problems(path, place(one))
            found += checkov_problems(path, "kubernetes", place(one))
    return found


def _schema_problems(path: Path, name: str) -> Sequence[str]:
    code, said = run(pypi("kubernetes-validate"), "--strict", str(path))
    lines = [line.replace(f"{path} ", "") for line in said.splitlines()]
    unknown = [re.search(r"for kind (\w+) with api version (\S+)", line) for line in lines if line.startswith("WARN")]
    found = [
        f"{name}: kind {one[1]} of {one[2]} is none of Kubernetes; is it misspelt? else add it to CUSTOM in"
        " deploy/tools/validators.py and check it in deploy/tools/agreement.py"
        for one in unknown
        if one is not None and one[1] not in CUSTOM
    ]
    errors = [line for line in lines if line.startswith("ERROR")]
    found += [f"{name}: {line.removeprefix('ERROR').strip()} (kubernetes-validate --strict)" for line in errors]
    if code != 0 and not errors:
        found.append(f"{name}: kubernetes-validate failed: {said[-300:]}")
    return found


def unit_problems(path: Path = UNIT) -> Sequence[str]:
    """systemd's own reading, which tells an unknown key only on stderr, and how much of the system it leaves open."""
    analyze = debian("systemd-analyze", "systemd")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / path.name  # its program is not installed here; agreement.py looks after the command
        copy.write_text(re.sub(r"(?m)^(ExecStart=)\S+", r"\1/bin/true", path.read_text()))
        done = subprocess.run(
            [analyze, "verify", "--man=no", str(copy)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
        )  # fmt: skip
        said = done.stderr.replace(str(copy), place(path))
        found = [
            line if line.startswith(place(path)) else f"{place(path)}: {line}" for line in said.splitlines() if line
        ]
        if done.returncode != 0 and not found:
            found.append(f"{place(path)}: systemd-analyze verify: exit code {done.returncode}")
        code, said = run(analyze, "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE}", str(copy))
    if code != 0:
        worst = [line.split()[1] for line in said.splitlines() if line.startswith("✗")]
        found.append(
            f"{place(path)}: systemd-analyze security finds more than {EXPOSURE / 10} of 10 open;"
            f" {said.splitlines()[-1][2:]} Not set: {', '.join(worst)}"
        )
    return found


def lock_problems(folder: Path = DEPLOY) -> Sequence[str]:
    """Lock files: a hash for each, no address of an index, and in the image the versions that the tests run with."""
    found: list[str] = []
    tested = versions((ROOT / "requirements.lock").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = versions((folder / LOCKS[0]).read_text())
    found += [
        f"{place(folder / LOCKS[0])}: {name} of pyproject.toml is missing; run `make lock`"
        for name in (re.split(r"[\[<>=!~; ]", one)[0] for one in project["dependencies"])
        if name not in locked
    ]
    for name in LOCKS:
        path = folder / name
        text = path.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            if "://" in line or line.startswith("--"):
                found.append(f"{place(path)}, line {number}: names an index or a file; run `make lock`")
        found += [
            f"{place(path)}: {requirement.split()[0]} has no hash; run `make lock`"
            for requirement in re.split(r"\n(?=\S)", text.strip())
            if not requirement.startswith("#") and "--hash=sha256:" not in requirement
        ]
        if path.parent == folder:
            found += [
                f"{place(path)}: {package} {version}, but the tests run with {tested.get(package)}; run `make lock`"
                for package, version in versions(text).items()
                if tested.get(package) != version
            ]
    return found


def versions(lock: str) -> dict[str, str]:
    """Package -> version."""
    return dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^ ;\\]+)", lock))
