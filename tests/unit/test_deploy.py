"""deploy/ agrees with the code, and its checks find what they are there for: each is shown a broken copy."""

import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deploy.tools import agreement, check, validators

REPOSITORY = Path(__file__).parents[2]
CHECKS = {name: one for name, _, one in agreement.CHECKS}
FILES = agreement.files()
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
COMPOSE, DEPLOYMENT, BASE, DOCKERFILE = agreement.COMPOSE, agreement.DEPLOYMENT, agreement.BASE, agreement.DOCKERFILE
SCALED, MONITOR, USERS, TOPICS, UNIT = (
    agreement.SCALED, agreement.MONITOR, agreement.USERS, agreement.TOPICS, agreement.UNIT,
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_deploy_agrees_with_the_code(name: str) -> None:
    assert CHECKS[name](FILES) == []


PLANTED = [
    # check, file, what stands there, what is planted, what must be said: file, key, fix
    ("settings", BASE, "_KAFKA_SSL_CAFILE", "_KAFKA_SSL_CA_FILE", "CAMPAIGN_STATS_KAFKA_SSL_CA_FILE is no setting"),
    ("settings", "adopting.md", "GUARD_MODE=observe", "GUARD=observe", "CAMPAIGN_STATS_GUARD is no setting"),
    ("settings", BASE, "SCRAM-SHA-512", "SCRAM-SHA-1", "configMapGenerator: CAMPAIGN_STATS_KAFKA_SASL_MECHANISM: "),
    ("settings", BASE, "SASL_SSL", "SASL_TLS", "configMapGenerator: CAMPAIGN_STATS_KAFKA_SECURITY_PROTOCOL: "),
    ("settings", COMPOSE, "kafka:9092\n      CAMPAIGN", "kafka:99999\n      CAMPAIGN", "services.campaign-stats: "),
    ("settings", agreement.UNIT_ENV, "_MODE=observe", "_MODE=look", "ExecStart: CAMPAIGN_STATS_GUARD_MODE: "),
    ("settings", agreement.COMPOSE_ENV, "STATS_LOG_LEVEL", "STATS_LOGLEVEL", "CAMPAIGN_STATS_LOGLEVEL is no setting"),
    ("ports", DOCKERFILE, "EXPOSE 8080 8081", "EXPOSE 8080 8082", "EXPOSE: port 8082, but CAMPAIGN_STATS_API_PORT"),
    ("ports", "livez.py", '_PORT") or 8080', '_PORT") or 8090', "livez.py, main: port 8090"),
    ("ports", COMPOSE, '8080:8080"', '8080:9080"', "services.campaign-stats.ports: port 9080"),
    ("ports", BASE, "HTTP_PORT=8080", "HTTP_PORT=9080", "ports.operators: port 8080, but CAMPAIGN_STATS_HTTP_PORT"),
    ("ports", DEPLOYMENT, "containerPort: 8081", "containerPort: 81", "ports.api: port 81"),
    ("ports", DEPLOYMENT, 'port: "8080"', 'port: "80"', "annotations prometheus.io/port: port 80"),
    ("ports", BASE, "HTTP_HOST=0.0.0.0", "HTTP_HOST=127.0.0.1", "probes and callers come from outside"),
    ("ports", agreement.SERVICE, "targetPort: api", "targetPort: door", "ports.targetPort: "),
    ("ports", MONITOR, "port: operators", "port: metrics", "podMetricsEndpoints.port: "),
    ("ports", agreement.NETWORK, "port: operators", "port: metrics", "ingress.ports.port: "),
    ("probes", DEPLOYMENT, "path: /readyz", "path: /ready", "readinessProbe.httpGet.path: nobody answers /ready"),
    ("probes", DEPLOYMENT, "path: /livez", "path: /readyz", "livenessProbe: ask /livez"),
    ("probes", DEPLOYMENT, "port: operators\n            periodSeconds: 5", "port: api\n            periodSeconds: 5",
     "readinessProbe.httpGet.port: /readyz is answered at port `operators`"),
    ("probes", MONITOR, "path: /metrics", "path: /metric", "podMetricsEndpoints.path: nobody answers /metric:"),
    ("probes", "livez.py", '"GET", "/livez"', '"GET", "/live"', "connection.request: nobody answers /live:"),
    ("commands", DOCKERFILE, 'ENTRYPOINT ["campaign-stats"]', 'ENTRYPOINT ["campaign"]', "ENTRYPOINT: ['campaign'] is"),
    ("commands", DOCKERFILE, 'CMD ["run"]', 'CMD ["serve"]', "Dockerfile, CMD: `serve` is none of: "),
    ("commands", DEPLOYMENT, "args: [run]", "args: [start]", "`start` is none of: "),
    ("commands", agreement.MIGRATE, "args: [migrate]", "args: [migrate, --all]", "`migrate` has no option --all"),
    ("commands", COMPOSE, "--replication", "--replicas", "services.topics: `topics` has no option --replicas"),
    ("commands", UNIT, "campaign-stats run", "campaign-stats up", "ExecStart: `up` is none of: "),
    ("commands", UNIT, "bin/campaign-stats run", "bin/stats run", "ExecStart: no command of pyproject.toml"),
    ("stopping", DEPLOYMENT, "PeriodSeconds: 15", "PeriodSeconds: 9", "terminationGracePeriodSeconds: 9 s"),
    ("stopping", BASE, "DEADLINE_S=8", "DEADLINE_S=30", "terminationGracePeriodSeconds: 15 s"),
    ("stopping", COMPOSE, "stop_grace_period: 15s", "stop_grace_period: 8s", "stop_grace_period: 8 s"),
    ("stopping", COMPOSE, "    stop_grace_period: 15s\n", "", "ok"),  # Docker's own 10 s are enough
    ("stopping", UNIT, "TimeoutStopSec=15", "TimeoutStopSec=5", "TimeoutStopSec: 5 s"),
    ("stopping", DOCKERFILE, "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGQUIT", "STOPSIGNAL: "),
    ("topics", TOPICS, "name: campaign.paused", "name: campaign.pauses", "topic campaign.paused is missing"),
    ("topics", TOPICS, "name: campaign.paused", "name: campaign.pauses", "campaign.pauses: no topic of schemas"),
    ("topics", TOPICS, "cleanup.policy: delete", "cleanup.policy: compact", "prospect.status-changed, config: "),
    ("topics", TOPICS, "retention.ms: 604800000", "retention.ms: 1", "campaign-stats.dead-letters, config: "),
    ("topics", TOPICS, "partitions: 12", "partitions: 1", "1 partitions, 3 replicas"),
    ("acls", USERS, "[Describe, Write]", "[Describe]", "may not Write topic campaign.stats-updated: add it"),
    ("acls", USERS, "[Describe, Write]", "[All, Describe, Write]", "needs no All on topic campaign.stats-updated"),
    ("acls", USERS, "name: campaign.paused,", "name: campaign.pause,", "may not Describe, Write topic campaign.paused"),
    ("acls", USERS, "patternType: literal", "patternType: prefix", "only literal names and allow"),
    ("acls", USERS, "{type: group, name: campaign-stats,", "{type: group, name: others,",
     "may not Read group campaign"),
    ("acls", USERS, "operations: [Read]",
     "operations: [Read]\n      - {resource: {type: cluster, patternType: literal}, operations: [IdempotentWrite]}",
     "needs no IdempotentWrite on cluster *: take it away"),
    ("acls", USERS, "type: scram-sha-512", "type: tls", "authentication.type: "),
    ("acls", BASE, "_USERNAME=campaign-stats", "_USERNAME=stats", "no KafkaUser stats"),
    ("roles", agreement.ROLES, ", status, contacted_at)", ", status, email)",
     "may not SELECT contacted_at of public.campaign_prospects: grant it"),
    ("roles", agreement.ROLES, ", status, contacted_at)", ", status, contacted_at, email)",
     "needs no SELECT on email of public.campaign_prospects: take it away"),
    ("roles", agreement.ROLES, "GRANT UPDATE (stats, last_synced_at, updated_at, status, pause_reason)",
     "GRANT UPDATE", "a right on a whole table"),
    ("roles", agreement.ROLES, "('sweep', 'SELECT, UPDATE')", "('sweep', 'SELECT')", "VALUES, sweep: SELECT, but the"),
    ("ports", agreement.NETWORK, "port: 5432", "port: 5433", "5432, the port of PostgreSQL, is closed: open it"),
    ("ports", agreement.NETWORK, "port: 9093", "port: 9094", "9093, the port of KAFKA_BOOTSTRAP_SERVERS of deploy/"),
    ("references", agreement.PRODUCTION, f"newTag: {VERSION}", "newTag: latest", "images: newTag ['latest']"),
    ("references", DOCKERFILE, f"ARG VERSION={VERSION}", "ARG VERSION=0.0.9", "ARG VERSION: "),
    ("references", DOCKERFILE, "USER 10001:10001", "USER app", "Dockerfile, USER: two numbers"),
    ("references", DEPLOYMENT, "runAsUser: 10001", "runAsUser: 1000", "securityContext.runAsUser: the image has"),
    ("references", COMPOSE, "../postgres/roles.sql", "../postgres/role.sql", "services.roles.volumes: "),
    ("references", COMPOSE, "roles: {condition", "rights: {condition", "depends_on: there is no service rights"),
    ("references", COMPOSE, "KAFKA_VERSION:-4", "KAFKA_VERSION:-3", ".env.example, KAFKA_VERSION: "),
    ("references", agreement.UNIT_ENV, "campaign_stats_run:", "campaign_stats:", "role campaign_stats is not made"),
    ("references", SCALED, "maxReplicaCount: 12", "maxReplicaCount: 24", "maxReplicaCount: 24, but there are 12"),
    ("references", SCALED, "maxReplicaCount", "maxReplicas", "there is no key maxReplicas"),
    ("references", SCALED, "consumerGroup: campaign-stats", "consumerGroup: stats", "consumerGroup: stats, but"),
    ("references", SCALED, "topic: campaign.sync-requested", "topic: campaign.syncs", "but the service reads"),
    ("references", SCALED, "tls: enable", "tls: disable", "tls: disable, but the service has enable"),
    ("references", SCALED, "name: CAMPAIGN_STATS_KAFKA_SASL_USERNAME", "name: USERNAME", "sets no USERNAME"),
    ("references", SCALED, "name: kafka-cluster-ca-cert", "name: ca", "secretTargetRef ca: "),
    ("references", SCALED, "kind: Deployment", "kind: StatefulSet", "scaleTargetRef: no such Deployment"),
    ("references", BASE, "/etc/campaign-stats/kafka/ca", "/etc/kafka/ca", "is under no volumeMount"),
    ("references", MONITOR, "app.kubernetes.io/name: campaign-stats", "app: stats", "matches no pod"),
    ("references", DEPLOYMENT, "enableServiceLinks: false", "enableServiceLinks: true", "enableServiceLinks: set it"),
    ("references", DEPLOYMENT, "progressDeadlineSeconds: 300", "replicas: 3", "spec.replicas: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "stands", "planted", "said"), PLANTED)
def test_a_planted_mistake_is_found_with_its_file(name: str, file: str, stands: str, planted: str, said: str) -> None:
    assert stands in FILES[file], f"{file} no longer says {stands}: plant another mistake"
    found = CHECKS[name]({**FILES, file: FILES[file].replace(stands, planted)})
    if said == "ok":
        assert found == []
    else:
        assert any(said in one and one.startswith("deploy/") for one in found), found


def test_every_check_is_shown_a_mistake() -> None:
    assert {name for name, *_ in PLANTED} == set(CHECKS)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("requirements.lock", (r"aiokafka==\S+", "aiokafka==0.0.1"), "aiokafka 0.0.1, but the tests run with"),
        ("requirements.lock", (r"aiohttp==", "aiohttp-not=="), "aiohttp of pyproject.toml is missing"),
        ("requirements.lock", (r"(asyncpg==\S+) \\\n(    --hash=\S+( \\)?\n)+", r"\1\n"), "has no hash"),
        ("tools/requirements.lock", (r"\A", "--index-url https://example.test/simple\n"), "line 1: names an index"),
        ("build-backend.lock", (r"hatchling==\S+", "hatchling==0.0.1"), "run `make lock`"),
    ],
)
def test_a_lock_that_is_none_is_found(tmp_path: Path, file: str, change: tuple[str, str], said: str) -> None:
    for name in validators.LOCKS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((REPOSITORY / "deploy" / name).read_text())
    assert validators.lock_problems(tmp_path) == []
    broken = tmp_path / file
    broken.write_text(re.sub(change[0], change[1], broken.read_text(), count=1))
    found = validators.lock_problems(tmp_path)
    assert any(said in problem and file in problem for problem in found), found


def test_the_image_is_built_by_what_pyproject_asks_for() -> None:
    asked = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["build-system"]["requires"]
    lines = (REPOSITORY / "deploy" / "build-backend.in").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == asked


def test_a_wrong_file_makes_deploy_check_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["ports", "stopping"]) == 0
    broken = {**FILES, DOCKERFILE: FILES[DOCKERFILE].replace("EXPOSE 8080", "EXPOSE 80")}
    monkeypatch.setattr(agreement, "files", lambda: broken)
    assert check.main(["ports", "stopping"]) == 1
    said = capsys.readouterr().out
    wanted = r"^WRONG ports .*\n      deploy/Dockerfile, EXPOSE: port 80, .*make them one\nok    stopping"
    assert re.search(wanted, said, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("compose/compose.yaml", "services:\n  a: [\n", "deploy/compose/compose.yaml, line 3: "),
        ("kubernetes/base/service.yaml", None, "deploy/kubernetes/base/service.yaml is missing: put it back"),
        (
            "prometheus/prometheus.yml",
            'scrape_configs: [{job_name: a, static_configs: [{targets: ["b:9999"]}]}]',
            "deploy/prometheus/prometheus.yml, a.targets: port 9999, but CAMPAIGN_STATS_HTTP_PORT is 8080 there",
        ),
    ],
)
def test_a_file_that_is_broken_or_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, text: str | None, said: str
) -> None:
    broken = {file: content for file, content in FILES.items() if file != name}
    monkeypatch.setattr(agreement, "files", lambda: broken if text is None else {**broken, name: text})
    assert check.main(["ports"]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "more", ["ALTER ROLE campaign_stats_run SUPERUSER;", "GRANT INSERT (id) ON public.campaigns TO x;"]
)
def test_a_role_that_gets_more_than_it_needs_is_noticed(more: str) -> None:
    name = "postgres/roles.sql"
    found = agreement.role_problems({**FILES, name: f"{FILES[name]}\n{more}\n"})
    assert any(one.startswith("deploy/postgres/roles.sql: ") and "more than the service needs" in one for one in found)


def test_a_check_that_cannot_be_made_makes_deploy_check_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement, "files", lambda: {**FILES, DEPLOYMENT: "kind: Deployment\n"})
    assert check.main(["probes"]) == 1
    assert "the check itself failed: KeyError" in capsys.readouterr().out


# livez.py, as HEALTHCHECK starts it


class Answering(BaseHTTPRequestHandler):
    """Answers every path with the server's `code`."""

    def do_GET(self) -> None:
        """200 on /livez only when all is well."""
        self.send_response(self.server.code if self.path == "/livez" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """Where /livez would be."""
    with HTTPServer(("127.0.0.1", 0), Answering) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


def livez(host: str, port: int) -> int:
    environment = {"CAMPAIGN_STATS_HTTP_HOST": host, "CAMPAIGN_STATS_HTTP_PORT": str(port)}
    script = REPOSITORY / "deploy" / "livez.py"
    return subprocess.run([sys.executable, "-I", script], env=environment, capture_output=True, timeout=20).returncode


def test_the_health_check_asks_where_the_service_listens(server: HTTPServer) -> None:
    server.code = 200  # type: ignore[attr-defined]
    assert livez("127.0.0.1", server.server_port) == 0
    assert livez("0.0.0.0", server.server_port) == 0
    server.code = 503  # type: ignore[attr-defined]
    assert livez("127.0.0.1", server.server_port) == 1


def test_the_health_check_says_no_when_nobody_listens() -> None:
    with HTTPServer(("127.0.0.1", 0), Answering, bind_and_activate=False) as nobody:
        nobody.server_bind()
        port = nobody.server_port
    assert livez("0.0.0.0", port) == 1
