"""Whether the files in deploy/ agree with the code and each other: settings, ports, commands, topics, rights, times.

Every check takes all files, name below deploy/ -> text, so that a broken copy can be tried; and returns sentences that
name file, key and fix. Nothing is started or asked.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import typer.main
import yaml
from pydantic import ValidationError

from consumer import cli, migrations
from consumer.broker import needed_rights
from consumer.doctor.kafka import PARTITIONS, REPLICATION
from consumer.errors import ConfigError
from consumer.settings import PREFIX, Settings
from deploy.tools.programs import ROOT
from schemas.topics import Topics

DEPLOY: Final = ROOT / "deploy"
Files = Mapping[str, str]
Check = Callable[[Files], Sequence[str]]

DOCKERFILE: Final = "Dockerfile"
COMPOSE: Final = "compose/compose.yaml"
COMPOSE_ENV: Final = "compose/.env.example"
BASE: Final = "kubernetes/base/kustomization.yaml"
DEPLOYMENT: Final = "kubernetes/base/deployment.yaml"
SERVICE: Final = "kubernetes/base/service.yaml"
NETWORK: Final = "kubernetes/base/networkpolicy.yaml"
MIGRATE: Final = "kubernetes/migrate/job.yaml"
PRODUCTION: Final = "kubernetes/overlays/production/kustomization.yaml"
SCALED: Final = "kubernetes/overlays/production/scaledobject.yaml"
MONITOR: Final = "kubernetes/overlays/production/podmonitor.yaml"
KUSTOMIZATIONS: Final = (
    BASE, "kubernetes/migrate/kustomization.yaml", "kubernetes/overlays/small/kustomization.yaml", PRODUCTION,
)  # fmt: skip
TOPICS: Final = "kafka/topics.yaml"
USERS: Final = "kafka/users.yaml"
UNIT: Final = "systemd/campaign-stats.service"
UNIT_ENV: Final = "systemd/environment.example"
ROLES: Final = "postgres/roles.sql"
LIVEZ: Final = "livez.py"
DATABASE_PORT: Final = 5432
PROMETHEUS: Final = "prometheus/prometheus.yml"

NEEDED: Final = {"DATABASE_URL": "postgresql://somebody@somewhere/product", "KAFKA_BOOTSTRAP_SERVERS": "somewhere:9092"}
FLUSH_S: Final = 1.0  # beyond SHUTDOWN_DEADLINE_S (deploy/operations.md)
SERVICE_RIGHTS: Final = {"Read topic": {"Describe"}, "Write topic": {"Describe"}}  # beside what it needs itself
OPERATOR_RIGHTS: Final = {  # instead of what the service needs; each is told in kafka/users.yaml
    "Read topic": {"Describe", "DescribeConfigs", "Read", "Write"},
    "Write topic": {"Describe", "DescribeConfigs", "Read"},
    "Read group": {"Describe", "Read"},
}
CUSTOM_KEYS: Final = {  # kinds that Kubernetes has no schema for: what may stand in their spec
    "KafkaTopic": {"partitions", "replicas", "config", "topicName"},
    "KafkaUser": {"authentication", "authorization", "quotas", "template"},
    "PodMonitor": {"selector", "podMetricsEndpoints", "namespaceSelector", "jobLabel", "podTargetLabels"},
    "PrometheusRule": {"groups"},
    "ScaledObject": {
        "scaleTargetRef", "pollingInterval", "cooldownPeriod", "minReplicaCount", "maxReplicaCount", "fallback",
        "advanced", "triggers",
    },
    "TriggerAuthentication": {"env", "secretTargetRef"},
}  # fmt: skip


class BrokenFile(Exception):
    """A file that cannot be read at all; the message names it, the line and the fix."""


def files() -> dict[str, str]:
    """Every text file below deploy/ as it is."""
    return {
        str(path.relative_to(DEPLOY)): path.read_text()
        for path in sorted(DEPLOY.rglob("*"))
        if path.is_file() and path.suffix not in (".pyc", ".png") and "__pycache__" not in path.parts
    }


@dataclass(frozen=True, slots=True)
class Start:
    """One place where the program is started: its arguments, and what the environment sets for it."""

    file: str
    key: str
    arguments: Sequence[str]
    environment: Mapping[str, str]


def documents(given: Files, name: str) -> list[dict[str, Any]]:
    """What a YAML file holds. Raises BrokenFile."""
    if name not in given:
        raise BrokenFile(f"deploy/{name} is missing: put it back")
    try:
        return [one for one in yaml.safe_load_all(given[name]) if one]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BrokenFile(f"deploy/{name}, line {line}: {error.problem}: mend the YAML") from error


def container(given: Files, name: str) -> dict[str, Any]:
    """The one container of a Deployment or Job."""
    [one] = documents(given, name)[0]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = one
    return found


def literals(given: Files, name: str) -> dict[str, str]:
    """What a kustomization puts into the ConfigMap."""
    [document] = documents(given, name)
    generated = document.get("configMapGenerator", [])
    return dict(line.split("=", 1) for one in generated for line in one["literals"])


def lines_of_environment(text: str) -> dict[str, str]:
    """NAME=value lines, as docker compose and systemd read them. Raises BrokenFile."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#") and "=" not in line:
            raise BrokenFile(f"line {number} of an environment file, {line!r}: write NAME=value or begin it with #")
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z][A-Z0-9_]*=", line))


def interpolated(text: str) -> str:
    """Compose's own `${NAME:-default}` with nothing set."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


def image_environment(given: Files) -> dict[str, str]:
    """What the image sets."""
    return dict(re.findall(rf"\b({PREFIX}[A-Z_]+)=(\S+)", given[DOCKERFILE]))


def instruction(given: Files, name: str) -> list[str]:
    """ENTRYPOINT or CMD of the image; CMD of HEALTHCHECK is another."""
    found = re.search(rf'(?m)^{name} (\[".*"\])$', given[DOCKERFILE])
    words: list[str] = yaml.safe_load(found[1]) if found else []
    return words


def starts(given: Files) -> Iterator[Start]:
    """Every place where the program is started."""
    image = image_environment(given)
    yield Start(DOCKERFILE, "CMD", instruction(given, "CMD"), image)
    for name, one in documents(given, COMPOSE)[0]["services"].items():
        if one["image"].startswith("campaign-stats"):
            environment = {key: interpolated(str(value)) for key, value in one.get("environment", {}).items()}
            arguments = [str(word) for word in one.get("command", instruction(given, "CMD"))]
            yield Start(COMPOSE, f"services.{name}", arguments, {**image, **environment})
    own = {one["name"]: "" for name in (DEPLOYMENT,) for one in container(given, name)["env"]}
    for kustomization in (BASE, *KUSTOMIZATIONS[2:]):
        environment = {**image, **literals(given, BASE), **literals(given, kustomization)}
        yield Start(kustomization, "configMapGenerator", container(given, DEPLOYMENT)["args"], {**own, **environment})
    yield Start(MIGRATE, "args", container(given, MIGRATE)["args"], image)
    command = re.search(r"(?m)^ExecStart=(.*)$", given[UNIT])
    yield Start(UNIT, "ExecStart", command[1].split()[1:] if command else [], lines_of_environment(given[UNIT_ENV]))


def settings_problems(given: Files) -> Sequence[str]:
    """Every setting that is named anywhere exists, and every value that is set can be used."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    found = []
    for name, text in given.items():
        for number, line in enumerate(text.splitlines(), 1):
            found += [
                f"deploy/{name}, line {number}: {word} is no setting: README.md, Settings, lists them"
                for word, star in re.findall(rf"\b({PREFIX}[A-Z][A-Z0-9_]*)(\*?)", line)
                if word not in known and not (star and any(one.startswith(word) for one in known))
            ]
    for start in starts(given):
        try:
            read(start.environment)
        except (ConfigError, ValidationError) as error:
            problems = (
                error.problems
                if isinstance(error, ConfigError)
                else [f"{PREFIX}{str(one['loc'][0]).upper()}: {one['msg']}" for one in error.errors()]
            )
            found += [f"deploy/{start.file}, {start.key}: {problem}" for problem in problems]
    return found


def read(environment: Mapping[str, str]) -> Settings:
    """Settings as the service would read them there; secrets from elsewhere are anything. Raises as Settings."""
    given = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in {**NEEDED, **{name: value for name, value in environment.items() if value}}.items()
        if name in NEEDED or name.startswith(PREFIX)
    }
    given["database_url"] = given["database_url"].partition("?")[0]  # names files that only that machine has
    if "kafka_sasl_username" in given:
        given.setdefault("kafka_sasl_password", "anything")
    return Settings(**given)  # type: ignore[arg-type]  # pydantic checks them


def port_problems(given: Files) -> Sequence[str]:
    """Whatever names a port names the one that the service listens on there."""
    found: list[str] = []

    def expect(file: str, key: str, seen: object, wanted: int, setting: str) -> None:
        if str(seen) != str(wanted):
            found.append(f"deploy/{file}, {key}: port {seen}, but {PREFIX}{setting} is {wanted} there: make them one")

    image = read(image_environment(given))
    exposed = re.search(r"(?m)^EXPOSE (\d+) (\d+)$", given[DOCKERFILE])
    for seen, wanted, setting in zip(
        exposed.groups() if exposed else ("?", "?"), (image.http_port, image.api_port), PORTS, strict=True
    ):
        expect(DOCKERFILE, "EXPOSE", seen, wanted, setting)
    livez = re.search(rf'"{PREFIX}HTTP_PORT"\) or (\d+)', given[LIVEZ])
    expect(LIVEZ, "main", livez[1] if livez else "?", Settings.model_fields["http_port"].default, "HTTP_PORT")

    services = documents(given, COMPOSE)[0]["services"]
    for start in starts(given):
        if start.file == COMPOSE and start.arguments == ["run"]:
            one = read(start.environment)
            inside = [str(port).rsplit(":", 1)[-1] for port in services[start.key.removeprefix("services.")]["ports"]]
            for seen, wanted, setting in zip(inside, (one.http_port, one.api_port), PORTS, strict=True):
                expect(COMPOSE, f"{start.key}.ports", seen, wanted, setting)
        if start.file in (BASE, *KUSTOMIZATIONS[2:]):
            one = read(start.environment)
            named = {port["name"]: port["containerPort"] for port in container(given, DEPLOYMENT)["ports"]}
            for name, wanted, setting in zip(PORT_NAMES, (one.http_port, one.api_port), PORTS, strict=True):
                expect(DEPLOYMENT, f"ports.{name}", named.get(name), wanted, f"{setting} ({start.file})")
            if not {one.http_host, one.api_host} <= {"0.0.0.0", "::"}:  # noqa: S104  # probes come from outside the pod
                found.append(f"deploy/{start.file}, {PREFIX}HTTP_HOST: probes and callers come from outside: 0.0.0.0")
    open_ports = {port["port"] for one in documents(given, NETWORK)[0]["spec"]["egress"] for port in one["ports"]}
    broker = int(literals(given, BASE)["KAFKA_BOOTSTRAP_SERVERS"].rpartition(":")[2])
    for port, whose in ((broker, f"KAFKA_BOOTSTRAP_SERVERS of deploy/{BASE}"), (DATABASE_PORT, "PostgreSQL")):
        if port not in open_ports:
            found.append(f"deploy/{NETWORK}, egress.ports.port: {port}, the port of {whose}, is closed: open it")
    default = Settings.model_fields["http_port"].default
    for job in documents(given, PROMETHEUS)[0]["scrape_configs"]:
        for target in (one for config in job["static_configs"] for one in config["targets"]):
            expect(PROMETHEUS, f"{job['job_name']}.targets", target.rpartition(":")[2], default, "HTTP_PORT")
    template = documents(given, DEPLOYMENT)[0]["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in container(given, DEPLOYMENT)["ports"]}
    scraped = template["metadata"]["annotations"]["prometheus.io/port"]
    expect(DEPLOYMENT, "annotations prometheus.io/port", scraped, ports.get("operators", 0), "HTTP_PORT")
    for file, key, names in (
        (SERVICE, "ports.targetPort", [one["targetPort"] for one in documents(given, SERVICE)[0]["spec"]["ports"]]),
        (MONITOR, "podMetricsEndpoints.port", [
            one["port"] for one in documents(given, MONITOR)[0]["spec"]["podMetricsEndpoints"]
        ]),
        (NETWORK, "ingress.ports.port", [
            port["port"] for one in documents(given, NETWORK)[0]["spec"]["ingress"] for port in one["ports"]
        ]),
    ):  # fmt: skip
        found += [
            f"deploy/{file}, {key}: {DEPLOYMENT} has no port {name}: name one of {', '.join(ports)}"
            for name in names
            if name not in ports
        ]
    return found


PORTS: Final = ("HTTP_PORT", "API_PORT")
PORT_NAMES: Final = ("operators", "api")


@cache
def paths() -> frozenset[str]:
    """What the operators' door answers."""
    return frozenset(re.findall(r'add_get\("([^"]+)"', (ROOT / "consumer" / "web.py").read_text()))


def probe_problems(given: Files) -> Sequence[str]:
    """Every path that is asked is one that the service answers, and at the right port."""
    asked = [
        (DEPLOYMENT, f"{name}.httpGet.path", one["httpGet"]["path"], one["httpGet"]["port"])
        for name, one in container(given, DEPLOYMENT).items()
        if name.endswith("Probe")
    ]
    annotations = documents(given, DEPLOYMENT)[0]["spec"]["template"]["metadata"]["annotations"]
    asked.append((DEPLOYMENT, "annotations prometheus.io/path", annotations["prometheus.io/path"], "operators"))
    asked += [
        (MONITOR, "podMetricsEndpoints.path", one["path"], one["port"])
        for one in documents(given, MONITOR)[0]["spec"]["podMetricsEndpoints"]
    ]
    asked += [
        (LIVEZ, "connection.request", path, "operators") for path in re.findall(r'"GET", "([^"]+)"', given[LIVEZ])
    ]
    found = [
        f"deploy/{file}, {key}: nobody answers {path}: it is one of {', '.join(sorted(paths()))}"
        for file, key, path, _ in asked
        if path not in paths()
    ]
    found += [
        f"deploy/{file}, {key.replace('path', 'port')}: {path} is answered at port `operators`, not at {port}"
        for file, key, path, port in asked
        if port != "operators"
    ]
    wanted = {"livenessProbe": "/livez", "startupProbe": "/livez", "readinessProbe": "/readyz"}
    found += [
        f"deploy/{DEPLOYMENT}, {probe}: ask {path}: an outage elsewhere is no reason to restart"
        for probe, path in wanted.items()
        if container(given, DEPLOYMENT).get(probe, {}).get("httpGet", {}).get("path") != path
    ]
    return found


def command_problems(given: Files) -> Sequence[str]:
    """What is started exists, with these arguments."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    found = []
    if (entry := instruction(given, "ENTRYPOINT")) not in [[name] for name in scripts]:
        found.append(f"deploy/{DOCKERFILE}, ENTRYPOINT: {entry} is no command of pyproject.toml: {', '.join(scripts)}")
    program = re.search(r"(?m)^ExecStart=(\S+)", given[UNIT])
    if program is None or Path(program[1]).name not in scripts:
        found.append(f"deploy/{UNIT}, ExecStart: no command of pyproject.toml: {', '.join(scripts)}")
    commands: Mapping[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]  # it is a group
    for start in starts(given):
        name, *rest = start.arguments or [""]
        if name not in commands:
            found.append(f"deploy/{start.file}, {start.key}: `{name}` is none of: {', '.join(sorted(commands))}")
            continue
        options = {option for parameter in commands[name].params for option in parameter.opts}
        found += [
            f"deploy/{start.file}, {start.key}: `{name}` has no option {word}: {', '.join(sorted(options))}"
            for word in rest
            if word.startswith("-") and word.partition("=")[0] not in options
        ]
    return found


def stopping_problems(given: Files) -> Sequence[str]:
    """Whoever stops it waits longer than it needs."""
    found = []
    graces = []
    for start in starts(given):
        needed = read(start.environment).shutdown_deadline_s + FLUSH_S
        if start.file in (BASE, *KUSTOMIZATIONS[2:]):
            pod = documents(given, DEPLOYMENT)[0]["spec"]["template"]["spec"]
            graces.append(
                (DEPLOYMENT, "terminationGracePeriodSeconds", pod.get("terminationGracePeriodSeconds", 30), needed)
            )
        elif start.file == UNIT:
            stop = re.search(r"(?m)^TimeoutStopSec=(\d+)$", given[UNIT])
            graces.append((UNIT, "TimeoutStopSec", stop[1] if stop else 90, needed))
        elif start.file == COMPOSE and start.arguments == ["run"]:
            service = documents(given, COMPOSE)[0]["services"][start.key.removeprefix("services.")]
            graces.append(
                (COMPOSE, f"{start.key}.stop_grace_period", service.get("stop_grace_period", "10s").rstrip("s"), needed)
            )
    for file, key, grace, needed in graces:
        if float(grace) <= needed:
            sentence = (
                f"deploy/{file}, {key}: {grace} s, but it may need {PREFIX}SHUTDOWN_DEADLINE_S and a second, {needed:g}"
                " s: give it more"
            )
            if sentence not in found:
                found.append(sentence)
    signal = re.search(r"(?m)^STOPSIGNAL (\S+)$", given[DOCKERFILE])
    if signal is None or signal[1] not in ("SIGTERM", "SIGINT"):
        found.append(f"deploy/{DOCKERFILE}, STOPSIGNAL: the service listens for SIGTERM and SIGINT only")
    return found


def topic_problems(given: Files) -> Sequence[str]:
    """The topics are those of schemas/topics.py, as `topics --create` makes them."""
    names = Topics()
    wanted = {name: {"cleanup.policy": "delete"} for name in names.all}
    wanted[names.dead_letters]["retention.ms"] = str(cli.DEAD_LETTER_RETENTION_MS)
    specs = {one["metadata"]["name"]: one["spec"] for one in documents(given, TOPICS)}
    found = [f"deploy/{TOPICS}: topic {name} is missing: add a KafkaTopic" for name in wanted.keys() - specs.keys()]
    found += [
        f"deploy/{TOPICS}, {name}: no topic of schemas/topics.py: take it out" for name in specs.keys() - wanted.keys()
    ]
    for name in sorted(wanted.keys() & specs.keys()):
        spec = specs[name]
        config = {key: str(value) for key, value in spec.get("config", {}).items()}
        if config != wanted[name]:
            found.append(f"deploy/{TOPICS}, {name}, config: {config}, but `topics --create` sets {wanted[name]}")
        if (spec.get("partitions"), spec.get("replicas")) != (PARTITIONS, REPLICATION):
            found.append(
                f"deploy/{TOPICS}, {name}: {spec.get('partitions')} partitions, {spec.get('replicas')} replicas, but"
                f" `topics --create` makes {PARTITIONS} and {REPLICATION}"
            )
    return found


def acl_problems(given: Files) -> Sequence[str]:
    """The users may do what they need on what they need, and nothing else."""
    users = {one["metadata"]["name"]: one["spec"] for one in documents(given, USERS)}
    found = []
    login = literals(given, BASE)[f"{PREFIX}KAFKA_SASL_USERNAME"]
    if login not in users:
        found.append(f"deploy/{USERS}: no KafkaUser {login}, but deploy/{BASE} logs in as that: name them alike")
    for name, rights in ((login, SERVICE_RIGHTS), (f"{login}-operator", OPERATOR_RIGHTS)):
        if name not in users:
            found.append(f"deploy/{USERS}: no KafkaUser {name}: it is documented, put it back")
            continue
        wanted: dict[tuple[str, str], set[str]] = {}
        for right in needed_rights(Topics(), read({}).group):
            also = rights.get(f"{right.operation} {right.resource}", set())
            wanted.setdefault((right.resource, right.name), set()).update(also)
            if name == login:
                wanted[right.resource, right.name].add(right.operation)
        seen: dict[tuple[str, str], set[str]] = {}
        for acl in users[name]["authorization"]["acls"]:
            resource = acl["resource"]
            if resource.get("patternType") != "literal" or acl.get("type", "allow") != "allow":
                found.append(f"deploy/{USERS}, {name}, {resource}: only literal names and allow: else rights leak")
            seen.setdefault((resource["type"], resource.get("name", "*")), set()).update(acl["operations"])
        for kind, resource_name in sorted(wanted.keys() | seen.keys()):
            needed, given_ = wanted.get((kind, resource_name), set()), seen.get((kind, resource_name), set())
            if needed - given_:
                found.append(
                    f"deploy/{USERS}, {name}: may not {', '.join(sorted(needed - given_))} {kind} {resource_name}:"
                    " add it"
                )
            if given_ - needed:
                found.append(
                    f"deploy/{USERS}, {name}: needs no {', '.join(sorted(given_ - needed))} on {kind} {resource_name}:"
                    " take it away"
                )
        mechanism = literals(given, BASE)[f"{PREFIX}KAFKA_SASL_MECHANISM"].lower()
        if users[name]["authentication"]["type"] != mechanism:
            found.append(f"deploy/{USERS}, {name}, authentication.type: deploy/{BASE} logs in by {mechanism}")
    return found


def role_problems(given: Files) -> Sequence[str]:
    """deploy/postgres/roles.sql grants the columns that the code asks for, and no others."""
    granted: dict[tuple[str, str], set[str]] = {}
    text = re.sub(r"--.*", "", given[ROLES])
    beyond = re.findall(
        r"\b(SUPERUSER|BYPASSRLS|CREATEROLE|CREATEDB|GRANT (?:ALL|INSERT|DELETE|TRUNCATE)[^;]*public\.\w+)", text
    )
    for right, columns, table in re.findall(
        r"GRANT (SELECT|UPDATE)\s*\(([^)]*)\)\s*ON (public\.\w+) TO campaign_stats_run;", text
    ):
        granted.setdefault((table, right), set()).update(re.split(r"\s*,\s*", columns.strip()))
    wanted: dict[tuple[str, str], set[str]] = {}
    for table, right, needed in (*migrations.RUN_RIGHTS, *migrations.API_RIGHTS):
        wanted.setdefault((table, right), set()).update(needed)
    found = [f"deploy/{ROLES}: {' '.join(one.split())} is more than the service needs: take it away" for one in beyond]
    own = {table: set(rights.split(", ")) for table, rights in re.findall(r"\('(\w+)', '([A-Z, ]+)'\)", text)}
    for table in sorted(own.keys() | migrations.OWN_RIGHTS.keys()):
        least = set(migrations.OWN_RIGHTS.get(table, ()))
        if (has := own.get(table, set())) != least:
            found.append(
                f"deploy/{ROLES}, VALUES, {table}: {', '.join(sorted(has)) or 'nothing'}, but the least is"
                f" {', '.join(sorted(least)) or 'nothing'}: make it that"
            )
    for table, right in sorted(wanted.keys() | granted.keys()):
        needs, has = wanted.get((table, right), set()), granted.get((table, right), set())
        if needs - has:
            found.append(
                f"deploy/{ROLES}: campaign_stats_run may not {right} {', '.join(sorted(needs - has))} of {table}:"
                " grant it"
            )
        if has - needs:
            found.append(
                f"deploy/{ROLES}: campaign_stats_run needs no {right} on {', '.join(sorted(has - needs))} of {table}:"
                " take it away"
            )
    found += [
        f"deploy/{ROLES}: {grant.strip()}: a right on a whole table of the product: name the columns"
        for grant in re.findall(r"GRANT [A-Z, ]+ ON public\.\w+ TO campaign_stats_run", text)
    ]
    return found


def reference_problems(given: Files) -> Sequence[str]:
    """Names that one file takes from another: versions, users, mounts, roles, defaults, what is scaled by what."""
    found = []
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in KUSTOMIZATIONS[1:]:
        tags = [str(one.get("newTag")) for one in documents(given, name)[0].get("images", [])]
        if tags != [version]:
            found.append(f"deploy/{name}, images: newTag {tags}, but pyproject.toml has version {version}")
    if f"ARG VERSION={version}\n" not in given[DOCKERFILE]:
        found.append(f"deploy/{DOCKERFILE}, ARG VERSION: pyproject.toml has version {version}")

    user = re.search(r"(?m)^USER (\d+):(\d+)$", given[DOCKERFILE])
    ids = user.groups() if user else ("?", "?")
    if user is None or "0" in ids:
        found.append(
            f"deploy/{DOCKERFILE}, USER: two numbers, none of them 0, else Kubernetes cannot see it is not root"
        )
    for name in (DEPLOYMENT, MIGRATE):
        context = documents(given, name)[0]["spec"]["template"]["spec"]["securityContext"]
        if (str(context.get("runAsUser")), str(context.get("runAsGroup"))) != ids:
            found.append(f"deploy/{name}, securityContext.runAsUser: the image has user {':'.join(ids)}")

    services = documents(given, COMPOSE)[0]["services"]
    for name, one in services.items():
        for volume in one.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith(".") and not (DEPLOY / "compose" / source).exists():
                found.append(
                    f"deploy/{COMPOSE}, services.{name}.volumes: {source} is not there: Docker would make a folder"
                )
        found += [
            f"deploy/{COMPOSE}, services.{name}.depends_on: there is no service {other}"
            for other in one.get("depends_on", ())
            if other not in services
        ]
    defaults = lines_of_environment(given[COMPOSE_ENV])
    for name, default in set(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", given[COMPOSE])):
        if defaults.get(name) != default:
            found.append(
                f"deploy/{COMPOSE_ENV}, {name}: {defaults.get(name)}, but {COMPOSE} takes `{default}`: make them one"
            )

    roles = set(re.findall(r"CREATE ROLE (\w+)", given[ROLES]))
    for name in (COMPOSE, UNIT_ENV):
        found += [
            f"deploy/{name}: role {role} is not made by {ROLES}"
            for role in re.findall(r"postgresql://(campaign_stats\w*):", given[name])
            if role not in roles
        ]
    return [*found, *_custom_problems(given)]


def _custom_problems(given: Files) -> Iterator[str]:
    """What Kubernetes has no schema for."""
    for name in (TOPICS, USERS, MONITOR, SCALED):
        for one in documents(given, name):
            allowed = CUSTOM_KEYS.get(one["kind"])
            if allowed is None:
                yield f"deploy/{name}: kind {one['kind']} is not known here: is it misspelt?"
            elif unknown := one["spec"].keys() - allowed:
                keys = ", ".join(sorted(unknown))
                yield f"deploy/{name}, {one['kind']} {one['metadata']['name']}: there is no key {keys} in its spec"
    deployment = documents(given, DEPLOYMENT)[0]
    scaled, login = documents(given, SCALED)
    spec = scaled["spec"]
    if spec["scaleTargetRef"] != {"kind": "Deployment", "name": deployment["metadata"]["name"]}:
        yield f"deploy/{SCALED}, scaleTargetRef: no such Deployment: {deployment['metadata']['name']}"
    if "replicas" in deployment["spec"]:
        yield f"deploy/{DEPLOYMENT}, spec.replicas: each apply would undo what KEDA decided: take it out"
    if (most := spec.get("maxReplicaCount")) != PARTITIONS:
        yield f"deploy/{SCALED}, maxReplicaCount: {most}, but there are {PARTITIONS} partitions"
    kafka = read({**literals(given, BASE), **literals(given, PRODUCTION)})
    for trigger in spec["triggers"]:
        told = trigger["metadata"]
        for key, wanted in {
            "bootstrapServers": kafka.kafka_bootstrap_servers,
            "consumerGroup": kafka.group,
            "sasl": str(kafka.kafka_sasl_mechanism).lower().replace("-sha-", "_sha"),
            "tls": "enable" if kafka.kafka_security_protocol.endswith("SSL") else "disable",
        }.items():
            if told.get(key) != wanted:
                yield f"deploy/{SCALED}, triggers {told['topic']}, {key}: {told.get(key)}, but the service has {wanted}"
        if trigger["authenticationRef"]["name"] != login["metadata"]["name"]:
            yield f"deploy/{SCALED}, authenticationRef: no such TriggerAuthentication: {login['metadata']['name']}"
    if (topics := {one["metadata"]["topic"] for one in spec["triggers"]}) != set(Topics(kafka.topic_prefix).read):
        yield f"deploy/{SCALED}, triggers: {sorted(topics)}, but the service reads {Topics(kafka.topic_prefix).read}"
    pod = container(given, DEPLOYMENT)
    names = {one["name"] for one in pod["env"]} | literals(given, BASE).keys()
    for one in login["spec"].get("env", []):
        if one["name"] not in names or one.get("containerName") != pod["name"]:
            where = one.get("containerName")
            yield f"deploy/{SCALED}, TriggerAuthentication env: {DEPLOYMENT} sets no {one['name']} in {where}"
    secrets = {one["valueFrom"]["secretKeyRef"]["name"] for one in pod["env"]} | {
        one["secret"]["secretName"] for one in deployment["spec"]["template"]["spec"]["volumes"]
    }
    for one in login["spec"]["secretTargetRef"]:
        if one["name"] not in secrets:
            yield f"deploy/{SCALED}, secretTargetRef {one['parameter']}: the service uses no Secret {one['name']}"
    mounted = {one["mountPath"] for one in pod["volumeMounts"]}
    if (ca := kafka.kafka_ssl_cafile) is not None and str(ca.parent) not in mounted:
        yield f"deploy/{BASE}, {PREFIX}KAFKA_SSL_CAFILE: {ca} is under no volumeMount of {DEPLOYMENT}"
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for name, path in (
        (SERVICE, ("selector",)),
        (NETWORK, ("podSelector", "matchLabels")),
        (MONITOR, ("selector", "matchLabels")),
        ("kubernetes/base/poddisruptionbudget.yaml", ("selector", "matchLabels")),
    ):
        selector: Any = documents(given, name)[0]["spec"]
        for key in path:
            selector = selector[key]
        if not selector.items() <= labels.items():
            yield f"deploy/{name}, {'.'.join(path)}: {selector} matches no pod of {DEPLOYMENT}: {labels}"
    if deployment["spec"]["template"]["spec"].get("enableServiceLinks") is not False:
        yield (
            f"deploy/{DEPLOYMENT}, enableServiceLinks: set it to false: the Service's variables would begin like"
            " settings"
        )


CHECKS: Final[tuple[tuple[str, str, Check], ...]] = (
    ("settings", "every setting that deploy/ names exists, every value can be used", settings_problems),
    ("ports", "ports are those that the service listens on", port_problems),
    ("probes", "probes and scrapes ask what is answered", probe_problems),
    ("commands", "what is started exists, with these options", command_problems),
    ("stopping", "whoever stops it waits longer than it needs", stopping_problems),
    ("topics", "Strimzi's topics are those of schemas/topics.py", topic_problems),
    ("acls", "Kafka's users may do what they need and nothing else", acl_problems),
    ("roles", "PostgreSQL's role may do what it needs to the product's tables and nothing else", role_problems),
    ("references", "names that one file takes from another are there", reference_problems),
)
