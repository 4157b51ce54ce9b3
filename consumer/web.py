"""HTTP: the operators' port with /metrics, /livez and /readyz."""

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from consumer.health import Health

log = structlog.get_logger(__name__)


class OperatorsDoor:
    """Answers probes and scrapes. Asks no server, so it answers also when every dependency is away."""

    def __init__(self, host: str, port: int, health: Health, registry: CollectorRegistry) -> None:
        self._host = host
        self._port = port
        self._health = health
        app = web.Application()
        app.router.add_get("/metrics", make_aiohttp_handler(registry))
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)

    async def open(self) -> None:
        """Listen; logs where. Raises OSError when the port is taken."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        log.info("listening", door="operators", host=host, port=port)

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _livez(self, _: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        reason = self._health.not_ready
        if reason is not None:
            return web.json_response({"ready": False, "reason": reason}, status=503)
        return web.json_response({"ready": True, "degraded": self._health.degraded})
