"""Others' programs find a planted mistake in each file of deploy/ that they are there for, and the check passes it on.

Not in `make test`: they are fetched once (a minute, half a GB). `deploy/check` then `pytest -m validators`.
"""

import shutil
from pathlib import Path

import pytest

from deploy.tools import check, validators

pytestmark = pytest.mark.validators


def copied(path: Path, folder: Path, stands: str, planted: str) -> Path:
    """A broken copy of a file."""
    text = path.read_text()
    assert stands in text, f"{path} no longer says {stands}: plant another mistake"
    copy = folder / path.name
    copy.write_text(text.replace(stands, planted, 1))
    return copy


@pytest.mark.parametrize(
    ("stands", "planted", "said"),
    [
        ('ENTRYPOINT ["campaign-stats"]', "ENTRYPOINT campaign-stats", "hadolint DL3025"),
        ("WORKDIR /build", "WORKDIR build", "hadolint DL3000"),
        ("FROM ${PYTHON}\n", "FROM ${PYTHON}\nRUN nonsense |& true\n", "hadolint DL4006"),
        ("USER 10001:10001\n", "", "checkov CKV_DOCKER_3"),
        (
            "HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 \\\n",
            "LABEL a=b\n#",
            "checkov CKV_DOCKER_2",
        ),
        ("FROM ${PYTHON} AS build", "FRM ${PYTHON} AS build", "Dockerfile"),
    ],
)
def test_in_the_dockerfile(tmp_path: Path, stands: str, planted: str, said: str) -> None:
    broken = copied(validators.DOCKERFILE, tmp_path, stands, planted)
    found = validators.dockerfile_problems(broken)
    assert any(said in one and one.startswith(str(broken)) for one in found), found


@pytest.mark.parametrize(
    ("stands", "planted", "said"),
    [
        ("stop_grace_period: 15s", "stop_grace: 15s", "$.services"),
        ("depends_on: [prometheus]", "depends_on: prometheus", "$.services.grafana.depends_on"),
        ("services:", "services: [", "compose.yaml"),
    ],
)
def test_in_the_compose_file(tmp_path: Path, stands: str, planted: str, said: str) -> None:
    broken = copied(validators.COMPOSE, tmp_path, stands, planted)
    found = validators.compose_problems(broken)
    assert any(said in one and one.startswith(str(broken)) for one in found), found


@pytest.mark.parametrize(
    ("file", "stands", "planted", "said"),
    [
        ("base/deployment.yaml", "runAsNonRoot: true", "runAsNonRot: true", "kubernetes-validate"),
        (
            "base/deployment.yaml",
            "            limits:\n              cpu",
            "            limit:\n              cpu",
            "kubernetes",
        ),
        ("base/deployment.yaml", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "CKV_K8S_22"),
        ("base/deployment.yaml", "              drop: [ALL]\n", "              add: [NET_ADMIN]\n", "CKV_K8S_"),
        ("migrate/job.yaml", "apiVersion: batch/v1", "apiVersion: batch/v2", "kind Job of batch/v2"),
        ("migrate/job.yaml", "              memory: 192Mi\n", "", "CKV_K8S_13"),
        ("base/networkpolicy.yaml", "policyTypes:", "policyType:", "kubernetes-validate"),
        ("overlays/production/podmonitor.yaml", "kind: PodMonitor", "kind: PodMonitr", "kind PodMonitr of"),
        ("overlays/small/kustomization.yaml", "- ../../base", "- ../../bas", "overlays/small: kustomize cannot"),
    ],
)
def test_in_kubernetes(tmp_path: Path, file: str, stands: str, planted: str, said: str) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(validators.KUBERNETES, folder)
    copied(validators.KUBERNETES / file, (folder / file).parent, stands, planted)
    found = validators.kubernetes_problems(folder)
    assert any(said in one and one.startswith(str(folder)) for one in found), found


@pytest.mark.parametrize(
    ("stands", "planted", "said"),
    [
        ("PrivateTmp=yes", "PrivateTemp=yes", "'PrivateTemp'"),
        ("Restart=on-failure", "Restart=sometimes", "Restart"),
        ("CapabilityBoundingSet=\n", "", "CapabilityBoundingSet"),
        ("SystemCallFilter=~@privileged @resources", "SystemCallFilter=@privileged @raw-io", "SystemCallFilter"),
    ],
)
def test_in_the_unit(tmp_path: Path, stands: str, planted: str, said: str) -> None:
    broken = copied(validators.UNIT, tmp_path, stands, planted)
    found = validators.unit_problems(broken)
    assert any(said in one and one.startswith(str(broken)) for one in found), found


def test_deploy_check_then_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copied(validators.COMPOSE, tmp_path, "name: campaign-stats", "nam: campaign-stats")
    checks = [check.Check("compose", "broken", lambda: validators.compose_problems(broken))]
    monkeypatch.setattr(check, "CHECKS", checks)
    assert check.main([]) == 1
    assert capsys.readouterr().out.startswith("WRONG compose")
