"""Unpacking within bounds: a batch of a few kB may hold gigabytes, and aiokafka would unpack all of it into memory."""

import mmap
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any, Final

import cramjam

INFLATE_AT_MOST: Final = 64 * 2**20  # bytes of one batch; 64x what a topic takes by default, and memory stays flat
XERIAL: Final = b"\x82SNAPPY\x00"  # snappy in blocks, as Java writes it; after 16 bytes each block follows its length
NO_ROOM: Final = "failed to write whole buffer"


class Swollen(Exception):
    """A batch that would take more than INFLATE_AT_MOST."""


def bound() -> None:
    """Make aiokafka unpack with the functions below; they raise Swollen, and otherwise do what its own do."""
    for name, module in list(sys.modules.items()):
        if name.startswith("aiokafka.record."):
            for decoder in (gzip_decode, snappy_decode, lz4_decode, zstd_decode):
                if hasattr(module, decoder.__name__):
                    setattr(module, decoder.__name__, decoder)


def gzip_decode(payload: Any) -> bytes:
    """Unpack gzip, of one member or several."""
    found, left = b"", bytes(payload)
    while left:
        unpacking = zlib.decompressobj(wbits=31)
        found += unpacking.decompress(left, INFLATE_AT_MOST + 1 - len(found))
        if len(found) > INFLATE_AT_MOST:
            raise Swollen
        if not unpacking.eof:
            raise EOFError
        left = unpacking.unused_data
    return found


def snappy_decode(payload: Any) -> bytes:
    """Unpack snappy, in Java's blocks or without."""
    if bytes(payload[:8]) != XERIAL:
        return _snappy([payload])
    blocks, at = [], 16
    while at < len(payload):
        (size,) = struct.unpack_from("!i", payload, at)
        blocks.append(payload[at + 4 : at + 4 + size])
        at += 4 + size
    return _snappy(blocks)


def _snappy(blocks: list[Any]) -> bytes:
    if sum(cramjam.snappy.decompress_raw_len(block) for block in blocks) > INFLATE_AT_MOST:
        raise Swollen
    return b"".join(bytes(cramjam.snappy.decompress_raw(block)) for block in blocks)


def lz4_decode(payload: Any) -> bytes:
    """Unpack lz4."""
    return _within(cramjam.lz4.decompress_into, payload)


def zstd_decode(payload: Any) -> bytes:
    """Unpack zstd."""
    return _within(cramjam.zstd.decompress_into, payload)


def _within(decompress_into: Callable[[Any, Any], int], payload: Any) -> bytes:
    with mmap.mmap(-1, INFLATE_AT_MOST) as room:  # takes memory only where it is written
        try:
            return room[: decompress_into(payload, room)]
        except cramjam.DecompressionError as error:
            if NO_ROOM in str(error):
                raise Swollen from error
            raise
