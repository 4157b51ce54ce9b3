"""How bytes come in from a broker: large answers are received straight into a buffer that is large enough and kept.

aiokafka reads through asyncio's StreamReader. That collects megabytes in a buffer that grows, stops receiving whenever
it holds 128 kB, and copies everything out again, into memory that is new each time: a sixth of the CPU of reading hints
(measured: tests/benchmarks/performance.md, "Hot path").
"""

import asyncio
from functools import partial
from typing import Any, Final
from weakref import ref

import aiokafka.conn
from aiokafka.conn import AIOKafkaProtocol

LARGE: Final = 64 * 1024  # bytes; smaller answers take the client's own way,
LARGEST: Final = 16 * 1024 * 1024  # as do larger ones: more than a fetch asks for, and maybe not from a broker at all


def receive_directly() -> None:
    """Make all connections that aiokafka opens from now on use Incoming."""
    aiokafka.conn.AIOKafkaProtocol = Incoming


class Incoming(AIOKafkaProtocol, asyncio.BufferedProtocol):  # type: ignore[misc]  # aiokafka has no types
    """In place of AIOKafkaProtocol; `reader` hands out the same bytes and raises the same errors as with that one.

    But for one case: over TLS a peer that says goodbye right behind a large answer may cut it short. The client then
    asks again, as for any connection that is lost.

    The client asks `reader` for the size of an answer, then for so many bytes, and never for two things at once.
    """

    def __init__(self, closed: Any, reader: asyncio.StreamReader, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(closed, reader, loop=loop)
        self._reader = reader
        self._small = memoryview(b"")
        self._kept = bytearray()  # for large answers; a new one for each would cost as much as is saved
        self._missing = memoryview(b"")  # where the rest of a large answer goes; empty when there is none to come
        self._is_over = False
        self._awake = asyncio.Event()  # nothing is missing, or will come
        # Through a weak reference: in a cycle both would stay until the next garbage collection.
        reader.readexactly = partial(_readexactly, ref(self))  # type: ignore[method-assign]

    def connection_made(self, transport: Any) -> None:
        """Bytes will come."""
        self._small = memoryview(bytearray(LARGE))
        super().connection_made(transport)

    def get_buffer(self, _: int) -> memoryview:
        """Where what comes next is to be written."""
        return self._missing or self._small

    def buffer_updated(self, received: int) -> None:
        """So many bytes were written there."""
        if not self._missing:
            self._reader.feed_data(self._small[:received])
            return
        self._missing = self._missing[received:]
        if not self._missing:
            self._awake.set()

    def eof_received(self) -> bool | None:
        """Nothing more will come."""
        keep_open: bool | None = super().eof_received()
        self._end()
        return keep_open

    def connection_lost(self, error: Exception | None) -> None:
        """Nothing more will come, because of `error` or because one side has closed the connection."""
        super().connection_lost(error)
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._awake.set()

    async def read(self, size: int) -> bytes:
        """So many bytes. Raises IncompleteReadError, or what the connection was lost for."""
        if not LARGE <= size <= LARGEST:
            return await asyncio.StreamReader.readexactly(self._reader, size)
        begin = await self._reader.read(size)  # what is there, else what comes next
        if len(self._kept) < size:
            self._kept = bytearray(size)
        answer = memoryview(self._kept)[:size]
        answer[: len(begin)] = begin
        self._missing = answer[len(begin) :]
        try:
            if self._missing and not self._is_over:
                self._awake.clear()
                await self._awake.wait()
        finally:
            missing, self._missing = len(self._missing), memoryview(b"")
        if not missing:
            return bytes(answer)
        if (error := self._reader.exception()) is not None:
            raise error
        raise asyncio.IncompleteReadError(bytes(answer[: size - missing]), size)


async def _readexactly(protocol: "ref[Incoming]", size: int) -> bytes:
    """In place of StreamReader.readexactly."""
    incoming = protocol()
    if incoming is None:
        raise asyncio.IncompleteReadError(b"", size)
    return await incoming.read(size)
