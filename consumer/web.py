"""HTTP: the operators' port (/, /metrics, /livez, /readyz) and the sync-stats door."""

import asyncio
import hashlib
import hmac
import math
import re
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol
from uuid import UUID

import orjson
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from consumer.envelope import campaign_uuid
from consumer.errors import NotNow, Unavailable, described
from consumer.health import Health
from consumer.status import HEADERS, Status
from schemas import door

REQUEST_DEADLINE_S: Final = (
    10.0  # schemas.door.TOO_SLOW says so; for a whole request to arrive, and for the next one on an idle connection
)
OUTAGE_RETRY_S: Final = 5  # as long as our own longest backoff
SYNC_STATS: Final = re.compile(r"/api/campaigns/([^/]+)/sync-stats")


log = structlog.get_logger(__name__)


def _compact(document: object) -> str:
    return orjson.dumps(document).decode()


class OperatorsDoor:
    """Answers probes and scrapes. Asks no server, so it answers also when every dependency is away."""

    def __init__(self, host: str, port: int, health: Health, registry: CollectorRegistry, status: Status) -> None:
        self._host = host
        self._port = port
        self._health = health
        self._status = status
        app = web.Application()
        app.router.add_get("/", self._page)
        app.router.add_get("/metrics", make_aiohttp_handler(registry))
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)

    async def open(self) -> None:
        """Listen; logs where. Raises OSError when the port is taken."""
        await _listen(self._runner, self._host, self._port, "operators")

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(text=self._status.page(), content_type="text/html", headers=HEADERS)

    async def _livez(self, _: web.Request) -> web.Response:
        return web.json_response({"alive": True}, dumps=_compact)

    async def _readyz(self, _: web.Request) -> web.Response:
        reason = self._health.not_ready
        if reason is not None:
            return web.json_response({"ready": False, "reason": reason}, status=503, dumps=_compact)
        return web.json_response({"ready": True, "degraded": self._health.degraded}, dumps=_compact)


class Sync(Protocol):
    """Recounts a campaign for a user (None: any): its JSON, None when there is none. Raises NotNow, Unavailable."""

    async def __call__(self, campaign_id: UUID, user_id: UUID | None) -> bytes | None: ...


class Answered(Protocol):
    """Told of every answer: HTTP status, seconds."""

    def __call__(self, status: int, seconds: float) -> None: ...


class Rate:
    """Calls per token: `per_minute` at once, then as they trickle in (a token bucket kept as one time per token)."""

    def __init__(self, per_minute: int) -> None:
        self._interval_s = 60 / per_minute if per_minute else 0.0
        self._full_at: dict[str, float] = {}

    def wait_s(self, token: str, now: float) -> float:
        """0 when a call may be made now, which then counts; else how many seconds to wait."""
        if not self._interval_s:
            return 0.0
        full_at = max(self._full_at.get(token, now), now) + self._interval_s
        if full_at - now > 60 + self._interval_s / 1e6:
            return full_at - now - 60
        self._full_at[token] = full_at
        return 0.0


class ApiDoor:
    """POST /api/campaigns/{id}/sync-stats. `tokens`: SHA-256 hex -> the user it speaks for, None for all."""

    def __init__(
        self, host: str, port: int, tokens: Mapping[str, UUID | None], rate: Rate, sync: Sync, answered: Answered
    ) -> None:
        self._host = host
        self._port = port
        self._tokens = {digest.encode(): user_id for digest, user_id in tokens.items()}
        self._rate = rate
        self._sync = sync
        self._answered = answered
        self._runner: web.ServerRunner | None = None

    async def open(self) -> None:
        """Listen; logs where. Raises OSError when the port is taken."""
        self._runner = web.ServerRunner(_Server(self._handle), handle_signals=False, shutdown_timeout=5.0)
        await _listen(self._runner, self._host, self._port, "api")

    async def close(self) -> None:
        """Stop listening; calls under way get a few seconds."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        if isinstance(connection, _Connection):
            connection.is_serving(True)
        begun = time.monotonic()
        try:
            response = await self._answer(request)
        except Exception as error:
            log.error("the door failed", **described(error))
            response = _error(500, door.BROKEN)
        finally:
            if isinstance(connection, _Connection):
                connection.is_serving(False)
        if not request.content.is_eof():
            response.force_close()  # the rest of the body will not be read
        self._answered(response.status, time.monotonic() - begun)
        return response

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if request.path != "/api" and not request.path.startswith("/api/"):
            return _error(404, door.NO_PATH)
        token = self._token(request.headers.getall("Authorization", []))
        if token is None:
            return _error(401, door.UNAUTHORIZED, {"WWW-Authenticate": "Bearer"})
        match = SYNC_STATS.fullmatch(request.path)
        if match is None:
            return _error(404, door.NO_PATH)
        if request.method != "POST":
            return _error(405, door.NO_POST, {"Allow": "POST"})
        wait_s = self._rate.wait_s(token.decode(), time.monotonic())
        if wait_s:
            return _error(429, door.TOO_OFTEN, {"Retry-After": str(math.ceil(wait_s))})
        try:
            if await _is_too_long(request):
                return _error(413, door.TOO_LONG)
        except TimeoutError:
            return _error(408, door.TOO_SLOW)
        campaign_id = campaign_uuid(match.group(1))
        if campaign_id is None:
            return _error(400, door.BAD_ID)
        try:
            found = await self._sync(campaign_id, self._tokens[token])
        except NotNow as error:
            return _error(503, str(error), {"Retry-After": str(error.retry_after_s)})
        except Unavailable:
            return _error(503, door.AWAY, {"Retry-After": str(OUTAGE_RETRY_S)})
        if found is None:
            return _error(404, door.NO_CAMPAIGN)
        return web.Response(body=found, content_type="application/json")

    def _token(self, headers: list[str]) -> bytes | None:
        """The digest of the token sent, if it is one of ours; every one is compared, in constant time."""
        scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest().encode()
        found = [known for known in self._tokens if hmac.compare_digest(known, digest)]
        return found[0] if found and scheme.lower() == "bearer" else None


async def _is_too_long(request: web.BaseRequest) -> bool:
    if (request.content_length or 0) > door.MAX_BODY_BYTES:
        return True
    size = 0
    async with asyncio.timeout(REQUEST_DEADLINE_S):
        async for some in request.content.iter_any():
            size += len(some)
            if size > door.MAX_BODY_BYTES:
                return True
    return False


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> web.Response:
    body = orjson.dumps({"error": sentence})
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


class _Connection(web.RequestHandler):
    """A connection that is closed when a whole request does not arrive in time; aiohttp itself waits for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.is_serving(False)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.is_serving(True)
        super().connection_lost(exc)

    def is_serving(self, serving: bool) -> None:
        """Whether a request is being answered; else the clock runs."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not serving and self.transport is not None:
            self._timer = asyncio.get_running_loop().call_later(REQUEST_DEADLINE_S, self.force_close)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What is no HTTP gets the same kind of answer as everything else."""
        response = _error(status, door.NO_HTTP)
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        options: dict[str, Any] = {"access_log": None, "lingering_time": 2.0, "auto_decompress": False}
        return _Connection(self, loop=asyncio.get_running_loop(), **options)


async def _listen(runner: web.BaseRunner, host: str, port: int, door: str) -> None:
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    host, port = runner.addresses[0][:2]
    log.info("listening", door=door, host=host, port=port)
