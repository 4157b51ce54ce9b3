"""The whole service with exactly the documented rights, and what it says when one of them is taken away.

A broker with TLS, SCRAM-SHA-512 and the StandardAuthorizer, which forbids what nobody allowed; only its plain listener,
for the tests themselves, is the administrator's. A PostgreSQL that is reached by TLS and password only, and a role that
owns nothing.
"""

import asyncio
import hashlib
import json
import re
import shlex
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import Request, urlopen
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest

from consumer import broker, migrations
from consumer.broker import Right, Source
from consumer.demo.servers import Postgres
from consumer.doctor.kafka import examine_kafka
from consumer.errors import Unavailable
from consumer.service import kafka_connection
from consumer.settings import read_settings
from schemas.topics import Topics
from tests.conftest import Bus, RunningService, StartService, command, end_services, eventually, start_service
from tests.documents import rows_under
from tests.secured import LOGIN, Files, certificates, postgres_with_tls, with_store
from tests.servers import REPOSITORY, ApacheKafka, kafka_jars
from tests.world import REFERENCE, USER, add_campaign, hint, stats_of, sync_request, truth

pytestmark = [pytest.mark.apache_kafka, pytest.mark.machine_postgres, pytest.mark.xdist_group("rights")]

PASSWORD = "hunter2-rights"
TOKEN = "hunter2-rights-token"
ROLE = "limited"
RIGHTS = [f"{right.operation} {right.name}" for right in broker.needed_rights(Topics(), "the group")]
CODES = {"topic": 2, "group": 3, "Read": 3, "Write": 4, "Describe": 8}  # of Kafka's protocol
ALLOW, ANY, LITERAL = 3, 1, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Certificates of the servers."""
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def kafka(servers_directory: Path, files: Files) -> Iterator[ApacheKafka]:
    """The user `service` may do nothing until it is allowed."""
    server = ApacheKafka(
        servers_directory / "rights-kafka",
        {
            **with_store(files),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",  # who comes by the plain listener
            "listener.name.users.sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.users.scram-sha-512.sasl.jaas.config": f"{LOGIN}.scram.ScramLoginModule required;",
        },
        secured={"USERS": "SASL_SSL"},
        users={"service": PASSWORD},
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()


def by_socket(server: Postgres, database: str) -> str:
    """As the administrator."""
    return f"postgresql://postgres@/{database}?host={server.directory}&port={server.port}"


@asynccontextmanager
async def administrator(server: Postgres, database: str = "postgres") -> AsyncIterator[asyncpg.Connection]:
    """A session that may do everything; jsonb comes as Python values."""
    connection = await asyncpg.connect(by_socket(server, database))
    try:
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        yield connection
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def tls_postgres(servers_directory: Path, files: Files) -> Iterator[Postgres]:
    """With the template of a migrated database, and a role without any right."""

    async def prepare(server: Postgres) -> None:
        async with administrator(server) as connection:
            await connection.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
            await connection.execute("CREATE DATABASE template_cs")
        await migrations.migrate(by_socket(server, "template_cs"), reference_schema=True)

    with postgres_with_tls(servers_directory / "rights-pg", files) as server:
        asyncio.run(prepare(server))
        yield server


def grants() -> list[str]:
    """What deploy/README.md documents, one statement for every table and right."""
    return [
        f"GRANT USAGE ON SCHEMA campaign_stats TO {ROLE}",
        *(
            f"GRANT {right} ({', '.join(columns)}) ON {table} TO {ROLE}"
            for table, right, columns in (*migrations.RUN_RIGHTS, *migrations.API_RIGHTS)
        ),
        *(
            f"GRANT {right} ON campaign_stats.{table} TO {ROLE}"
            for table, rights in migrations.OWN_RIGHTS.items()
            for right in rights
        ),
    ]


@pytest.fixture
async def database_url(tls_postgres: Postgres, files: Files) -> AsyncIterator[str]:
    """A fresh, migrated database, as the role with exactly its rights reaches it."""
    name = f"t{uuid4().hex[:12]}"
    async with administrator(tls_postgres) as connection:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE template_cs")
    async with administrator(tls_postgres, name) as connection:
        await connection.execute(";".join(grants()))
    yield (
        f"postgresql://{ROLE}:{PASSWORD}@localhost:{tls_postgres.port}/{name}"
        f"?sslmode=verify-full&sslrootcert={files.ca}"
    )
    async with administrator(tls_postgres) as connection:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def db(tls_postgres: Postgres, database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The administrator's session in that database."""
    async with administrator(tls_postgres, urlsplit(database_url).path[1:]) as connection:
        yield connection


@pytest.fixture
def environment(environment: dict[str, str], kafka: ApacheKafka, files: Files) -> dict[str, str]:
    """With the login, and the API door open: it needs rights of its own."""
    return environment | {
        "KAFKA_BOOTSTRAP_SERVERS": f"localhost:{kafka.ports['USERS']}",
        "CAMPAIGN_STATS_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "CAMPAIGN_STATS_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "CAMPAIGN_STATS_KAFKA_SASL_USERNAME": "service",
        "CAMPAIGN_STATS_KAFKA_SASL_PASSWORD": PASSWORD,
        "CAMPAIGN_STATS_KAFKA_SSL_CAFILE": str(files.ca),
        "CAMPAIGN_STATS_API_PORT": "0",
        "CAMPAIGN_STATS_API_TOKENS": json.dumps({hashlib.sha256(TOKEN.encode()).hexdigest(): str(USER)}),
    }


class Acls:
    """Allows the user `service` what it needs, and forbids it again."""

    def __init__(self, admin: AIOKafkaAdminClient, needed: Sequence[Right], connection: broker.Connection) -> None:
        self._admin = admin
        self.connection = connection
        self.needed = {(right.operation, right.name): right for right in needed}

    def of(self, rights: Sequence[Right]) -> "Acls":
        """The same for these."""
        return Acls(self._admin, rights, self.connection)

    def one(self, number: int) -> Right:
        """In the order of the list."""
        return list(self.needed.values())[number]

    async def allow(self, *rights: Right) -> None:
        for right in rights:
            place = (CODES[right.resource], right.name, LITERAL, "User:service", "*")
            answer = await self._admin._send_request(CreateAclsRequest(*place, CODES[right.operation], ALLOW))
            assert [code for code, _ in answer.creation_responses] == [0]
        await self._settled(without=())

    async def let_see(self, *rights: Right) -> None:
        """Their topics and groups, and no more."""
        for right in rights:
            place = (CODES[right.resource], right.name, LITERAL, "User:service", "*")
            answer = await self._admin._send_request(CreateAclsRequest(*place, CODES["Describe"], ALLOW))
            assert [code for code, _ in answer.creation_responses] == [0]

    async def forbid(self, *rights: Right) -> None:
        for right in rights:
            place = (CODES[right.resource], right.name, LITERAL, "User:service", "*")
            answer = await self._admin._send_request(DeleteAclsRequest(*place, CODES[right.operation], ALLOW))
            [(code, _, matching)] = answer.filter_responses
            assert (code, len(matching)) == (0, 1)
        await self._settled(without=rights)

    async def _settled(self, without: Sequence[Right]) -> None:
        async def agrees() -> bool:
            found = await broker.lacking_rights(self.connection, list(self.needed.values()))
            return set(without) == set(found)

        await eventually(agrees, "the broker knows of the change")


@pytest.fixture
async def no_rights(
    kafka: ApacheKafka, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Acls]:
    """Of this test's topics and group, none allowed yet."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = read_settings()
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    needed = broker.needed_rights(Topics(settings.topic_prefix), settings.group)
    yield Acls(admin, needed, kafka_connection(settings))
    await admin.close()


@pytest.fixture
async def acls(no_rights: Acls) -> Acls:
    """Exactly the documented rights."""
    await no_rights.allow(*no_rights.needed.values())
    return no_rights


async def call(running: RunningService, campaign_id: UUID) -> Any:
    """The API door's answer."""

    def post() -> Any:
        request = Request(
            f"http://127.0.0.1:{running.api_port}/api/campaigns/{campaign_id}/sync-stats",
            method="POST",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        with urlopen(request, timeout=10) as response:
            return json.load(response)

    return await asyncio.to_thread(post)


def about(bus: Bus, topic: str, campaign_id: UUID | str) -> Callable[[], Coroutine[Any, Any, list[dict[str, Any]]]]:
    """Reads the events of this campaign."""

    async def read() -> list[dict[str, Any]]:
        return [event for event in await bus.events(bus.topics.prefix + topic) if event["subject"] == str(campaign_id)]

    return read


async def test_the_whole_scenario_runs_with_exactly_the_documented_rights(
    service: StartService, bus: Bus, db: asyncpg.Connection, acls: Acls
) -> None:
    hints, requests = bus.topics.read
    campaign_id = await add_campaign(db, REFERENCE)
    bouncing = await add_campaign(db, {"sent": 95, "bounced": 5})
    locked = await add_campaign(db, {"sent": 3})
    running = await service(sweep_interval_s=0.5)

    async with db.transaction():
        await db.execute("SELECT FROM campaigns WHERE id = $1 FOR UPDATE", locked)
        await bus.publish(hints, hint(locked))
        await bus.publish(hints, hint(campaign_id))
        await eventually(about(bus, "campaign.stats-updated", campaign_id), "the hint is served", running)
        waiting = "SELECT count(*) FROM campaign_stats.deferred WHERE campaign_id = $1"
        await eventually(lambda: db.fetchval(waiting, locked), "the locked one waits", running)
    await eventually(about(bus, "campaign.stats-updated", locked), "and is served when it is free", running)
    assert await stats_of(db, locked) == {"total": 3, "sent": 3, "replied": 0, "bounced": 0}

    asked, unknown = sync_request(campaign_id), sync_request(uuid4())
    await bus.publish(requests, asked)
    await bus.publish(requests, unknown)

    async def answered() -> bool:
        answers = await about(bus, "campaign.stats-updated", campaign_id)()
        return asked["id"] in [answer.get("causationid") for answer in answers]

    await eventually(answered, "the request is answered", running)
    [rejected] = await eventually(about(bus, "campaign.sync-rejected", unknown["subject"]), "and rejected", running)
    assert rejected["data"]["reason"] == "not_found"

    await bus.publish(hints, b"no event")
    letters = bus.topics.dead_letters
    [letter] = await eventually(lambda: bus.read(letters), "the bad record is kept", running)
    assert dict(letter.headers)["dead-letter-reason"] == b"not_json"

    await bus.publish(hints, hint(bouncing))
    [paused] = await eventually(about(bus, "campaign.paused", bouncing), "the guard pauses", running)
    assert paused["data"]["bounced"] == 5

    await db.execute("UPDATE campaigns SET stats = '{\"total\": 7}' WHERE id = $1", campaign_id)

    async def healed() -> bool:
        stats: dict[str, int] = await stats_of(db, campaign_id)
        return stats["total"] == sum((await truth(db, campaign_id)).values())

    await eventually(healed, "the sweep heals a manual change", running)
    assert (await call(running, campaign_id))["campaign"]["stats"]["bounced"] == 1
    assert json.loads((await running.get("/readyz"))[1]) == {"ready": True, "degraded": []}
    assert not running.messages("dependency lost")


async def test_what_operators_do_to_it_needs_no_more_than_the_service_has(
    environment: dict[str, str], bus: Bus, db: asyncpg.Connection, acls: Acls
) -> None:
    await add_campaign(db, REFERENCE, stats={})
    assert (await command(environment, "drift"))[0] == 1
    assert (await command(environment, "reconcile", "--all", "--now"))[:2] == (0, "1\n")
    assert (await command(environment, "deferred", "retry", "--all"))[0] == 0
    assert (await command(environment, "outbox", "requeue", "--all"))[0] == 0
    assert (await command(environment, "replay", "--since", "1h"))[0] == 0
    code, out, _ = await command(environment, "topics")
    assert (code, out.count("present")) == (0, 6)
    assert (await command(environment, "run", "--until-caught-up"))[0] == 0


def lacks(right: Right) -> str:
    """The sentence, up to what it is for."""
    return f"Kafka: the user may not {right.operation} {right.resource} {right.name} ("


async def doctors_words() -> list[tuple[str, str]]:
    """What is wrong in Kafka, and the command that mends it; warnings are no matter here."""
    settings = read_settings()
    checks = await examine_kafka(kafka_connection(settings), settings)
    return [(finding.wrong, finding.mend) for _, findings in checks for finding in findings if finding.level == "error"]


@pytest.mark.parametrize("number", range(len(RIGHTS)), ids=RIGHTS)
async def test_without_a_single_right_in_kafka_run_and_doctor_name_it(
    environment: dict[str, str], bus: Bus, acls: Acls, number: int
) -> None:
    right = acls.one(number)
    await acls.forbid(right)
    code, out, error = await command(environment, "run")
    assert code == 2, out + error
    [sentence] = error.splitlines()
    assert sentence.startswith(f"campaign-stats: {lacks(right)}")
    [(wrong, mend)] = await doctors_words()
    assert sentence == f"campaign-stats: {wrong}: {mend}"
    assert mend.endswith(f"--operation {right.operation} --{right.resource} {right.name}")
    await acls.allow(right)
    assert await doctors_words() == []
    assert (await command(environment, "run", "--until-caught-up"))[0] == 0


async def test_what_may_be_seen_but_not_used_is_named_too(environment: dict[str, str], bus: Bus, acls: Acls) -> None:
    """Where Describe is granted by itself a missing right hides nothing."""
    rights = list(acls.needed.values())
    await acls.let_see(*rights)
    await acls.forbid(*rights)
    code, _, error = await command(environment, "run")
    assert code == 2
    sentences = error.splitlines()
    assert [sentence.startswith(f"campaign-stats: {lacks(right)}") for sentence, right in zip(
        sentences, rights, strict=True
    )] == [True] * len(rights)  # fmt: skip


async def test_without_any_right_all_are_listed_and_the_command_told_gives_one(
    environment: dict[str, str], kafka: ApacheKafka, no_rights: Acls
) -> None:
    code, _, error = await command(environment, "run")
    assert code == 2
    sentences = error.splitlines()
    assert [sentence.startswith(f"campaign-stats: {lacks(right)}") for sentence, right in zip(
        sentences, no_rights.needed.values(), strict=True
    )] == [True] * len(RIGHTS)  # fmt: skip
    words = await doctors_words()
    assert [f"campaign-stats: {wrong}: {mend}" for wrong, mend in words] == sentences

    tool, *arguments = shlex.split(words[0][1])
    assert tool == "kafka-acls.sh"
    for option, value in (("--bootstrap-server", kafka.bootstrap), ("--command-config", None)):  # as administrator
        place = arguments.index(option)
        arguments[place : place + 2] = [option, value] if value else []
    process = await asyncio.create_subprocess_exec(
        "java", "-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*",
        "org.apache.kafka.tools.AclCommand", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()

    async def one_less() -> bool:
        return await doctors_words() == words[1:]

    await eventually(one_less, "the broker grants it")


async def test_each_right_that_is_lost_while_it_runs_is_named_and_work_goes_on_when_it_is_back(
    service: StartService, bus: Bus, db: asyncpg.Connection, acls: Acls
) -> None:
    hints, requests = bus.topics.read
    running = await service()

    async def degraded() -> list[str]:
        found: list[str] = json.loads((await running.get("/readyz"))[1])["degraded"]
        return found

    async def use_all() -> tuple[UUID, UUID]:
        """Something for every right to do; a bouncing campaign, and one that nobody knows."""
        bouncing, unknown = await add_campaign(db, {"sent": 95, "bounced": 5}), uuid4()
        await bus.publish(hints, hint(bouncing))
        await bus.publish(requests, sync_request(unknown))
        await bus.publish(hints, b"no event")
        return bouncing, unknown

    for letters, right in enumerate(acls.needed.values(), 1):
        await acls.forbid(right)
        bouncing, unknown = await use_all()

        def told(right: Right = right) -> bool:
            words = f"the user may not {right.operation} {right.resource} {right.name}"
            return any(words in line["why"] for line in running.messages("dependency lost"))

        await eventually(told, f"it says that it may not {right.operation} {right.name}", running, timeout_s=40)
        await eventually(degraded, "what is lost shows at the operators' door", running)
        assert (await running.get("/livez"))[0] == 200
        await acls.allow(right)

        async def all_done(bouncing: UUID = bouncing, unknown: UUID = unknown, letters: int = letters) -> bool:
            paused, rejected = about(bus, "campaign.paused", bouncing), about(bus, "campaign.sync-rejected", unknown)
            return (
                len({event["id"] for event in await paused()}) == 1
                and len({event["id"] for event in await rejected()}) == 1  # told twice where offsets were not committed
                and len(await bus.read(bus.topics.dead_letters)) >= letters
                and await degraded() == []
            )

        await eventually(all_done, f"what waited for {right.operation} {right.name} is done", running, timeout_s=40)


async def test_a_topic_closed_to_us_is_told_also_when_the_client_has_forgotten_its_partitions(
    bus: Bus, acls: Acls
) -> None:
    """Once a minute it asks which topics there are; then the group goes on without those it may not read."""
    hints, requests = bus.topics.read
    source = Source(acls.connection, [hints, requests], acls.one(2).name, fetch_max_wait_ms=20, revocation_s=8)

    async def nothing() -> None:
        """No work is under way."""

    await source.start(nothing, lambda _: None)
    try:
        await source.check_topics()
        await acls.forbid(acls.one(0))
        await source._consumer._client.force_metadata_update()

        async def is_silent() -> bool:
            with suppress(Unavailable):  # until the group has joined anew
                await source.poll()
                return {partition.topic for partition in source._consumer.assignment()} == {requests}
            return False

        await eventually(is_silent, "the client goes on without it and says nothing")
        with pytest.raises(Unavailable, match=f"the user may not Read topic {hints}"):
            await source.check_topics()
        await acls.allow(acls.one(0))
        await bus.publish(hints, hint(uuid4()))
        await source.check_topics()  # asks, so the client need not wait for its minute

        async def heard() -> bool:
            batches, _ = await source.poll()
            return any(batch.records for batch in batches)

        await eventually(heard, "it is read again")
    finally:
        await source.stop(5)


OPERATIONS: dict[str, Literal["Read", "Write"]] = {"Read": "Read", "Write": "Write"}
COMMANDS = dict(rows_under("| command | rights in Kafka |", REPOSITORY / "deploy" / "README.md"))


def documented(words: str, topics: Topics, group: str) -> list[Right]:
    """The rights in a cell of that table, such as `Write a; Read b, group c`."""
    found: list[Right] = []
    for part in words.split("; "):
        operation, _, names = part.partition(" ")
        assert operation == "Read" or operation == "Write"  # so that mypy knows
        for name in names.split(", "):
            if name.startswith("group "):
                found.append(Right(OPERATIONS[operation], "group", group, "as documented"))
            else:
                found.append(Right(OPERATIONS[operation], "topic", topics.prefix + name, "as documented"))
    return found


async def ends(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command; 0 for `tail` when it goes on as it should."""
    try:
        code, _, error = await command(environment, *arguments, timeout_s=4 if arguments == ("tail",) else 30)
    except TimeoutError:
        return 0, ""
    return code, error


@pytest.mark.parametrize("line", COMMANDS)
async def test_a_command_works_with_exactly_its_documented_rights_and_names_one_that_is_lacking(
    environment: dict[str, str], bus: Bus, db: asyncpg.Connection, no_rights: Acls, kafka: ApacheKafka, line: str
) -> None:
    settings = read_settings()
    names = Topics(settings.topic_prefix)
    campaign_id = await add_campaign(db, REFERENCE)
    for topic in names.read:
        bad = {"topic": topic, "partition": "0", "offset": "0", "reason": "not_json"}
        headers = [(f"dead-letter-{name}", value.encode()) for name, value in bad.items()]
        await bus.publish(names.dead_letters, b"no event", headers=headers)
    rights = documented(COMMANDS[line], names, settings.group)
    acls = no_rights.of(rights)
    await acls.allow(*rights)
    arguments = line.replace("ID", str(campaign_id)).split()
    if "redrive" in arguments:
        arguments.append("--again")  # else the second call finds nothing left to do
    serving: list[RunningService] = []
    if "--wait" in arguments:  # who answers comes by the administrator's door
        kept = {name: value for name, value in environment.items() if not name.startswith("CAMPAIGN_STATS_KAFKA")}
        serving.append(await start_service({**kept, "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap}))
    try:
        code, error = await ends(environment, *arguments)
        assert code == 0, error
        for right in rights:
            await acls.forbid(right)
            code, error = await ends(environment, *arguments)
            assert code in (1, 2), error
            assert re.search(rf"the user may not \w+ (any topic|.*{re.escape(right.name)})", error), error
            await acls.allow(right)
    finally:
        await end_services(serving)


DATABASE_RIGHTS = [
    "SELECT (signature) ON public.campaigns",
    "UPDATE (pause_reason) ON public.campaigns",
    "SELECT (contacted_at) ON public.campaign_prospects",
    "SELECT (email_address) ON public.accounts",
    "SELECT (account_id) ON public.campaign_sender_accounts",
    "UPDATE ON campaign_stats.outbox_shards",
    "SELECT ON campaign_stats.guard_limits",
    "USAGE ON SCHEMA campaign_stats",
]


@pytest.mark.parametrize("right", DATABASE_RIGHTS)
async def test_without_a_right_in_the_database_run_names_it(
    environment: dict[str, str], db: asyncpg.Connection, acls: Acls, right: str
) -> None:
    """One of every kind; tests/service/test_doctor.py takes each single one away, and asks what `run` asks."""
    await db.execute(f"REVOKE {right} FROM {ROLE}")
    code, out, error = await command(environment, "run")
    assert code == 2, out + error
    [sentence] = error.splitlines()
    assert sentence.endswith(f": GRANT {right} TO {ROLE}")
