"""deploy/kafka/users.yaml on a broker that grants nothing else: the service serves, an operator's commands work."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import yaml

from consumer import broker
from schemas.topics import Topics
from tests.conftest import Bus, StartService, command, eventually
from tests.servers import ApacheKafka, kafka_jars
from tests.world import REFERENCE, add_campaign, hint

pytestmark = pytest.mark.apache_kafka

USERS = {
    one["metadata"]["name"]: one["spec"]["authorization"]["acls"]
    for one in yaml.safe_load_all((Path(__file__).parents[2] / "deploy" / "kafka" / "users.yaml").read_text())
    if one
}
SERVICE, OPERATOR = USERS
PASSWORD = "hunter2"
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
EVENT = "campaign.stats-updated"


@pytest.fixture(scope="module")
def kafka(servers_directory: Path) -> Iterator[ApacheKafka]:
    """Users have the rights of users.yaml; whoever comes by the plain listener may do everything."""
    server = ApacheKafka(
        servers_directory / "acls-kafka",
        {
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "listener.name.users.sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.users.scram-sha-512.sasl.jaas.config": SCRAM,
        },
        secured={"USERS": "SASL_PLAINTEXT"},
        users=dict.fromkeys(USERS, PASSWORD),
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()


async def grant(kafka: ApacheKafka, *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "java", "-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*",
        "org.apache.kafka.tools.AclCommand", "--bootstrap-server", kafka.bootstrap, "--force", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()


async def as_written(kafka: ApacheKafka, user: str) -> None:
    """Give the user what users.yaml says, word by word."""
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for acl in USERS[user]:
        together.setdefault((acl["resource"]["type"], tuple(acl["operations"])), []).append(acl["resource"]["name"])
    for (kind, operations), names in together.items():
        await grant(
            kafka, "--add", "--allow-principal", f"User:{user}",
            *(word for operation in operations for word in ("--operation", operation)),
            *(word for name in names for word in (f"--{kind}", name)),
        )  # fmt: skip


@pytest.fixture
async def topics(kafka: ApacheKafka) -> AsyncIterator[Topics]:
    """Under their own names, as in production, because users.yaml names them."""
    names, connection = Topics(), broker.Connection(kafka.bootstrap, {})
    await broker.create_topics(connection, {name: {} for name in names.all}, partitions=3, replication=1)
    yield names
    await broker.delete_topics(connection, names.all)


@pytest.fixture
def login(kafka: ApacheKafka) -> dict[str, str]:
    """How a user comes in; the name is missing."""
    return {
        "KAFKA_BOOTSTRAP_SERVERS": f"localhost:{kafka.ports['USERS']}",
        "CAMPAIGN_STATS_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "CAMPAIGN_STATS_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "CAMPAIGN_STATS_KAFKA_SASL_PASSWORD": PASSWORD,
    }


def as_user(environment: dict[str, str], login: dict[str, str], user: str) -> dict[str, str]:
    return {**environment, **login, "CAMPAIGN_STATS_KAFKA_SASL_USERNAME": user}


async def test_the_service_and_its_operator_get_by_with_the_rights_of_users_yaml(
    kafka: ApacheKafka, service: StartService, bus: Bus, db: asyncpg.Connection, environment: dict[str, str],
    login: dict[str, str],
) -> None:  # fmt: skip
    operator, plain = as_user(environment, login, OPERATOR), dict(environment)
    code, out, _ = await command(operator, "topics", "--json")
    assert code != 0, "without rights nothing may be seen: " + out
    await as_written(kafka, SERVICE)
    await as_written(kafka, OPERATOR)

    environment.update(as_user(environment, login, SERVICE))
    running = await service()
    campaign = await add_campaign(db, REFERENCE)
    topic = bus.topics.of("prospect.status_changed.v1")
    await bus.publish(topic, hint(campaign), key=str(campaign))
    await bus.publish(topic, b"no event", key=str(campaign))

    async def told(name: str) -> list[Any]:
        return await bus.read(name)

    await eventually(lambda: told(EVENT), "news are published", running)
    await eventually(lambda: told(bus.topics.dead_letters), "the bad record is kept", running)

    code, out, error = await command(operator, "sync", str(campaign), "--wait", "20")
    assert (code, '"total":120' in out.replace(" ", "")) == (0, True), (out, error)
    code, out, error = await command(operator, "doctor", "--json")
    assert "may not be read" not in out  # DescribeConfigs
    assert "missing" not in out
    code, out, error = await command(operator, "dead-letters", "list", "--json")
    assert (code, "not_json" in out) == (0, True), (out, error)
    code, out, error = await command(operator, "dead-letters", "redrive", "--all", "--json", timeout_s=60)
    assert (code, '"sent":1' in out.replace(" ", "")) == (0, True), (out, error)
    running.terminate()
    assert await running.wait() == 0
    code, out, error = await command(operator, "replay", "--since", "1h")
    assert code == 0, (out, error)

    plain_service = as_user(plain, login, SERVICE)
    code, out, error = await command(plain_service, "dead-letters", "list")
    assert code != 0, (out, error)
    await broker.delete_topics(broker.Connection(kafka.bootstrap, {}), [EVENT])
    code, out, error = await command(plain_service, "topics", "--create", "--partitions", "1", "--replication", "1")
    assert code != 0, (out, error)


async def test_a_right_of_users_yaml_that_is_lacking_is_noticed(
    kafka: ApacheKafka, topics: Topics, environment: dict[str, str], login: dict[str, str]
) -> None:
    service = as_user(environment, login, SERVICE)
    await as_written(kafka, SERVICE)
    code, out, _ = await command(service, "topics")
    assert code == 0, out
    written = topics.written[0]
    rights = ("--operation", "Write", "--operation", "Describe", "--topic", written)
    await grant(kafka, "--remove", "--allow-principal", f"User:{SERVICE}", *rights)
    code, out, error = await command(service, "topics")
    assert code != 0, (out, error)
    assert written in out + error
