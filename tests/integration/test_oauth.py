"""Tokens: fetched by the client-credentials grant, kept while they are good; every strange answer has its error."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs

import pytest
from aiohttp import web

from consumer import oauth
from consumer.errors import ConfigError, Unavailable
from consumer.oauth import Tokens

SECRET = "hunter2 ü:+"
GOOD = {"access_token": "opaque", "token_type": "Bearer", "expires_in": 3600}


class Endpoint:
    """Answers what the test says; `asked` are the login and the form of every request."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.status = 200
        self.answer: Any = GOOD
        self.headers: dict[str, str] = {}
        self.delay_s = 0.0

    async def handle(self, request: web.Request) -> web.Response:
        """One request."""
        kind, _, login = request.headers["Authorization"].partition(" ")
        assert kind == "Basic"
        self.asked.append((base64.b64decode(login).decode(), parse_qs(await request.text())))
        await asyncio.sleep(self.delay_s)
        if isinstance(self.answer, str):
            return web.Response(text=self.answer, status=self.status, headers=self.headers)
        return web.json_response(self.answer, status=self.status, headers=self.headers)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    """On loopback."""
    one = Endpoint()
    application = web.Application()
    application.router.add_post("/token", one.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}/token"
    yield one
    await runner.cleanup()


def tokens(endpoint: Endpoint, scope: str | None = None) -> Tokens:
    return Tokens(endpoint.url, "the client", SECRET, scope)


async def test_client_and_secret_go_encoded_into_the_header_and_the_scope_into_the_form(endpoint: Endpoint) -> None:
    assert await tokens(endpoint, "read write").token() == "opaque"
    assert await tokens(endpoint).token() == "opaque"
    login, form = "the+client:hunter2+%C3%BC%3A%2B", {"grant_type": ["client_credentials"]}
    assert endpoint.asked == [(login, {**form, "scope": ["read write"]}), (login, form)]


async def test_connections_opened_together_share_one_token(endpoint: Endpoint) -> None:
    one = tokens(endpoint)
    assert set(await asyncio.gather(*(one.token() for _ in range(20)))) == {"opaque"}
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    ("lifetime", "asked"),
    [(3600, 1), ("3600", 1), (31, 1), (30, 2), (0, 2), (-5, 2), (None, 2), ("soon", 2), (float("nan"), 2), (1e300, 2)],
)
async def test_a_token_is_kept_until_shortly_before_it_expires(
    endpoint: Endpoint, lifetime: object, asked: int
) -> None:
    endpoint.answer = {**GOOD, "expires_in": lifetime}
    one = tokens(endpoint)
    assert [await one.token(), await one.token()] == ["opaque", "opaque"]
    assert len(endpoint.asked) == asked


@pytest.mark.parametrize(
    "answer",
    ["", "no JSON", "[1]", {}, {"access_token": None}, {"access_token": ""}, {"access_token": "a\nb"},
     {"access_token": "ü"}],
)  # fmt: skip
async def test_an_answer_without_a_usable_token_is_an_outage_which_passes(endpoint: Endpoint, answer: object) -> None:
    endpoint.answer = answer
    one = tokens(endpoint)
    with pytest.raises(Unavailable, match="token endpoint"):
        await one.token()
    endpoint.answer = GOOD
    assert await one.token() == "opaque"


@pytest.mark.parametrize("status", [404, 429, 500, 503])
async def test_an_endpoint_that_fails_is_an_outage(endpoint: Endpoint, status: int) -> None:
    endpoint.status = status
    with pytest.raises(Unavailable, match=f"the token endpoint answers {status}"):
        await tokens(endpoint).token()


async def test_a_redirect_is_not_followed_with_the_secret(endpoint: Endpoint) -> None:
    endpoint.status, endpoint.headers = 307, {"Location": endpoint.url}
    with pytest.raises(Unavailable, match="answers 307"):
        await tokens(endpoint).token()
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_a_refused_client_must_be_put_right(endpoint: Endpoint, status: int) -> None:
    endpoint.status, endpoint.answer = status, {"error": "invalid_client", "error_description": SECRET}
    with pytest.raises(ConfigError, match=f"refuses the client \\({status}\\); check") as raised:
        await tokens(endpoint).token()
    assert SECRET not in str(raised.value)


async def test_an_endpoint_that_is_away_or_silent_is_an_outage(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "FETCH_DEADLINE_S", 0.05)
    with pytest.raises(Unavailable, match="Connect"):
        await Tokens("http://127.0.0.1:1/token", "client", SECRET, None).token()
    endpoint.delay_s = 5
    with pytest.raises(Unavailable, match="TimeoutError"):
        await tokens(endpoint).token()
