"""Large answers received directly: who reads gets what the client's own protocol gives, however it arrives."""

import asyncio
import gc
import ssl
import struct
import tracemalloc
import weakref
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiokafka.conn import AIOKafkaConnection, AIOKafkaProtocol
from aiokafka.errors import KafkaConnectionError
from hypothesis import given
from hypothesis import strategies as st

from consumer.broker import incoming, tls_context
from consumer.broker.incoming import LARGE, LARGEST, Incoming
from tests.secured import certificates

Outcome = tuple[list[bytes], str]


class Transport(asyncio.Transport):
    """The edge to the network: only told whether to go on receiving."""

    def pause_reading(self) -> None:
        """What was received is still to be read."""

    def resume_reading(self) -> None:
        """Enough was read."""


def answers(sizes: Sequence[int]) -> list[bytes]:
    """Different bytes everywhere."""
    return [bytes((place + at) % 251 for at in range(size)) for place, size in enumerate(sizes)]


def written(bodies: Sequence[bytes]) -> bytes:
    """As a broker writes them."""
    return b"".join(struct.pack(">i", len(body)) + body for body in bodies)


def pieces(sent: bytes, cuts: Sequence[int]) -> list[bytes]:
    """Cut at these places."""
    places = [0, *sorted(cut % (len(sent) + 1) for cut in cuts), len(sent)]
    return [sent[begin:end] for begin, end in pairwise(places)]


def deliver(protocol: Any, piece: bytes) -> None:
    """As a transport does: into the protocol's own buffer, as much as fits at a time, or handed over."""
    if not isinstance(protocol, asyncio.BufferedProtocol):
        protocol.data_received(piece)
        return
    while piece:
        room = memoryview(protocol.get_buffer(-1))
        fits = min(len(room), len(piece))
        room[:fits] = piece[:fits]
        protocol.buffer_updated(fits)
        piece = piece[fits:]


async def received(kind: Any, parts: Sequence[bytes], end: str, *, at_leisure: bool) -> Outcome:
    """What a client reads of it until it fails, and how it fails. `at_leisure`: it reads between any two parts."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**16, loop=loop)
    protocol = kind(loop.create_future(), reader, loop=loop)
    protocol.connection_made(Transport())
    found: list[bytes] = []

    async def read() -> None:
        while True:
            (size,) = struct.unpack(">i", await reader.readexactly(4))
            found.append(await reader.readexactly(size))

    reading = asyncio.create_task(read())
    for part in parts:
        deliver(protocol, part)
        for _ in range(5 if at_leisure else 0):
            await asyncio.sleep(0)
    if end == "closed by them":
        protocol.eof_received()
    protocol.connection_lost(ConnectionResetError("reset") if end == "reset" else None)
    async with asyncio.timeout(5):
        [ended] = await asyncio.gather(reading, return_exceptions=True)
    if isinstance(ended, asyncio.IncompleteReadError):
        found.append(ended.partial)
    return found, f"{type(ended).__name__}: {ended}"


SIZES = st.lists(st.sampled_from((0, 1, 300, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE + 7)), max_size=5)


@given(
    sizes=SIZES,
    cuts=st.lists(st.integers(0, 2**20), max_size=6),
    lost=st.integers(0, 2**20) | st.just(0),
    end=st.sampled_from(("closed by them", "closed by us", "reset")),
    at_leisure=st.booleans(),
)
def test_what_is_read_is_what_the_clients_own_protocol_hands_out(
    sizes: list[int], cuts: list[int], lost: int, end: str, at_leisure: bool
) -> None:
    sent = written(answers(sizes))
    parts = pieces(sent[: len(sent) - lost % (len(sent) + 1)], cuts)
    ours = asyncio.run(received(Incoming, parts, end, at_leisure=at_leisure))
    assert ours == asyncio.run(received(AIOKafkaProtocol, parts, end, at_leisure=at_leisure))
    if not lost and end != "reset":
        assert ours[0] == [*answers(sizes), b""]


async def test_a_large_answer_is_received_straight_into_the_buffer_that_is_kept_for_it() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**16, loop=loop)
    protocol = Incoming(loop.create_future(), reader, loop=loop)
    protocol.connection_made(Transport())
    body = bytes(range(256)) * (5 * LARGE // 256)
    reading = asyncio.create_task(reader.readexactly(len(body)))
    deliver(protocol, body[:LARGE])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    room = protocol.get_buffer(-1)
    assert len(room) == 4 * LARGE
    room[:] = body[LARGE:]
    protocol.buffer_updated(4 * LARGE)
    assert await reading == body
    assert len(protocol.get_buffer(-1)) == LARGE
    kept = protocol._kept
    again = asyncio.create_task(reader.readexactly(2 * LARGE))
    deliver(protocol, body[:LARGE])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    deliver(protocol, body[LARGE : 2 * LARGE])
    assert await again == body[: 2 * LARGE]
    assert protocol._kept is kept


async def test_an_answer_that_claims_to_be_larger_than_any_takes_no_memory() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**16, loop=loop)
    protocol = Incoming(loop.create_future(), reader, loop=loop)
    protocol.connection_made(Transport())
    tracemalloc.start()
    try:
        (size,) = struct.unpack(">i", b"HTTP")
        reading = asyncio.create_task(reader.readexactly(size))
        deliver(protocol, b"/1.1 400 Bad Request")
        await asyncio.sleep(0)
        protocol.eof_received()
        with pytest.raises(asyncio.IncompleteReadError) as raised:
            await reading
        assert tracemalloc.get_traced_memory()[1] < LARGEST
    finally:
        tracemalloc.stop()
    assert raised.value.partial == b"/1.1 400 Bad Request"


async def test_a_connection_that_is_over_is_freed_at_once() -> None:
    loop = asyncio.get_running_loop()
    gc.disable()
    try:
        reader = asyncio.StreamReader(limit=2**16, loop=loop)
        protocol = Incoming(loop.create_future(), reader, loop=loop)
        protocol.connection_made(Transport())
        reading = asyncio.create_task(reader.readexactly(2 * LARGE))
        deliver(protocol, b"begin")
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert len(protocol.get_buffer(-1)) == LARGE, "the answer that nobody waits for is let go"
        protocol.connection_lost(None)
        left = weakref.ref(protocol), weakref.ref(reader)
        del protocol, reader, reading
        await asyncio.sleep(0)
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


async def test_large_answers_come_through_tls(tmp_path: Path) -> None:
    files, loop = certificates(tmp_path), asyncio.get_running_loop()
    listening = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    listening.load_cert_chain(files.server, files.server_key)
    bodies = answers([3, 5 * LARGE + 1, 0, 3 * LARGE])
    everything_read = asyncio.Event()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(written(bodies))
        await everything_read.wait()
        writer.close()

    async with await asyncio.start_server(answer, "localhost", 0, ssl=listening) as server:
        reader = asyncio.StreamReader(limit=2**16, loop=loop)
        await loop.create_connection(
            lambda: Incoming(loop.create_future(), reader, loop=loop),
            *server.sockets[0].getsockname()[:2],
            ssl=tls_context(files.ca),
            server_hostname="localhost",
        )
        found = []
        async with asyncio.timeout(10):
            for _ in bodies:
                (size,) = struct.unpack(">i", await reader.readexactly(4))
                found.append(await reader.readexactly(size))
            everything_read.set()
            with pytest.raises(asyncio.IncompleteReadError):
                await reader.readexactly(4)
    assert found == bodies


def test_the_client_takes_its_protocol_from_where_we_put_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiokafka.conn.AIOKafkaProtocol", AIOKafkaProtocol)
    incoming.receive_directly()

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def connected() -> Any:
        async with await asyncio.start_server(close, "127.0.0.1", 0) as server:
            connection = AIOKafkaConnection(*server.sockets[0].getsockname(), request_timeout_ms=5_000)
            with pytest.raises(KafkaConnectionError):
                await connection.connect()
            return connection._protocol

    assert type(asyncio.run(connected())) is Incoming
