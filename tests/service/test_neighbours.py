"""The examples for neighbours as processes: a publisher is heard, a subscriber reacts once whatever happens between."""

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg
import jsonschema_rs
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.group import LeaveGroupRequest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event, from_structured_event
from cloudevents.core.formats.json import JSONFormat

from consumer.demo.servers import EmbeddedBroker, free_port
from schemas import events
from schemas.topics import TOPIC_OF, Topics
from tests.conftest import Bus, Kafka, StartService, eventually
from tests.faults.edits import Edit
from tests.faults.proxy import Proxy
from tests.servers import REPOSITORY, kafka_jars
from tests.world import add_campaign, add_prospects, hint

SEED: Final = int(os.environ["CAMPAIGN_STATS_FAULT_SEED"])  # tests/conftest.py sets it if nobody did
SCHEMAS: Final = REPOSITORY / "schemas"
EXAMPLES: Final = SCHEMAS / "examples"
HINTS: Final = TOPIC_OF[events.STATUS_CHANGED]
JAVA_NEEDS: Final = ("kafka-clients", "jackson-annotations", "jackson-core", "jackson-databind", "slf4j-api")
KILLED: Final = -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Language:
    """How examples are started in one language. `ended_by_sigterm`: the exit code after it."""

    name: str
    before: tuple[str, ...]
    ended_by_sigterm: int

    def command(self, example: str, *arguments: str) -> list[str]:
        """Of `publisher` or `subscriber`."""
        if self.name == "python":
            return [*self.before, f"schemas.examples.{example}", *arguments]
        return [*self.before, example.capitalize(), *arguments]


PYTHON: Final = Language("python", (sys.executable, "-m"), 0)


@pytest.fixture(scope="session")
def java(tmp_path_factory: pytest.TempPathFactory) -> Language:
    """Compiled once, against no more jars than a neighbour needs."""
    if shutil.which("javac") is None:
        raise RuntimeError("javac is missing: install a JDK (Debian: openjdk-17-jdk-headless)")
    jars = [path for name in JAVA_NEEDS for path in kafka_jars().glob(f"{name}-[0-9]*.jar")]
    assert len(jars) == len(JAVA_NEEDS)
    classes = tmp_path_factory.mktemp("classes")
    class_path = os.pathsep.join(str(path) for path in (classes, *jars))
    sources = sorted((EXAMPLES / "java").glob("*.java"))
    compiled = subprocess.run(
        ["javac", "-proc:none", "-Xlint:all", "-Werror", "-cp", class_path, "-d", classes, *sources],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    fast_to_start = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto", "-Xmx128m")
    return Language("java", ("java", *fast_to_start, "-cp", class_path), 128 + signal.SIGTERM)


@pytest.fixture(params=["python", pytest.param("java", marks=pytest.mark.javac)])
def language(request: pytest.FixtureRequest) -> Language:
    """Each language, one after the other."""
    if request.param == "python":
        return PYTHON
    compiled: Language = request.getfixturevalue("java")
    return compiled


@dataclass
class Neighbour:
    """An example as a process. `printed`: whole lines only, the last one of a killed process may be torn."""

    process: asyncio.subprocess.Process
    printed: list[dict[str, Any]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    readers: list[asyncio.Task[None]] = field(default_factory=list)

    async def ended(self, timeout_s: float = 60) -> int:
        """Its exit code, once all it wrote was read."""
        async with asyncio.timeout(timeout_s):
            code = await self.process.wait()
            await asyncio.gather(*self.readers)
            return code

    async def read(self, stream: asyncio.StreamReader | None, keep: Callable[[str], None]) -> None:
        """Until it ends."""
        assert stream is not None
        async for line in stream:
            if line.endswith(b"\n"):
                keep(line.decode().rstrip())


Start = Callable[..., Awaitable[Neighbour]]


@pytest.fixture
async def start(kafka: Kafka, topics: Topics) -> AsyncIterator[Start]:
    """Starts an example, with lines for its stdin; its environment by keyword. What is left of them is killed."""
    running: list[Neighbour] = []
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CAMPAIGN_STATS_")}
    ours = {
        "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
        "TOPIC_PREFIX": topics.prefix,
        "GROUP_ID": f"{topics.prefix}neighbour",
        "IDEMPOTENCE": "false" if isinstance(kafka, EmbeddedBroker) else "true",
        "PYTHONPATH": str(REPOSITORY),  # for copies that stand elsewhere
    }

    async def start(command: Sequence[str], lines: Sequence[str] = (), **environment: str) -> Neighbour:
        process = await asyncio.create_subprocess_exec(
            *command, env={**inherited, **ours, **environment}, cwd=REPOSITORY,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        one = Neighbour(process)
        running.append(one)
        one.readers = [
            asyncio.create_task(one.read(process.stdout, lambda line: one.printed.append(json.loads(line)))),
            asyncio.create_task(one.read(process.stderr, one.complaints.append)),
        ]
        assert process.stdin is not None
        process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        process.stdin.close()
        return one

    yield start
    for one in running:
        if one.process.returncode is None:
            one.process.kill()
        await one.ended()


def rigged(directory: Path, example: str, *edits: Edit) -> list[str]:
    """The command of a copy of a Python example that is broken on purpose."""
    text = (EXAMPLES / f"{example}.py").read_text()
    for edit in edits:
        text = edit.of(text)
    copy = directory / f"{example}.py"
    copy.write_text(text)
    return [sys.executable, str(copy)]


# Publishers


@pytest.fixture
async def refuse_commits(db: asyncpg.Connection) -> None:
    """Every change of a prospect goes well, until its transaction wants to commit."""
    await db.execute(
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN RAISE EXCEPTION 'no commit today'; END $$;
           CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON campaign_prospects
           DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse();"""
    )


def holds(event_type: str, form: str, document: object) -> bool:
    """Whether a document is as a writer may write it."""
    schema = json.loads((SCHEMAS / "json" / f"{event_type}.{form}.writer.json").read_text())
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True).is_valid(document)


@pytest.mark.parametrize("mode", ["structured", "binary"])
async def test_a_publisher_is_heard(
    language: Language,
    mode: str,
    start: Start,
    service: StartService,
    bus: Bus,
    db: asyncpg.Connection,
    database_url: str,
) -> None:
    campaign_id = await add_campaign(db, {"pending": 2, "sent": 1})
    [prospect] = await add_prospects(db, campaign_id, "pending", 1)
    topic = bus.topics.prefix + HINTS
    await service()
    flags = ["--binary"] if mode == "binary" else []
    if language.name == "python":
        command = language.command("publisher", *flags, "bounced", str(prospect))
        neighbour = await start(command, DATABASE_URL=database_url)
    else:  # it publishes for somebody who has committed
        await db.execute("SELECT update_prospect_with_stat($1, 'bounced')", prospect)
        neighbour = await start(
            language.command("publisher", *flags), [f"{str(campaign_id).upper()} {prospect} bounced"]
        )
    assert await neighbour.ended() == 0, neighbour.complaints

    [record] = await bus.read(topic)
    headers = dict(record.headers)
    message = KafkaMessage(headers=headers, key=record.key, value=record.value)
    if mode == "structured":
        assert headers == {"content-type": b"application/cloudevents+json"}
        event = from_structured_event(message, JSONFormat())
        assert holds(events.STATUS_CHANGED, "event", json.loads(record.value))
        assert json.loads(record.value)["datacontenttype"] == "application/json"
    else:
        names = ("specversion", "id", "source", "type", "time", "subject")
        assert headers.keys() == {"content-type", *(f"ce_{name}" for name in names)}
        assert headers["content-type"] == b"application/json"
        event = from_binary_event(message, JSONFormat())
        assert holds(events.STATUS_CHANGED, "data", json.loads(record.value))
    data = event.get_data()
    assert isinstance(data, dict)
    assert (event.get_type(), event.get_subject()) == (events.STATUS_CHANGED, str(campaign_id))
    assert (data["campaign_id"], data["prospect_id"]) == (str(campaign_id), str(prospect))
    assert data["to_status"] == "bounced"

    [told] = await eventually(partial(bus.events, bus.topics.prefix + TOPIC_OF[events.STATS_UPDATED]))
    assert told["causationid"] == event.get_id()
    assert told["data"]["campaign"]["stats"] == {"total": 4, "sent": 1, "replied": 0, "bounced": 1}
    assert record.key == str(campaign_id).encode()
    same_key = await bus.publish(topic, hint(campaign_id), key=str(campaign_id))
    assert record.partition == same_key.partition  # wherever a hint comes from, its campaign has one partition


async def test_a_hint_waits_for_the_commit(start: Start, bus: Bus, db: asyncpg.Connection, database_url: str) -> None:
    campaign_id = await add_campaign(db, {"pending": 1})
    prospect = await db.fetchval("SELECT id FROM campaign_prospects")
    product = await asyncpg.connect(database_url)
    held = product.transaction()
    await held.start()
    await product.execute("SELECT 1 FROM campaigns WHERE id = $1 FOR UPDATE", campaign_id)
    neighbour = await start(PYTHON.command("publisher", "sent", str(prospect)), DATABASE_URL=database_url)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    await eventually(lambda: db.fetchval(waiting), "its transaction waits for the row")
    assert await bus.read(bus.topics.prefix + HINTS) == []
    await held.rollback()
    await product.close()
    assert await neighbour.ended() == 0, neighbour.complaints
    [event] = await bus.events(bus.topics.prefix + HINTS)
    assert (event["data"]["from_status"], event["data"]["to_status"]) == ("pending", "sent")
    assert await db.fetchval("SELECT status FROM campaign_prospects") == "sent"


CHANGED: Final = "            event = await change("
PUBLISHED: Final = "            producer = await publish("
TOLD_TOO_EARLY: Final = (  # all of it inside a transaction of its own, that of `change` becomes a savepoint
    Edit("publisher.py", CHANGED, f"            async with db.transaction():\n    {CHANGED}"),
    Edit("publisher.py", PUBLISHED, f"    {PUBLISHED}"),
)


@pytest.mark.parametrize("is_broken", [False, True], ids=["as it is", "published inside the transaction"])
async def test_a_refused_commit_publishes_nothing(
    is_broken: bool,
    start: Start,
    bus: Bus,
    db: asyncpg.Connection,
    database_url: str,
    refuse_commits: None,
    tmp_path: Path,
) -> None:
    await add_campaign(db, {"pending": 1})
    prospect = await db.fetchval("SELECT id FROM campaign_prospects")
    command = rigged(tmp_path, "publisher", *TOLD_TOO_EARLY) if is_broken else PYTHON.command("publisher")
    neighbour = await start(command, [f"{prospect} sent"], DATABASE_URL=database_url)
    assert await neighbour.ended() == 1
    assert any("no commit today" in line for line in neighbour.complaints)
    assert await db.fetchval("SELECT status FROM campaign_prospects") == "pending"
    assert len(await bus.read(bus.topics.prefix + HINTS)) == is_broken  # told, but it never happened


async def test_an_unknown_prospect_publishes_nothing(
    start: Start, bus: Bus, db: asyncpg.Connection, database_url: str
) -> None:
    await add_campaign(db, {"pending": 1})
    prospect, nobody = await db.fetchval("SELECT id FROM campaign_prospects"), uuid4()
    lines = [f"{prospect} sent", f"{nobody} sent", f"{prospect} bounced"]
    neighbour = await start(PYTHON.command("publisher"), lines, DATABASE_URL=database_url)
    assert await neighbour.ended() == 1
    assert any(f"there is no prospect {nobody}" in line for line in neighbour.complaints)
    [event] = await bus.events(bus.topics.prefix + HINTS)
    assert event["data"]["prospect_id"] == str(prospect)


async def test_a_hint_is_sent_until_it_is_acknowledged(
    start: Start, kafka: Kafka, bus: Bus, db: asyncpg.Connection, database_url: str
) -> None:
    await add_campaign(db, {"pending": 1})
    prospect = await db.fetchval("SELECT id FROM campaign_prospects")
    proxy = Proxy(free_port(), int(kafka.bootstrap.rpartition(":")[2]))  # nobody listens there as yet
    command = PYTHON.command("publisher", "sent", str(prospect))
    neighbour = await start(command, DATABASE_URL=database_url, KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{proxy.port}")

    def refused() -> list[str]:
        return [line.split()[1] for line in neighbour.complaints if "is not acknowledged" in line]

    await eventually(lambda: len(refused()) >= 2, "it tries again")
    assert await db.fetchval("SELECT status FROM campaign_prospects") == "sent"
    proxy.start()
    try:
        assert await neighbour.ended() == 0, neighbour.complaints
    finally:
        proxy.stop()
    [event] = await bus.events(bus.topics.prefix + HINTS)
    assert {event["id"]} == set(refused())  # the same event, however often it was tried


# Subscribers


@dataclass(frozen=True, slots=True)
class Written:
    """One record; `topic` without prefix."""

    topic: str
    key: str
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Part:
    """Records in the order of their writing. `certain`: so many reactions follow from them, whatever came before."""

    records: list[Written]
    certain: int


@dataclass
class Story:
    """What was told, in parts, and what must come of it: every pause once, of every campaign the newest numbers."""

    parts: list[Part] = field(default_factory=list)
    pauses: dict[str, str] = field(default_factory=dict)
    newest: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: int = 0


def example_of(event_type: str, name: str) -> dict[str, Any]:
    """A good example, to be changed."""
    event: dict[str, Any] = json.loads((EXAMPLES / event_type / "good" / f"{name}.json").read_text())
    return event


def paused(campaign_id: str, version: int, reason: str) -> dict[str, Any]:
    """A pause, with a field and an attribute of a later release."""
    event = example_of(events.PAUSED, "six-of-120") | {"id": str(uuid4()), "subject": campaign_id, "region": "eu"}
    event["data"] |= {"campaign_id": campaign_id, "version": version, "reason": reason, "severity": {"of": "ten"}}
    return event


def stats(campaign_id: str, version: int, total: int) -> dict[str, Any]:
    """Numbers, with a trigger, a status and fields of a later release."""
    event = example_of(events.STATS_UPDATED, "news") | {"id": str(uuid4()), "subject": campaign_id}
    event["data"] |= {"version": version, "trigger": "rules_changed", "shard": 3}
    event["data"]["campaign"] |= {"id": campaign_id, "status": "archived", "labels": []}
    event["data"]["campaign"]["stats"] |= {"total": total, "snoozed": 1}
    return event


def unreadable(campaign_id: str) -> Iterator[bytes | None]:
    """Records that are no events of the service."""
    yield from (None, b"", b"{oops", b"\xff\xfe\x00", b"[]", b"7", b"null", b'"paused"', b"[" * 2_000, b"{}")
    good = paused(campaign_id, 1, "bounce_rate")
    for wrong in ({"source": "/somebody"}, {"id": None}, {"type": 7}, {"data": None}, {"data": [good["data"]]}):
        yield json.dumps(good | wrong).encode()
    yield json.dumps(good).encode() + b"{}"
    for version in ("seven", 1.5, 2**80, None):
        yield json.dumps(stats(campaign_id, version, 1)).encode()  # type: ignore[arg-type]  # on purpose


def story(seed: int, parts: int, *, is_messy: bool = True) -> Story:
    """Pauses and numbers of a few campaigns, and between them all that a subscriber must bear.

    Repeats, whole runs again in order and in none, old after new, records and types that nobody can read.
    """
    chance = random.Random(seed)
    told = Story()
    ids = [str(UUID(int=chance.getrandbits(128), version=4)) for _ in range(6)]
    garbage = [one for id in ids for one in chance.sample(list(unreadable(id)), k=20)]
    heard: list[Written] = []
    version = 1_776_857_400_250_000

    for _ in range(parts):
        records: list[Written] = []
        first_pauses, risen = len(told.pauses), set()
        for number in range(40):
            campaign_id = chance.choice(ids)
            version += chance.randint(1, 1_000)
            if number == 0 or chance.random() < 0.2:
                event = paused(campaign_id, version, chance.choice(("bounce_rate", "spam_trap")))
                told.pauses[event["id"]] = campaign_id
            else:
                total = chance.randint(0, 10_000)
                event = stats(campaign_id, version, total)
                told.newest[campaign_id] = version, total
                risen.add(campaign_id)
            new = Written(TOPIC_OF[event["type"]], campaign_id, json.dumps(event).encode())
            heard.append(new)
            records.append(new)
            if is_messy and chance.random() < 0.3:
                records.append(chance.choice((new, chance.choice(heard))))
            if is_messy and chance.random() < 0.2:
                topic = TOPIC_OF[chance.choice((events.PAUSED, events.STATS_UPDATED))]
                records.append(Written(topic, campaign_id, garbage.pop()))
                told.unreadable += 1
            if is_messy and chance.random() < 0.1:
                later = event | {"type": chance.choice(("campaign.resumed.v1", "campaign.paused.v2")), "data": {"a": 1}}
                records.append(Written(new.topic, campaign_id, json.dumps(later).encode()))
        if is_messy:
            begin = max(0, len(heard) - chance.randint(40, 80))  # with the pause that this part began with
            run = heard[begin:]
            records += [*run, *chance.sample(run, k=len(run))]
        told.parts.append(Part(records, len(told.pauses) - first_pauses + len(risen)))
    return told


@dataclass(frozen=True, slots=True)
class Kept:
    """What a subscriber remembers: its reactions in their order, and campaign -> version, total."""

    reactions: list[dict[str, Any]]
    newest: dict[str, tuple[int, int]]


def kept_by(language: Language, directory: Path) -> Kept:
    """Read between two lives of it."""
    if language.name == "java":  # the reactions are all it has, and a torn line is none
        text = (directory / "reactions.jsonl").read_text() if (directory / "reactions.jsonl").exists() else ""
        reactions = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        numbers = [one for one in reactions if one["reaction"] == "stats"]
        return Kept(reactions, {one["campaign_id"]: (one["version"], one["total"]) for one in numbers})
    db = sqlite3.connect(directory / "state.db")
    try:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'reactions'").fetchone():
            return Kept([], {})
        rows = db.execute("SELECT id, version, stats FROM campaigns").fetchall()
        lines = db.execute("SELECT line FROM reactions ORDER BY rowid").fetchall()
    finally:
        db.close()
    newest = {campaign_id: (version, json.loads(text)["total"]) for campaign_id, version, text in rows}
    return Kept([json.loads(line) for (line,) in lines], newest)


def problems(told: Story, kept: Kept) -> list[str]:
    """What is wrong with the reactions as they were kept: each is durable, or it never was."""
    found = []
    pauses = [one for one in kept.reactions if one["reaction"] == "paused"]
    times = Counter(one["id"] for one in pauses)
    found += [f"pause {id}: lost" for id in told.pauses if not times[id]]
    found += [f"pause {id}: {times[id]} reactions" for id in times if times[id] > 1]
    found += [
        f"pause {one['id']}: wrong campaign" for one in pauses if told.pauses.get(one["id"]) != one["campaign_id"]
    ]
    for campaign_id in told.newest:
        versions = [one["version"] for one in kept.reactions if one["campaign_id"] == campaign_id and "version" in one]
        if any(before >= after for before, after in pairwise(versions)):
            found.append(f"campaign {campaign_id}: an old version after a newer one")
    if kept.newest != told.newest:
        found.append(f"newest numbers are {kept.newest}, not {told.newest}")
    return found


class Group:
    """The subscriber's group, seen from outside."""

    def __init__(self, kafka: Kafka, topics: Topics) -> None:
        self.bootstrap = kafka.bootstrap
        self.name = f"{topics.prefix}neighbour"
        self.partitions = [
            TopicPartition(topics.of(kind), number)
            for kind in (events.PAUSED, events.STATS_UPDATED)
            for number in range(3)
        ]

    async def bury(self) -> None:
        """Dead members leave at once: the group would wait for them for 10 s (aiokafka) or 45 s (Java)."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            coordinator = await admin.find_coordinator(self.name)
            [described] = await admin.describe_consumer_groups([self.name], coordinator)
            for member, *_ in (member for one in described.groups for member in one[5]):
                await admin._send_request(LeaveGroupRequest(self.name, member), coordinator)
        finally:
            await admin.close()

    async def rewind(self) -> None:
        """Its offsets are lost, as when an operator resets them. Nobody may be in it."""
        consumer = await self._outside()
        try:
            await consumer.commit(dict.fromkeys(self.partitions, 0))
        finally:
            await consumer.stop()

    async def has_heard_all(self) -> None:
        """Wait until everything is committed that is in its topics now."""
        consumer = await self._outside()
        try:
            ends = await consumer.end_offsets(self.partitions)

            async def is_at_the_end() -> bool:
                return all([(await consumer.committed(one) or 0) >= ends[one] for one in self.partitions])

            await eventually(is_at_the_end, "everything is committed", timeout_s=60)
        finally:
            await consumer.stop()

    async def _outside(self) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap, group_id=self.name, enable_auto_commit=False, auto_offset_reset="none"
        )
        await consumer.start()
        consumer.assign(self.partitions)
        return consumer


@pytest.fixture
def group(kafka: Kafka, topics: Topics) -> Group:
    """The subscriber's group."""
    return Group(kafka, topics)


async def write(bus: Bus, records: Sequence[Written]) -> None:
    """One after the other, so that the order in each partition is that of the list."""
    for record in records:
        await bus.publish(bus.topics.prefix + record.topic, record.value, key=record.key)


async def test_a_subscriber_reacts_once_through_kills_and_repeats(
    language: Language, start: Start, kafka: Kafka, bus: Bus, group: Group, tmp_path: Path
) -> None:
    """Claimed of what was kept: each pause once, numbers never backwards, the newest at the end.

    Claimed of what was printed: it is what was kept, in its order and never twice. A killed life may have kept
    reactions that it did not come to print; a life that was ended has printed all of them.
    """
    chance = random.Random(SEED)
    told = story(SEED, parts=4 if isinstance(kafka, EmbeddedBroker) else 6)  # a join takes 5 s there
    state = str(tmp_path / "state.db" if language.name == "python" else tmp_path)
    complaints: set[str] = set()

    async def live(until: Callable[[Neighbour], Awaitable[object]], sign: signal.Signals) -> list[dict[str, Any]]:
        before = len(kept_by(language, tmp_path).reactions)
        life = await start(language.command("subscriber", state))
        await until(life)
        assert life.process.returncode is None, life.complaints
        life.process.send_signal(sign)
        assert await life.ended() == (KILLED if sign == signal.SIGKILL else language.ended_by_sigterm), life.complaints
        complaints.update(" ".join(line.split()[:5]) for line in life.complaints if line.startswith("no event: "))
        kept = kept_by(language, tmp_path).reactions[before:]
        assert life.printed == kept[: len(life.printed)]
        assert sign == signal.SIGKILL or life.printed == kept
        return kept

    for number, part in enumerate(told.parts[:-1]):
        feed = asyncio.create_task(write(bus, part.records))
        enough = 0 if number % 2 else chance.randint(1, part.certain)

        async def some_moment(life: Neighbour, enough: int = enough) -> None:
            await eventually(lambda: len(life.printed) >= enough, f"{enough} reactions", timeout_s=60)
            await asyncio.sleep(chance.random() * (0.05 if enough else 2))  # anywhere, also while it starts

        await live(some_moment, signal.SIGKILL)
        await feed
        await group.bury()

    await write(bus, told.parts[-1].records)
    await live(lambda _: group.has_heard_all(), signal.SIGTERM)
    kept = kept_by(language, tmp_path)
    assert problems(told, kept) == [], f"seed {SEED}"
    assert len(complaints) == told.unreadable  # each with its place
    await group.rewind()
    assert await live(lambda _: group.has_heard_all(), signal.SIGTERM) == []  # everything once more, and nothing new
    assert kept_by(language, tmp_path) == kept


NEXT_TO_THE_OFFSETS: Final = "                await consumer.commit()"
RECEIVED: Final = "            batches, lines = await consumer.getmany(timeout_ms=500, max_records=500), []\n"
DIE: Final = (  # with a pause in its hands
    "'DIE' in os.environ and any('paused' in one.topic for one in batches) and os.kill(os.getpid(), signal.SIGKILL)\n"
)
FORGETFUL: Final = "INSERT OR REPLACE INTO pauses VALUES (?)"


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        pytest.param(
            Edit("subscriber.py", NEXT_TO_THE_OFFSETS, f"                {DIE}{NEXT_TO_THE_OFFSETS}"),
            None,
            id="killed before its offsets",
        ),
        pytest.param(
            Edit("subscriber.py", RECEIVED, f"{RECEIVED}            await consumer.commit()\n            {DIE}"),
            ": lost",
            id="offsets before the transaction",
        ),
        pytest.param(
            Edit("subscriber.py", "INSERT INTO pauses VALUES (?) ON CONFLICT DO NOTHING", FORGETFUL),
            " reactions",
            id="every pause is new",
        ),
        pytest.param(
            Edit("subscriber.py", " WHERE excluded.version > campaigns.version", ""),
            ": an old version after a newer one",
            id="every version is newer",
        ),
    ],
)  # fmt: skip
async def test_what_a_careless_subscriber_does_is_found(
    edit: Edit, found: str | None, start: Start, bus: Bus, group: Group, tmp_path: Path
) -> None:
    """The same checks on broken copies; and on one that is only killed, at the worst moment of a good one."""
    told = story(SEED, parts=2, is_messy="DIE" not in edit.new)  # a repeat would heal what was lost
    command = [*rigged(tmp_path, "subscriber", edit), str(tmp_path / "state.db")]
    await write(bus, told.parts[0].records)
    if "DIE" in edit.new:
        first = await start(command, DIE="now")
        assert await first.ended() == KILLED, first.complaints
        await group.bury()
    await write(bus, told.parts[1].records)
    last = await start(command)
    await group.has_heard_all()
    last.process.terminate()
    assert await last.ended() == 0, last.complaints
    wrong = problems(told, kept_by(PYTHON, tmp_path))
    assert any(found in one for one in wrong) if found else wrong == [], (wrong, SEED)
