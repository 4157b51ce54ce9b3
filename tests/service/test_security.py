"""Security settings reach the clients: TLS and logins of Kafka, TLS of PostgreSQL; wrong ones get a sentence.

One broker with a listener for each kind, certificates made here. No secret may show anywhere, at the level DEBUG too.
"""

import asyncio
import base64
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote
from urllib.request import Request, urlopen
from uuid import uuid4

import aiohttp
import asyncpg
import pytest
from aiohttp import web

from consumer import broker, migrations
from consumer.demo.servers import Postgres, free_port
from tests.conftest import NO_FSYNC, Bus, RunningService, StartService, command, eventually
from tests.secured import LOGIN, Files, certificates, postgres_with_tls, with_store
from tests.servers import ApacheKafka
from tests.world import REFERENCE, USER, add_campaign, hint, sync_request

pytestmark = pytest.mark.apache_kafka

KAFKA_PASSWORD = "hunter2-kafka"
DATABASE_PASSWORD = "hunter2-database"
CLIENT_SECRET = "hunter2-client"
API_TOKEN = "hunter2-api-token"
API_DIGEST = hashlib.sha256(API_TOKEN.encode()).hexdigest()
SECRETS = (KAFKA_PASSWORD, DATABASE_PASSWORD, CLIENT_SECRET, API_TOKEN, API_DIGEST)
QUIET = ("debug", "info")

LISTENERS = {"SCRAM": "SASL_SSL", "CERTIFIED": "SSL", "TOKENS": "SASL_SSL"}
UNSECURED = f"{LOGIN}.oauthbearer.internals.unsecured.OAuthBearerUnsecuredValidatorCallbackHandler"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Certificates of the servers and of clients."""
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def kafka(servers_directory: Path, files: Files) -> Iterator[ApacheKafka]:
    """One broker: the plain listener for the independent client, and the secured ones for ours."""
    scram = f"{LOGIN}.scram.ScramLoginModule required;"
    properties = {
        **with_store(files),
        "listener.name.certified.ssl.client.auth": "required",
        "listener.name.scram.sasl.enabled.mechanisms": "SCRAM-SHA-512,SCRAM-SHA-256,PLAIN",
        "listener.name.scram.scram-sha-512.sasl.jaas.config": scram,
        "listener.name.scram.scram-sha-256.sasl.jaas.config": scram,
        "listener.name.scram.plain.sasl.jaas.config": (
            f'{LOGIN}.plain.PlainLoginModule required user_service="{KAFKA_PASSWORD}";'
        ),
        "listener.name.tokens.sasl.enabled.mechanisms": "OAUTHBEARER",
        "listener.name.tokens.oauthbearer.sasl.jaas.config": (
            f'{LOGIN}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
        ),
        "listener.name.tokens.oauthbearer.sasl.server.callback.handler.class": UNSECURED,
    }
    server = ApacheKafka(
        servers_directory / "secured-kafka", properties, secured=LISTENERS, users={"service": KAFKA_PASSWORD}
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    """At the level DEBUG and with an open API door, so that everything that might show a secret is at work."""
    environment.update(
        CAMPAIGN_STATS_LOG_LEVEL="DEBUG",
        CAMPAIGN_STATS_API_PORT="0",
        CAMPAIGN_STATS_API_TOKENS=json.dumps({API_DIGEST: str(USER)}),
    )
    return environment


def prefixed(settings: Mapping[str, object]) -> dict[str, str]:
    return {f"CAMPAIGN_STATS_{name}": str(value) for name, value in settings.items()}


def scram(kafka: ApacheKafka, files: Files, mechanism: str = "SCRAM-SHA-512", **changes: object) -> dict[str, str]:
    """The environment of a client that logs in by password; keywords override settings."""
    settings = {
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": mechanism,
        "KAFKA_SASL_USERNAME": "service",
        "KAFKA_SASL_PASSWORD": KAFKA_PASSWORD,
        "KAFKA_SSL_CAFILE": files.ca,
        **changes,
    }
    return {"KAFKA_BOOTSTRAP_SERVERS": f"localhost:{kafka.ports['SCRAM']}", **prefixed(settings)}


def certified(kafka: ApacheKafka, files: Files, **changes: object) -> dict[str, str]:
    """The environment of a client that shows a certificate; keywords override settings."""
    settings = {
        "KAFKA_SECURITY_PROTOCOL": "SSL",
        "KAFKA_SSL_CAFILE": files.ca,
        "KAFKA_SSL_CERTFILE": files.certificate,
        "KAFKA_SSL_KEYFILE": files.key,
        **changes,
    }
    return {"KAFKA_BOOTSTRAP_SERVERS": f"localhost:{kafka.ports['CERTIFIED']}", **prefixed(settings)}


def assert_no_secret(*texts: str) -> None:
    assert not [secret for secret in SECRETS for text in texts if secret in text]


async def call(running: RunningService, campaign_id: object) -> dict[str, Any]:
    """A call at the API door with the token; the answer."""

    def post() -> Any:
        request = Request(
            f"http://127.0.0.1:{running.api_port}/api/campaigns/{campaign_id}/sync-stats",
            method="POST",
            headers={"Authorization": f"Bearer {API_TOKEN}"},
        )
        with urlopen(request, timeout=10) as response:
            return json.load(response)

    answer: dict[str, Any] = await asyncio.to_thread(post)
    return answer


async def assert_serves(service: StartService, bus: Bus, db: asyncpg.Connection) -> RunningService:
    """A hint goes in and its stats come out; neither logs nor doors show a secret."""
    campaign_id = await add_campaign(db, REFERENCE)
    running = await service()
    await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))

    stats_updated = bus.topics.prefix + "campaign.stats-updated"
    [event] = await eventually(lambda: bus.events(stats_updated), "the hint is served", running)
    assert event["subject"] == str(campaign_id)
    assert event["data"]["campaign"]["stats"] == {"total": 120, "sent": 34, "replied": 4, "bounced": 1}
    assert (await call(running, campaign_id))["campaign"]["id"] == str(campaign_id)
    chatter = [line for line in running.logs if line["logger"].startswith("aiokafka") and line["level"] in QUIET]
    assert not chatter, "its lines of these levels hold whole requests, those of the login too"
    assert_no_secret("\n".join(running.raw), *[(await running.get(path))[1] for path in ("/metrics", "/readyz", "/")])
    return running


async def assert_refused(environment: dict[str, str], *arguments: str, about: str) -> None:
    """Exit 2 and one sentence for people, beside what is logged."""
    code, out, error = await command(environment, *arguments)
    assert code == 2, out + error
    [sentence] = [line for line in error.splitlines() if line.startswith("campaign-stats: ")]
    assert about in sentence
    assert "Traceback" not in out + error, (out + error)[-4000:]
    assert_no_secret(out, error)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"])
async def test_the_service_logs_in_by_password_over_tls(
    service: StartService, bus: Bus, db: asyncpg.Connection, environment: dict[str, str], kafka: ApacheKafka,
    files: Files, mechanism: str,
) -> None:  # fmt: skip
    environment.update(scram(kafka, files, mechanism))
    running = await assert_serves(service, bus, db)
    assert running.messages("started")


async def test_the_service_shows_its_certificate(
    service: StartService, bus: Bus, db: asyncpg.Connection, environment: dict[str, str], kafka: ApacheKafka,
    files: Files,
) -> None:  # fmt: skip
    environment.update(certified(kafka, files))
    await assert_serves(service, bus, db)


async def test_commands_use_the_same_settings(
    environment: dict[str, str], kafka: ApacheKafka, files: Files, bus: Bus
) -> None:
    for client in (scram(kafka, files), certified(kafka, files)):
        code, out, error = await command({**environment, **client}, "topics")
        assert (code, out.count("present")) == (0, 6)
        assert_no_secret(out, error)
        code, out, error = await command({**environment, **client}, "sync", str(uuid4()))
        assert code == 0
        assert_no_secret(out, error)
    assert len(await bus.events(bus.topics.prefix + "campaign.sync-requested")) == 2


WRONG = {
    "password": ("scram", {"KAFKA_SASL_PASSWORD": KAFKA_PASSWORD + "-old"}, "refuses the login"),
    "password, PLAIN": (
        "scram", {"KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_PASSWORD": KAFKA_PASSWORD + "-old"}, "refuses the login"
    ),
    "user": ("scram", {"KAFKA_SASL_USERNAME": "nobody"}, "refuses the login"),
    "kind of login": ("tokens", {}, "does not offer this kind of login"),
    "login where there is none": (
        "certified",
        {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USERNAME": "service",
         "KAFKA_SASL_PASSWORD": KAFKA_PASSWORD},
        "does not offer this kind of login",
    ),
    "authority": ("scram", {"KAFKA_SSL_CAFILE": "other_ca"}, "certificate of localhost:"),
    "no authority": ("scram", {"KAFKA_SSL_CAFILE": ""}, "certificate of localhost:"),
    "host name": ("address", {}, "IP address mismatch"),
    "no certificate": ("certified", {"KAFKA_SSL_CERTFILE": "", "KAFKA_SSL_KEYFILE": ""}, "refuses our side of TLS"),
    "foreign certificate": (
        "certified", {"KAFKA_SSL_CERTFILE": "foreign_certificate", "KAFKA_SSL_KEYFILE": "foreign_key"},
        "refuses our side of TLS",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
async def test_what_the_brokers_refuse_ends_with_a_sentence(
    environment: dict[str, str], kafka: ApacheKafka, files: Files, wrong: str
) -> None:
    kind, changes, about = WRONG[wrong]
    settings = {name: getattr(files, value, value) for name, value in changes.items()}
    client = {**environment, **(certified if kind == "certified" else scram)(kafka, files, **settings)}
    if kind == "address":
        client["KAFKA_BOOTSTRAP_SERVERS"] = f"127.0.0.1:{kafka.ports['SCRAM']}"
    if kind == "tokens":
        client["KAFKA_BOOTSTRAP_SERVERS"] = f"localhost:{kafka.ports['TOKENS']}"
    for arguments in (["run"], ["topics"]):
        await assert_refused(client, *arguments, about=about)


async def test_every_command_says_that_the_login_is_refused(
    environment: dict[str, str], kafka: ApacheKafka, files: Files
) -> None:
    client = {**environment, **scram(kafka, files, KAFKA_SASL_PASSWORD=KAFKA_PASSWORD + "-old")}
    for arguments in (["topics", "--create"], ["sync", str(uuid4())], ["sync", str(uuid4()), "--wait"], ["tail"]):
        await assert_refused(client, *arguments, about="refuses the login")


async def test_a_refused_login_is_listed_beside_what_the_database_lacks(
    environment: dict[str, str], kafka: ApacheKafka, files: Files, db: asyncpg.Connection
) -> None:
    await db.execute("DROP TABLE campaign_sender_accounts")
    client = {**environment, **scram(kafka, files, KAFKA_SASL_PASSWORD="wrong")}
    code, _, error = await command(client, "run")
    assert code == 2
    assert "campaign_sender_accounts" in error
    assert "refuses the login" in error


async def test_one_broker_that_takes_us_is_enough(
    environment: dict[str, str], kafka: ApacheKafka, files: Files
) -> None:
    client = {**environment, **scram(kafka, files)}
    for others in (f"127.0.0.1:{kafka.ports['SCRAM']}", f"localhost:{free_port()}"):
        client["KAFKA_BOOTSTRAP_SERVERS"] = f"{others},localhost:{kafka.ports['SCRAM']}"
        assert (await command(client, "topics"))[0] == 0


async def test_brokers_that_do_not_answer_are_waited_for(
    service: StartService, environment: dict[str, str], kafka: ApacheKafka, files: Files
) -> None:
    environment.update(scram(kafka, files), KAFKA_BOOTSTRAP_SERVERS=f"localhost:{free_port()}")
    code, _, error = await command(environment, "topics")
    assert code == 1
    assert [line for line in error.splitlines() if not line.startswith("{")] == [
        "campaign-stats: kafka: KafkaConnectionError while starting a producer"
    ]
    running = await service(ready=False)
    await eventually(lambda: running.messages("dependency lost"), "it waits", running)
    assert (await running.get("/livez"))[0] == 200
    assert (await running.get("/readyz"))[0] == 503
    assert_no_secret(error, "\n".join(running.raw))


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"KAFKA_SSL_CAFILE": "/no/such.pem"}, "KAFKA_SSL_CAFILE names no file that can be read"),
        ({"KAFKA_SSL_CAFILE": "/etc/passwd"}, "KAFKA_SSL_CAFILE holds no certificates"),
        ({"KAFKA_SSL_CERTFILE": "/no/such.pem"}, "KAFKA_SSL_CERTFILE names no file that can be read"),
        ({"KAFKA_SSL_KEYFILE": "encrypted_key"}, "no pair of certificate and unencrypted key"),
        ({"KAFKA_SSL_KEYFILE": "foreign_key"}, "no pair of certificate and unencrypted key"),
    ],
)
async def test_files_that_cannot_be_used_are_wrong_settings(
    environment: dict[str, str], kafka: ApacheKafka, files: Files, changes: dict[str, str], about: str
) -> None:
    settings = {name: getattr(files, value, value) for name, value in changes.items()}
    client = {**environment, **certified(kafka, files, **settings)}
    for arguments in (["run"], ["topics"]):
        await assert_refused(client, *arguments, about=about)


@dataclass
class TokenServer:
    """An OAuth 2 token endpoint for one client; `asked` are the forms it was sent. `status` makes it fail."""

    port: int
    asked: list[dict[str, list[str]]] = field(default_factory=list)
    status: int = 200
    lifetime_s: int = 3600

    @property
    def url(self) -> str:
        """For KAFKA_SASL_TOKEN_URL."""
        return f"http://localhost:{self.port}/token"

    async def answer(self, request: web.Request) -> web.Response:
        """A token without a signature, as the broker's own handler for trials takes it."""
        form = parse_qs(await request.text())
        self.asked.append(form)
        login = base64.b64encode(f"service:{quote(CLIENT_SECRET)}".encode()).decode()
        if request.headers.get("Authorization") != f"Basic {login}":
            return web.json_response({"error": "invalid_client"}, status=401)
        if self.status != 200:
            return web.Response(status=self.status, text="not now")
        now = time.time()
        parts = [{"alg": "none"}, {"sub": "service", "iat": now, "exp": now + self.lifetime_s, "scope": form["scope"]}]
        token = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
        return web.json_response({"access_token": token + ".", "token_type": "Bearer", "expires_in": self.lifetime_s})


@pytest.fixture
async def token_server() -> AsyncIterator[TokenServer]:
    """On loopback."""
    server = TokenServer(free_port())
    application = web.Application()
    application.router.add_post("/token", server.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", server.port).start()
    yield server
    await runner.cleanup()


def tokens(kafka: ApacheKafka, files: Files, server: TokenServer, **changes: object) -> dict[str, str]:
    """The environment of a client that logs in by a token; keywords override settings."""
    settings = {
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": "OAUTHBEARER",
        "KAFKA_SASL_USERNAME": "service",
        "KAFKA_SASL_PASSWORD": CLIENT_SECRET,
        "KAFKA_SASL_TOKEN_URL": server.url,
        "KAFKA_SASL_SCOPE": "campaign-stats",
        "KAFKA_SSL_CAFILE": files.ca,
        **changes,
    }
    return {"KAFKA_BOOTSTRAP_SERVERS": f"localhost:{kafka.ports['TOKENS']}", **prefixed(settings)}


async def test_the_service_logs_in_by_a_token_which_it_keeps(
    service: StartService, bus: Bus, db: asyncpg.Connection, environment: dict[str, str], kafka: ApacheKafka,
    files: Files, token_server: TokenServer,
) -> None:  # fmt: skip
    environment.update(tokens(kafka, files, token_server))
    running = await assert_serves(service, bus, db)
    assert token_server.asked == [{"grant_type": ["client_credentials"], "scope": ["campaign-stats"]}]
    assert "eyJ" not in "\n".join(running.raw)  # how every token begins


async def test_a_token_that_soon_expires_is_not_kept(
    environment: dict[str, str], kafka: ApacheKafka, files: Files, token_server: TokenServer
) -> None:
    token_server.lifetime_s = 20
    assert (await command({**environment, **tokens(kafka, files, token_server)}, "topics"))[0] == 0
    assert len(token_server.asked) > 1


async def test_a_client_the_token_endpoint_refuses_ends_with_a_sentence(
    environment: dict[str, str], kafka: ApacheKafka, files: Files, token_server: TokenServer
) -> None:
    client = {**environment, **tokens(kafka, files, token_server, KAFKA_SASL_PASSWORD="wrong")}
    for arguments in (["run"], ["topics"]):
        await assert_refused(client, *arguments, about="the token endpoint refuses the client (401)")


async def test_a_token_endpoint_that_fails_is_waited_for(
    service: StartService, environment: dict[str, str], kafka: ApacheKafka, files: Files, token_server: TokenServer
) -> None:
    token_server.status = 503
    environment.update(tokens(kafka, files, token_server))
    code, _, error = await command(environment, "topics")
    assert code == 1
    assert "Traceback" not in error
    running = await service(ready=False)
    await eventually(lambda: running.messages("dependency lost"), "it waits", running)
    token_server.status = 200
    await eventually(lambda: running.messages("started"), "it goes on when there are tokens again", running)
    assert_no_secret(error, "\n".join(running.raw))


@pytest.fixture(scope="module")
def tls_postgres(servers_directory: Path, files: Files) -> Iterator[Postgres]:
    """By TCP only encrypted: the role `service` by password, `certified` by certificate."""

    async def make_roles(server: Postgres) -> None:
        connection = await asyncpg.connect(host=str(server.directory), port=server.port, user="postgres")
        await connection.execute(f"CREATE ROLE service SUPERUSER LOGIN PASSWORD '{DATABASE_PASSWORD}'")
        await connection.execute("CREATE ROLE certified SUPERUSER LOGIN")
        await connection.close()

    with postgres_with_tls(servers_directory / "pgtls", files) as server:
        asyncio.run(make_roles(server))
        yield server


RIGHT = f"service:{DATABASE_PASSWORD}"


@dataclass(frozen=True)
class TlsDatabase:
    """A fresh, migrated database behind TLS."""

    name: str
    port: int

    def url(self, login: str = RIGHT, host: str = "localhost", **options: object) -> str:
        """For DATABASE_URL; options as in libpq."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://{login}@{host}:{self.port}/{self.name}?{query}"


@pytest.fixture
async def tls_database(tls_postgres: Postgres) -> TlsDatabase:
    """A fresh, migrated database behind TLS; it goes with its server."""
    name = f"t{uuid4().hex[:12]}"
    connection = await asyncpg.connect(host=str(tls_postgres.directory), port=tls_postgres.port, user="postgres")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    await migrations.migrate(
        f"postgresql://postgres@/{name}?host={tls_postgres.directory}&port={tls_postgres.port}", reference_schema=True
    )
    return TlsDatabase(name, tls_postgres.port)


async def connected(url: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    return connection


@pytest.mark.parametrize("login", ["password", "certificate"])
@pytest.mark.machine_postgres
async def test_the_service_checks_the_certificate_of_postgresql(
    service: StartService, bus: Bus, environment: dict[str, str], kafka: ApacheKafka, files: Files,
    tls_database: TlsDatabase, login: str,
) -> None:  # fmt: skip
    os.chmod(files.key, 0o600)
    url = tls_database.url(sslmode="verify-full", sslrootcert=files.ca)
    if login == "certificate":
        url = tls_database.url(
            "certified", sslmode="verify-full", sslrootcert=files.ca, sslcert=files.certificate, sslkey=files.key
        )
    environment.update(scram(kafka, files), DATABASE_URL=url)
    db = await connected(url)
    try:
        await assert_serves(service, bus, db)
        unencrypted = await db.fetchval(
            "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
            " WHERE datname = current_database() AND NOT ssl"
        )
        assert unencrypted == 0
    finally:
        await db.close()


@pytest.mark.parametrize(
    ("login", "host", "options", "about"),
    [
        (RIGHT, "localhost", {"sslmode": "verify-full", "sslrootcert": "other_ca"}, "TLS fails"),
        (RIGHT, "127.0.0.1", {"sslmode": "verify-full", "sslrootcert": "ca"}, "TLS fails"),
        (RIGHT + "-old", "localhost", {"sslmode": "verify-full", "sslrootcert": "ca"}, "refuses it"),
        (RIGHT, "localhost", {"sslmode": "disable"}, "refuses it"),
        ("certified", "localhost", {"sslmode": "verify-full", "sslrootcert": "ca"}, "refuses it"),
    ],
    ids=["authority", "host name", "password", "not encrypted", "no certificate"],
)  # fmt: skip
@pytest.mark.machine_postgres
async def test_a_database_that_refuses_us_or_is_not_to_be_trusted_ends_with_a_sentence(
    environment: dict[str, str], files: Files, tls_database: TlsDatabase, login: str, host: str,
    options: dict[str, str], about: str,
) -> None:  # fmt: skip
    chosen = {name: getattr(files, value, value) for name, value in options.items()}
    wrong = {**environment, "DATABASE_URL": tls_database.url(login, host, **chosen)}
    for arguments in (["run"], ["migrate"], ["drift"]):
        await assert_refused(wrong, *arguments, about=about)


async def test_a_database_without_tls_is_refused_where_tls_is_asked_for(
    environment: dict[str, str], servers_directory: Path
) -> None:
    server = Postgres(servers_directory / "pgplain", options=NO_FSYNC, tcp=True)
    try:
        server.start()
        wrong = {**environment, "DATABASE_URL": f"{server.url()}?sslmode=require"}
        for arguments in (["run"], ["migrate"], ["drift"]):
            await assert_refused(wrong, *arguments, about="DATABASE_URL: the server has no TLS")
    finally:
        server.stop()


PLANTED = ("planted.prospect@example.org", "Plantina", "https://example.org/planted-profile", "planted-custom-field")
ADDRESS, NAME, PROFILE, FIELD = PLANTED
WRONG_TOKEN = "hunter2-wrong-token"
ROW_IN_DETAIL = f"""
CREATE FUNCTION quote_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'row of {NAME} violates a check',
        DETAIL = 'Failing row contains ({ADDRESS}, {PROFILE}).', HINT = 'look at {FIELD}'; END $$"""
BAD_RECORDS: list[bytes] = [
    f"{ADDRESS} is no JSON".encode(),
    f"{ADDRESS} \xff".encode("latin-1"),
    json.dumps({"email": ADDRESS, "name": NAME}).encode(),
    json.dumps({**hint(uuid4()), "type": ADDRESS}).encode(),
    json.dumps(hint(ADDRESS)).encode(),
    json.dumps(hint(uuid4(), data={"prospect_id": ADDRESS, "to_status": {NAME: FIELD}})).encode(),
    json.dumps({**hint(uuid4()), "source": [ADDRESS], NAME: PROFILE}).encode(),
    json.dumps(sync_request(uuid4(), data={"user_id": ADDRESS})).encode(),
    json.dumps({**sync_request(uuid4()), "data": f"{ADDRESS} {NAME}"}).encode(),
]


def assert_nothing_planted(texts: Mapping[str, str]) -> None:
    """Names the text, and what shows in it: neither secrets nor what was planted into rows and records may."""
    shown = [
        (where, secret)
        for where, text in texts.items()
        for secret in (*SECRETS, *PLANTED, WRONG_TOKEN)
        if secret in text
    ]
    assert not shown


@pytest.mark.machine_postgres
async def test_nothing_planted_shows_in_a_whole_run_with_every_kind_of_failure(
    service: StartService, bus: Bus, environment: dict[str, str], kafka: ApacheKafka, files: Files,
    tls_database: TlsDatabase,
) -> None:  # fmt: skip
    url = tls_database.url(sslmode="verify-full", sslrootcert=files.ca)
    environment.update(scram(kafka, files), DATABASE_URL=url)
    db = await connected(url)
    good = await add_campaign(db, REFERENCE)
    poisoned, bouncing = await add_campaign(db, {"sent": 3}), await add_campaign(db, {"sent": 95, "bounced": 5})
    await db.execute(
        "UPDATE campaign_prospects SET email = $1, first_name = $2, name = $2, linkedin_url = $3, custom_fields = $4",
        ADDRESS, NAME, PROFILE, {"field": FIELD},
    )  # fmt: skip
    await db.execute(ROW_IN_DETAIL)
    await db.execute(
        f"CREATE TRIGGER quote BEFORE UPDATE ON campaigns FOR EACH ROW WHEN (OLD.id = '{poisoned}')"
        " EXECUTE FUNCTION quote_row()"
    )
    with pytest.raises(asyncpg.CheckViolationError) as quoting:  # what the service meets
        await db.execute("UPDATE campaigns SET name = name WHERE id = $1", poisoned)
    assert [planted for planted in PLANTED if planted in str(quoting.value)] == list(PLANTED)

    names, link = bus.topics, broker.Connection(bus.bootstrap, {})
    paused, rejected = names.of("campaign.paused.v1"), names.of("campaign.sync_rejected.v1")
    await broker.delete_topics(link, [paused])

    async def tiny() -> bool:  # deleting takes a moment
        settings = {paused: {"max.message.bytes": "100"}}
        return bool(await broker.create_topics(link, settings, partitions=1, replication=1))

    await eventually(tiny, "a topic that no pause fits into")
    running = await service(sweep_interval_s=0.5)
    await broker.delete_topics(link, [rejected])
    texts: dict[str, str] = {}

    hints, requests = names.read
    header = [("x-prospect", ADDRESS.encode())]
    for record in BAD_RECORDS:
        await bus.publish(hints, record, headers=header)
    for campaign_id in (good, poisoned, bouncing):
        await bus.publish(hints, hint(campaign_id, data={"email": ADDRESS, "name": NAME}), headers=header)
    await bus.publish(requests, sync_request(uuid4(), data={"reason": FIELD}), headers=header)

    async def all_happened() -> bool:
        kept = await bus.read(names.dead_letters)
        aside = await db.fetchval("SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NOT NULL")
        failing = await db.fetchval("SELECT count(*) FROM campaign_stats.campaign_state WHERE failures > 0")
        return (len(kept), aside, failing) == (len(BAD_RECORDS), 1, 1) and "relay" in (await running.get("/readyz"))[1]

    await eventually(all_happened, "every kind of failure came", running)
    kept = await bus.read(names.dead_letters)
    assert any(ADDRESS.encode() in record.value for record in kept), "whole, as they came"
    added = [dict(record.headers) for record in kept]
    texts["dead letters"] = str([{k: v for k, v in one.items() if k.startswith("dead-letter-")} for one in added])
    assert {one["dead-letter-reason"].decode() for one in added} == {
        "not_json", "not_utf8", "not_cloudevent", "unknown_type", "invalid_campaign_id", "invalid_data",
    }  # fmt: skip

    async with aiohttp.ClientSession() as session:
        for path, token in (
            (good, API_TOKEN), (poisoned, API_TOKEN), (good, WRONG_TOKEN), (ADDRESS, API_TOKEN), (uuid4(), API_TOKEN),
        ):  # fmt: skip
            where = f"http://127.0.0.1:{running.api_port}/api/campaigns/{path}/sync-stats?email={ADDRESS}"
            login = {"Authorization": f"Bearer {token}", "X-Prospect": ADDRESS}
            async with session.post(where, headers=login, data=NAME) as response:
                texts[f"API {response.status}"] = f"{await response.text()} {dict(response.headers)}"
        async with session.get(f"http://127.0.0.1:{running.api_port}/{ADDRESS}") as response:
            texts["API, no path"] = await response.text()
    assert texts.keys() > {"API 200", "API 503", "API 401", "API 400", "API 404"}
    for path in ("/metrics", "/livez", "/readyz", "/", f"/{ADDRESS}"):
        texts[path] = (await running.get(path))[1]
    for arguments in (
        "doctor", "drift", "deferred list", "outbox list", "dead-letters list", "dead-letters list --json",
        f"why {good}", "deferred retry --all", "topics",
    ):  # fmt: skip
        _, out, error = await command(environment, *arguments.split())
        texts[arguments] = out + error
    for table in migrations.OWN_RIGHTS:
        rows = await db.fetchval(f"SELECT string_agg(t::text, ' ') FROM campaign_stats.{table} AS t")
        texts[f"table {table}"] = rows or ""
    texts["bus"] = str([await bus.read(topic) for topic in names.written if topic != rejected])

    await db.execute(
        "CREATE TRIGGER quote BEFORE DELETE ON campaign_stats.outbox FOR EACH ROW EXECUTE FUNCTION quote_row()"
    )
    running.expected_exit = 1
    await bus.publish(hints, hint(await add_campaign(db, {"sent": 1})))
    assert await running.wait() == 1, "an error where none may be is a bug, and ends the process"
    [crash] = running.messages("crashed")
    assert crash["error"] == "CheckViolationError"
    assert "relay.py" in crash["stack"]
    assert "(23514)" in crash["stack"]
    texts["logs"] = "\n".join(running.raw)
    assert '"level": "debug"' in texts["logs"], "DEBUG was on"

    for name, wrong in (
        ("Kafka", {"CAMPAIGN_STATS_KAFKA_SASL_PASSWORD": WRONG_TOKEN}),
        ("database", {"DATABASE_URL": url.replace(DATABASE_PASSWORD, WRONG_TOKEN)}),
        ("tokens", {"CAMPAIGN_STATS_API_TOKENS": json.dumps({API_TOKEN: ADDRESS})}),
    ):
        for arguments in ("run", "doctor"):
            code, out, error = await command({**environment, **wrong}, arguments)
            assert code == 2, out + error
            texts[f"{arguments}, refused by {name}"] = out + error
    await db.execute("ALTER TABLE campaign_stats.deferred RENAME TO gone")
    await db.execute(
        "CREATE FUNCTION quote_query() RETURNS SETOF campaign_stats.gone LANGUAGE plpgsql AS $$ BEGIN"
        f" RAISE EXCEPTION USING ERRCODE = 'data_exception', MESSAGE = 'row of {NAME}', DETAIL = '{ADDRESS}'; END $$"
    )
    await db.execute("CREATE VIEW campaign_stats.deferred AS SELECT * FROM quote_query()")
    code, out, error = await command(environment, "deferred", "list")
    assert (code, "DataError (22000)" in error) == (1, True), out + error
    texts["a command that fails"] = out + error
    await db.close()
    assert_nothing_planted(texts)
