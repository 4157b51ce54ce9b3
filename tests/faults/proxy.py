"""A TCP proxy that can fall silent: what a network does to a connection, on one machine."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

T = TypeVar("T")

CHUNK: Final = 256 * 1024


class Proxy:
    """Between one listening port and one server, in an event loop of its own, so that a busy test delays nobody.

    A connection that was silenced stays silent for ever, as behind a firewall that forgot it: neither side hears a
    reset. New ones are taken at any time, but hear nothing until the silence is over.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self.target = target
        self.delay_s = 0.0
        self.taken = 0
        self._flows: set[_Flow] = set()
        self._is_silent = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {port}", daemon=True)
        self._server: asyncio.Server | None = None

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", self.port))

    def silence(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        self._is_silent = True
        self._loop.call_soon_threadsafe(self._for_all, _Flow.silence)

    def heal(self) -> None:
        """New connections work again, the silenced ones never do."""
        self._is_silent = False

    def cut(self) -> None:
        """Close every connection there is; new ones are taken."""
        self._loop.call_soon_threadsafe(self._for_all, _Flow.close)

    def stop(self) -> None:
        """Close everything."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, job: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(job, self._loop).result(10)

    def _for_all(self, do: Callable[["_Flow"], None]) -> None:
        for flow in list(self._flows):
            do(flow)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taken += 1
        flow = _Flow(writer)
        pumps: list[asyncio.Future[None]] = []
        self._flows.add(flow)
        try:
            if self._is_silent:
                await flow.silenced_for_ever()
            with suppress(OSError):
                there, back = await asyncio.open_connection("127.0.0.1", self.target)
                flow.writers.append(back)
                pumps = [
                    asyncio.ensure_future(self._pump(flow, reader, back)),
                    asyncio.ensure_future(self._pump(flow, there, writer)),
                ]
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the end of the test
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._flows.discard(flow)
            flow.close()

    async def _pump(self, flow: "_Flow", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if flow.is_silent:
                    await flow.silenced_for_ever()
                writer.write(chunk)
                await writer.drain()
            if flow.is_silent:
                await flow.silenced_for_ever()  # not even the end of the other side is told


class _Flow:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.is_silent = False

    def silence(self) -> None:
        self.is_silent = True

    async def silenced_for_ever(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
