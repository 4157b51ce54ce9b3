"""The sync-stats door, through HTTP: what it answers, to whom, and what happens when something is in its way."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import pytest

from consumer.demo.servers import Postgres
from tests.conftest import Bus, RunningService, StartService, command, eventually
from tests.world import REFERENCE, USER, add_campaign, add_prospects, stats_of, sync_request

OWN, ALL = "own-token", "all-token"
OTHER_USER = UUID("22222222-2222-2222-2222-222222222222")
TOKENS = {hashlib.sha256(OWN.encode()).hexdigest(): str(USER), hashlib.sha256(ALL.encode()).hexdigest().upper(): "*"}
REFERENCE_ID = UUID("8c2b2d4e-e29b-41d4-a716-446655440000")


class Api:
    """A caller of one running service."""

    def __init__(self, session: aiohttp.ClientSession, running: RunningService) -> None:
        self.session = session
        self.running = running

    async def call(
        self, path: str, *, token: str | None = OWN, method: str = "POST", **more: Any
    ) -> tuple[int, str, Mapping[str, str]]:
        """Status, body, headers."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        url = f"http://127.0.0.1:{self.running.api_port}{path}"
        async with self.session.request(method, url, headers=headers, **more) as response:
            return response.status, await response.text(), response.headers

    async def sync(self, campaign_id: object, **more: Any) -> tuple[int, Any]:
        """Status and document of a sync-stats call."""
        status, body, _ = await self.call(f"/api/campaigns/{campaign_id}/sync-stats", **more)
        return status, json.loads(body)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that takes any number of connections."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as one:
        yield one


@pytest.fixture
async def api(service: StartService, environment: dict[str, str], session: aiohttp.ClientSession) -> Api:
    """A service with its door open, without a rate limit."""
    environment |= {
        "CAMPAIGN_STATS_API_TOKENS": json.dumps(TOKENS),
        "CAMPAIGN_STATS_API_PORT": "0",
        "CAMPAIGN_STATS_API_RATE_PER_MINUTE": "0",
    }
    return Api(session, await service())


async def add_reference(db: asyncpg.Connection, stats: object) -> None:
    """The reference case of the design, section 2."""
    await db.execute(
        """INSERT INTO campaigns (id, user_id, type, name, status, daily_limit, stop_on_reply, open_tracking, signature,
                                  stats, created_at, updated_at)
           VALUES ($1, $2, 'email', 'Q2 Enterprise Outreach', 'active', 50, true, true, E'Best,\\n%first_name%', $3,
                   '2026-04-18T15:12:00Z', '2026-04-22T11:30:00Z')""",
        REFERENCE_ID,
        USER,
        stats,
    )
    for status, count in REFERENCE.items():
        await add_prospects(db, REFERENCE_ID, status, count)


async def test_the_reference_case_answers_with_exactly_these_keys_in_this_order(
    api: Api, db: asyncpg.Connection
) -> None:
    await add_reference(db, {"total": 120, "sent": 34, "replied": 4, "bounced": 1})
    before = datetime.now(UTC)
    status, body, headers = await api.call(f"/api/campaigns/{REFERENCE_ID}/sync-stats")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    synced = json.loads(body)["campaign"]["last_synced_at"]
    assert body == (
        '{"campaign":{"id":"8c2b2d4e-e29b-41d4-a716-446655440000","user_id":"11111111-1111-1111-1111-111111111111",'
        '"type":"email","name":"Q2 Enterprise Outreach","status":"active","daily_limit":50,"stop_on_reply":true,'
        '"open_tracking":true,"signature":"Best,\\n%first_name%","skip_other_campaigns":null,"operating_hours":null,'
        '"stats":{"total":120,"sent":34,"replied":4,"bounced":1},"last_synced_at":"' + synced + '","pause_reason":null,'
        '"created_at":"2026-04-18T15:12:00Z","updated_at":"2026-04-22T11:30:00Z","sender_accounts":[]},'
        '"prospects_by_status":{"pending":81,"sent":34,"replied":4,"bounced":1}}'
    )
    assert before - timedelta(seconds=5) < datetime.fromisoformat(synced) < datetime.now(UTC) + timedelta(seconds=5)


async def test_wrong_stats_are_healed_stored_and_told(api: Api, bus: Bus, db: asyncpg.Connection) -> None:
    await add_reference(db, {"total": "many", "sent": 1.5, "junk": [1], "replied": 10**30})
    status, document = await api.sync(REFERENCE_ID)
    assert status == 200
    assert document["campaign"]["stats"] == {"total": 120, "sent": 34, "replied": 4, "bounced": 1}
    assert await stats_of(db, REFERENCE_ID) == document["campaign"]["stats"]
    assert document["campaign"]["updated_at"] == document["campaign"]["last_synced_at"]
    out = bus.topics.prefix + "campaign.stats-updated"
    [event] = await eventually(lambda: bus.events(out), "the news", api.running)
    assert event["data"]["trigger"] == "sync_requested"
    assert "causationid" not in event
    assert "signature" not in event["data"]["campaign"]
    again, _ = await api.sync(REFERENCE_ID)
    assert again == 200
    await bus.publish(bus.topics.prefix + "campaign.sync-requested", sync_request(REFERENCE_ID))

    async def answered() -> bool:
        return len(await bus.events(out)) == 2

    await eventually(answered, "an unchanged call told nothing, the request after it was answered", api.running)


async def test_sender_accounts_come_by_id_and_jsonb_as_it_stands(api: Api, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db)
    accounts = sorted(uuid4() for _ in range(3))
    for number, account in reversed(list(enumerate(accounts))):
        await db.execute(
            "INSERT INTO accounts (id, user_id, type, email_address, display_name, daily_limit)"
            " VALUES ($1, $2, 'gmail', $3, 'A', $4)", account, USER, f"a{number}@example.com", number or None,
        )  # fmt: skip
        await db.execute("INSERT INTO campaign_sender_accounts VALUES ($1, $2)", campaign_id, account)
    hours = {"mon": [8, 17.5], "big": 2**70}
    await db.execute("UPDATE campaigns SET operating_hours = $2 WHERE id = $1", campaign_id, hours)
    status, document = await api.sync(str(campaign_id).upper())
    assert status == 200
    assert document["campaign"]["operating_hours"] == hours
    assert [account["id"] for account in document["campaign"]["sender_accounts"]] == [str(one) for one in accounts]
    assert list(document["campaign"]["sender_accounts"][1].items())[1:] == [
        ("type", "gmail"), ("email_address", "a1@example.com"), ("display_name", "A"), ("status", "active"),
        ("daily_limit", 1),
    ]  # fmt: skip
    assert "prospects_by_status" not in document
    assert document["campaign"]["stats"] == {"total": 0, "sent": 0, "replied": 0, "bounced": 0}


async def test_the_campaign_that_this_call_pauses_answers_paused(api: Api, bus: Bus, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, {"sent": 95, "bounced": 5})
    status, document = await api.sync(campaign_id)
    assert (status, document["campaign"]["status"]) == (200, "paused")
    assert document["campaign"]["pause_reason"] == "bounce_rate"
    [event] = await eventually(lambda: bus.events(bus.topics.prefix + "campaign.paused"), "the pause", api.running)
    assert event["data"]["bounced"] == 5


async def test_only_the_owner_and_the_all_token_see_a_campaign(api: Api, db: asyncpg.Connection) -> None:
    foreign = await add_campaign(db, {"sent": 2}, user_id=OTHER_USER)
    assert await api.sync(foreign) == (404, {"error": "there is no such campaign; do not ask again"})
    assert await api.sync(uuid4()) == (404, {"error": "there is no such campaign; do not ask again"})
    assert await stats_of(db, foreign) == {}  # a stranger's call does nothing at all
    status, document = await api.sync(foreign, token=ALL)
    assert (status, document["campaign"]["stats"]["sent"]) == (200, 2)
    await db.execute("DELETE FROM campaigns WHERE id = $1", foreign)
    assert (await api.sync(foreign, token=ALL))[0] == 404


@pytest.mark.parametrize(
    ("path", "method", "token", "status", "header"),
    [
        ("/api/campaigns/{id}/sync-stats", "POST", None, 401, ("WWW-Authenticate", "Bearer")),
        ("/api/campaigns/{id}/sync-stats", "POST", "wrong", 401, ("WWW-Authenticate", "Bearer")),
        ("/api/campaigns/nonsense/sync-stats", "GET", None, 401, ("WWW-Authenticate", "Bearer")),
        ("/api/nowhere", "GET", None, 401, ("WWW-Authenticate", "Bearer")),
        ("/api", "GET", None, 401, ("WWW-Authenticate", "Bearer")),
        ("/api/nowhere", "GET", OWN, 404, None),
        ("/api/campaigns/{id}/sync-stats/", "POST", OWN, 404, None),
        ("/", "GET", None, 404, None),
        ("/apis", "GET", None, 404, None),
        ("/api/campaigns/{id}/sync-stats", "GET", OWN, 405, ("Allow", "POST")),
        ("/api/campaigns/{id}/sync-stats", "DELETE", OWN, 405, ("Allow", "POST")),
        ("/api/campaigns/nonsense/sync-stats", "POST", OWN, 400, None),
        ("/api/campaigns/{id}%0A/sync-stats", "POST", OWN, 400, None),
        ("/api/campaigns/11111111-1111-1111-1111-111111111111/sync-stats", "POST", OWN, 400, None),
        ("/api/campaigns/00000000-0000-0000-0000-000000000000/sync-stats", "POST", OWN, 404, None),
        ("/api/campaigns/FFFFFFFF-ffff-ffff-ffff-ffffffffffff/sync-stats", "POST", OWN, 404, None),
    ],
)
async def test_wrong_calls_get_one_sentence_and_the_documented_status(
    api: Api, path: str, method: str, token: str | None, status: int, header: tuple[str, str] | None
) -> None:
    import yarl

    url = yarl.URL(f"http://127.0.0.1:{api.running.api_port}{path.replace('{id}', str(uuid4()))}", encoded=True)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with api.session.request(method, url, headers=headers) as response:
        assert response.status == status
        document = await response.json()
        assert list(document) == ["error"]
        assert header is None or response.headers[header[0]] == header[1]
    metrics = await api.running.metrics()
    assert metrics[f'campaign_stats_api_calls_total{{status="{status}"}}'] == 1


async def test_a_body_is_ignored_up_to_1024_bytes(api: Api, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db)
    assert (await api.sync(campaign_id, data=b"x" * 1024))[0] == 200
    assert (await api.sync(campaign_id, data=b"x" * 1025))[0] == 413
    path, packed = f"/api/campaigns/{campaign_id}/sync-stats", {"Content-Encoding": "gzip"}
    headers = {"Authorization": f"Bearer {OWN}", **packed}
    url = f"http://127.0.0.1:{api.running.api_port}{path}"
    async with api.session.post(url, data=b"no gzip", headers=headers) as response:
        assert response.status == 200

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 300

    assert (await api.sync(campaign_id, data=chunks()))[0] == 413


async def test_too_many_calls_with_one_token_are_told_when_to_come_back(
    service: StartService, api: Api, db: asyncpg.Connection, session: aiohttp.ClientSession
) -> None:
    campaign_id = await add_campaign(db)
    limited = Api(session, await service(api_rate_per_minute=5))
    path = f"/api/campaigns/{campaign_id}/sync-stats"
    assert [(await limited.call(path))[0] for _ in range(6)] == [200] * 5 + [429]
    status, body, headers = await limited.call(path)
    assert (status, list(json.loads(body))) == (429, ["error"])
    assert 1 <= int(headers["Retry-After"]) <= 12
    assert (await limited.call(path, token=ALL))[0] == 200  # every token has its own count


async def test_a_token_is_rotated_by_replacing_replicas_with_both_digests_set_meanwhile(
    service: StartService, db: asyncpg.Connection, session: aiohttp.ClientSession
) -> None:
    campaign_id = await add_campaign(db)

    async def replica(*tokens: str) -> Api:
        digests = {hashlib.sha256(token.encode()).hexdigest(): str(USER) for token in tokens}
        return Api(session, await service(api_tokens=json.dumps(digests), api_port=0, api_rate_per_minute=1))

    async def answers(api: Api) -> list[int]:
        return [(await api.sync(campaign_id, token=token))[0] for token in ("old", "new", "old", "new")]

    before, both = await replica("old"), await replica("old", "new")
    assert await answers(before) == [200, 401, 429, 401]
    assert await answers(both) == [200, 200, 429, 429]  # each has its own rate, though both speak for one user
    before.running.terminate()
    assert await before.running.wait() == 0
    after = await replica("new")
    both.running.terminate()
    assert await both.running.wait() == 0
    assert await answers(after) == [401, 200, 401, 429]


async def test_a_locked_campaign_is_waited_for_five_seconds_then_503(
    api: Api, db: asyncpg.Connection, database_url: str
) -> None:
    campaign_id, free = await add_campaign(db, {"sent": 3}), await add_campaign(db, {"sent": 1})
    other = await asyncpg.connect(database_url)
    loop = asyncio.get_running_loop()
    async with other.transaction():
        await other.execute("SELECT FROM campaigns WHERE id = $1 FOR UPDATE", campaign_id)
        begun = loop.time()
        waiting = [asyncio.create_task(api.call(f"/api/campaigns/{campaign_id}/sync-stats")) for _ in range(3)]
        assert (await api.sync(free))[0] == 200
        assert loop.time() - begun < 2
        for status, _, headers in await asyncio.gather(*waiting):
            assert (status, headers["Retry-After"]) == (503, "1")
        assert 4.5 < loop.time() - begun < 8
        assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0
        late = asyncio.create_task(api.sync(campaign_id))
        await eventually(lambda: loop.time() - begun > 6, "it waits again")
    status, document = await late
    assert (status, document["campaign"]["stats"]["sent"]) == (200, 3)
    await other.close()


async def test_a_huge_campaign_ignores_its_cool_down(api: Api, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, {"sent": 20_001})
    assert (await api.sync(campaign_id))[0] == 200
    await db.execute(
        "UPDATE campaign_stats.campaign_state SET next_recount_at = clock_timestamp() + interval '1 hour'"
        " WHERE campaign_id = $1", campaign_id,
    )  # fmt: skip
    await db.execute("UPDATE campaign_prospects SET status = 'replied' WHERE campaign_id = $1", campaign_id)
    status, document = await api.sync(campaign_id)
    assert (status, document["prospects_by_status"]) == (200, {"replied": 20_001})


async def test_two_hundred_calls_for_one_campaign_share_recounts_and_each_sees_its_own_change(
    api: Api, db: asyncpg.Connection, database_url: str
) -> None:
    campaign_id = await add_campaign(db, {"sent": 50})
    pool = await asyncpg.create_pool(database_url, min_size=4, max_size=4)

    async def change_and_ask(number: int) -> None:
        prospect = await pool.fetchval(
            "INSERT INTO campaign_prospects (campaign_id, user_id, status) VALUES ($1, $2, 'sent') RETURNING id",
            campaign_id, USER,
        )  # fmt: skip
        at_least = await pool.fetchval("SELECT count(*) FROM campaign_prospects WHERE campaign_id = $1", campaign_id)
        status, document = await api.sync(campaign_id)
        assert (status, prospect is not None) == (200, True)
        assert document["campaign"]["stats"]["total"] >= at_least, number

    await asyncio.gather(*(change_and_ask(number) for number in range(200)))
    await pool.close()
    recounts = (await api.running.metrics())['campaign_stats_recounts_total{caller="door"}']
    assert 1 <= recounts < 200
    assert (await stats_of(db, campaign_id))["total"] == 250


async def test_two_hundred_calls_for_many_campaigns_are_all_right(api: Api, db: asyncpg.Connection) -> None:
    campaigns = [await add_campaign(db, {"sent": number % 9, "replied": 2}) for number in range(200)]
    answers = await asyncio.gather(*(api.sync(campaign_id) for campaign_id in campaigns))
    for number, (status, document) in enumerate(answers):
        assert status == 200
        assert document["campaign"]["id"] == str(campaigns[number])
        assert document["campaign"]["stats"] == {
            "total": number % 9 + 2,
            "sent": number % 9,
            "replied": 2,
            "bounced": 0,
        }


async def test_a_campaign_that_cannot_be_recounted_is_503_and_its_neighbour_is_served(
    api: Api, db: asyncpg.Connection
) -> None:
    poisoned, good = await add_campaign(db, {"sent": 1}), await add_campaign(db, {"sent": 1})
    await db.execute(
        f"""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
            CREATE TRIGGER refuse BEFORE UPDATE ON campaigns FOR EACH ROW WHEN (NEW.id = '{poisoned}')
            EXECUTE FUNCTION refuse()"""
    )
    answers = await asyncio.gather(*(api.sync(one) for one in (poisoned, good, poisoned)))
    assert [status for status, _ in answers] == [503, 200, 503]
    await db.execute("DROP TRIGGER refuse ON campaigns")
    assert (await api.sync(poisoned))[0] == 200


async def test_half_a_request_and_a_slow_sender_are_closed_after_a_time_limit(api: Api) -> None:
    head = f"POST /api/campaigns/{uuid4()}/sync-stats HTTP/1.1\r\nHost: x\r\n"
    whole = f"{head}Authorization: Bearer {OWN}\r\nContent-Length: 10\r\n\r\nabc"
    loop = asyncio.get_running_loop()

    async def say(text: str, *, drip: bool = False) -> tuple[bytes, float]:
        begun = loop.time()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.running.api_port)
        writer.write(text.encode())
        reading = asyncio.create_task(reader.read())
        while drip and not reading.done():
            writer.write(b"X-Drip: 1\r\n")
            await asyncio.wait([reading], timeout=0.5)
        answer = await asyncio.wait_for(reading, 15)
        writer.close()
        return answer, loop.time() - begun

    silent, half, dripping, slow, garbage = await asyncio.gather(
        say(""), say(head), say(head, drip=True), say(whole), say("\x00\x01nonsense\r\n\r\n")
    )
    for answer, seconds in (silent, half, dripping):
        assert answer == b""
        assert 9 < seconds < 14
    assert slow[0].startswith(b"HTTP/1.1 408")
    assert slow[1] < 14
    assert b" 400 Bad Request\r\n" in garbage[0]
    assert b'{"error":' in garbage[0]
    assert garbage[1] < 5


async def test_without_its_database_the_door_says_so_and_when_to_come_back(
    service: StartService, api: Api, environment: dict[str, str], servers_directory: Any, session: aiohttp.ClientSession
) -> None:
    from consumer import migrations

    server = Postgres(servers_directory / "door", options={"fsync": "off"}, tcp=True)
    try:
        server.start()
        await migrations.migrate(server.url(), reference_schema=True)
        environment["DATABASE_URL"] = server.url()
        own = Api(session, await service())
        server.stop()
        status, body, headers = await own.call(f"/api/campaigns/{uuid4()}/sync-stats")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert list(json.loads(body)) == ["error"]
    finally:
        server.stop()


async def test_without_tokens_there_is_no_door(service: StartService) -> None:
    running = await service(api_port=0)
    assert running.api_port == 0
    assert {line["door"] for line in running.messages("listening")} == {"operators"}


@pytest.mark.parametrize(
    "tokens", ["s3cr3t", '["s3cr3t"]', '{"s3cr3t":"*"}', json.dumps({"a" * 64: "s3cr3t"}), json.dumps({"a" * 64: 3}),
               f'{{"{"a" * 64}":"*","{"A" * 64}":"*"}}'],
)  # fmt: skip
async def test_wrong_tokens_end_with_2_and_are_not_shown(environment: dict[str, str], tokens: str) -> None:
    code, out, error = await command({**environment, "CAMPAIGN_STATS_API_TOKENS": tokens}, "run")
    assert code == 2
    assert error.startswith("campaign-stats: CAMPAIGN_STATS_API_TOKENS: ")
    assert "s3cr3t" not in out + error


async def test_the_door_needs_the_rights_it_uses(
    environment: dict[str, str], db: asyncpg.Connection, database_url: str
) -> None:
    name = f"r{uuid4().hex[:8]}"
    await db.execute(
        f"""CREATE ROLE {name} LOGIN; GRANT USAGE ON SCHEMA campaign_stats TO {name};
            GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA campaign_stats TO {name};
            GRANT SELECT, UPDATE ON campaigns TO {name}; GRANT SELECT ON campaign_prospects TO {name}"""
    )
    try:
        open_door = {
            **environment,
            "CAMPAIGN_STATS_API_TOKENS": json.dumps(TOKENS),
            "CAMPAIGN_STATS_API_PORT": "0",
            "DATABASE_URL": database_url.replace("postgres@", f"{name}@"),
        }
        code, _, error = await command(open_door, "run")
        assert code == 2
        assert "of public.accounts: GRANT SELECT" in error
        assert "of public.campaign_sender_accounts: GRANT SELECT" in error
    finally:
        await db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
