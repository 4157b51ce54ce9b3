"""What a fetch brought, in the client's own classes: broken and swollen batches take nothing with them."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchError, FetchResult, PartitionRecords
from aiokafka.errors import RecordTooLargeError
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from consumer.broker import inflate
from consumer.broker.fetched import POLL_BYTES, Fetched
from consumer.generation import Passed
from tests.faults.garbage import CODECS, HeaderKey

PARTITION = TopicPartition("t", 3)
ROOM = inflate.INFLATE_AT_MOST


def packed(offset: int, values: Sequence[bytes], *, codec: str | None = None, header: str | None = None) -> bytes:
    """A batch as it comes from a broker; `header` is the key of a header of the last record."""
    builder = _DefaultRecordBatchBuilderPy(2, CODECS.index(codec), False, -1, -1, 0, 2**30)
    for place, value in enumerate(values):
        headers = [(header, b"")] if header is not None and place == len(values) - 1 else []
        builder.append(place, 0, None, value, headers)
    content = bytearray(builder.build())
    content[:8] = offset.to_bytes(8, "big")
    return bytes(content)


def flipped(batch: bytes) -> bytes:
    """The same with another last byte."""
    return batch[:-1] + bytes([batch[-1] ^ 1])


class Client:
    """A fetcher that has fetched these batches, and fetches on where its position comes to be."""

    def __init__(self, *batches: bytes, highwater: int = 100) -> None:
        inflate.bound()
        self._records: dict[Any, Any] = {}
        self._batches = batches
        self._state = SimpleNamespace(paused=False, position=0, highwater=highwater)
        self._state.consumed_to = lambda offset: setattr(self._state, "position", offset)
        self._assignment = SimpleNamespace(active=True, state_value=lambda _: self._state)
        self._subscriptions = SimpleNamespace(subscription=SimpleNamespace(assignment=self._assignment))
        self.fetched = Fetched(self)

    @property
    def position(self) -> int:
        """Where the next fetch begins."""
        return int(self._state.position)

    def fetch(self) -> Any:
        """Fetch what begins at the position or behind it, whole batches."""
        left = [batch for batch in self._batches if _end(batch) > self.position]
        records = PartitionRecords(
            PARTITION, MemoryRecords(b"".join(left)), [], self.position, None, None, True, READ_COMMITTED
        )
        result = FetchResult(PARTITION, assignment=self._assignment, partition_records=records, backoff=0)
        self.fetched[PARTITION] = result
        return result

    def read(self) -> tuple[list[tuple[int, bytes | None]], list[Passed]]:
        """Fetch and take until all was read."""
        taken: list[tuple[int, bytes | None]] = []
        while self.position < _end(self._batches[-1]):
            result = self.fetch()
            while result.has_more():
                self.fetched.bytes_left = POLL_BYTES
                taken.extend((record.offset, record.value) for record in result.getall(2))
        return taken, self.fetched.passed


def _end(batch: bytes) -> int:
    return int.from_bytes(batch[:8], "big") + int.from_bytes(batch[23:27], "big") + 1


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("broken", "before", "error"),
    [
        (lambda codec: flipped(packed(3, [b"a", b"b", b"c"], codec=codec)), [], "CorruptRecordException"),
        (lambda codec: packed(3, [b"a", b"b", b"c"], codec=codec, header=HeaderKey("x")), [3, 4], None),
        (lambda codec: packed(3, [b"a", b"b", b" " * ROOM], codec=codec or "gzip"), [], "Swollen"),
    ],
)
def test_what_stands_beside_a_batch_that_cannot_be_read_is_handed_out_and_the_rest_of_it_named(
    broken: Callable[[str | None], bytes], before: list[int], error: str | None, codec: str | None
) -> None:
    batches = (packed(0, [b"x", b"y", b"z"]), broken(codec), packed(6, [b"p", b"q"], codec=codec))
    taken, passed = Client(*batches).read()
    assert [offset for offset, _ in taken] == [0, 1, 2, *before, 6, 7]
    [stub] = passed
    assert (stub.partition, stub.first, stub.last) == (("t", 3), 3 + len(before), 5)
    assert stub.too_large == (error == "Swollen")
    assert error in (None, stub.error)


@pytest.mark.parametrize("begin", range(8))
def test_reading_begins_in_the_middle_of_a_batch_and_goes_on_in_the_middle(begin: int) -> None:
    values = [b"%d" % offset for offset in range(8)]
    client = Client(packed(0, values[:5]), packed(5, values[5:]))
    client._state.position = begin
    taken, passed = client.read()
    assert taken == list(enumerate(values))[begin:]
    assert passed == []


def test_a_batch_gives_no_more_records_than_a_poll_may_hold() -> None:
    client = Client(packed(0, [b"x"] * 7), packed(7, [b"x"] * 7))
    result, sizes = client.fetch(), list[int]()
    while result.has_more():
        sizes.append(len(result.getall(4)))
    assert sizes == [4, 4, 4, 2]


def test_batches_of_old_brokers_are_read_too() -> None:
    builder = LegacyRecordBatchBuilder(1, CODECS.index("gzip"), 2**20)
    for offset, value in enumerate((b"a", b"b", b"c")):
        builder.append(offset, 0, None, value)
    client = Client(bytes(builder.build()))
    assert [(record.offset, record.value) for record in client.fetch().getall(9)] == [(0, b"a"), (1, b"b"), (2, b"c")]


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_that_takes_all_the_room_there_is_comes_out_whole(codec: str | None) -> None:
    value = b" " * (ROOM - 64)
    [(offset, found)], passed = Client(packed(0, [value], codec=codec)).read()
    assert (offset, found == value, passed) == (0, True, [])


def test_one_poll_hands_out_so_many_bytes_and_the_next_one_goes_on() -> None:
    size = POLL_BYTES // 3
    client = Client(*(packed(offset, [b" " * size], codec="zstd") for offset in range(8)))
    result, sizes = client.fetch(), list[int]()
    while result.has_more() and len(sizes) < 9:
        client.fetched.bytes_left = POLL_BYTES
        sizes.append(len(result.getall(500)))
        assert result.getall(500) == []
    assert sizes == [4, 4, 0]
    assert client.position == 8


def test_the_header_of_a_broken_batch_is_not_believed_beyond_the_end_of_its_partition() -> None:
    broken = bytearray(flipped(packed(0, [b"a"])))
    broken[23:27] = (10_000).to_bytes(4, "big")
    client = Client(bytes(broken), highwater=5)
    assert client.fetch().getall(10) == []
    [stub] = client.fetched.passed
    assert (stub.first, stub.last, client.position) == (0, 4, 5)


def test_what_the_client_itself_finds_too_large_is_named_where_it_stands() -> None:
    client = Client(packed(0, [b"x"]))
    client._state.position = 4
    client.fetched[PARTITION] = FetchError(error=RecordTooLargeError(), backoff=0)
    assert client.fetched.passed == [Passed(("t", 3), 4, 4, "RecordTooLargeError", too_large=True)]
    assert PARTITION not in client.fetched


def test_gzip_of_several_members_is_unpacked_whole_and_a_cut_one_is_not() -> None:
    import gzip

    assert inflate.gzip_decode(gzip.compress(b"a" * 9) + gzip.compress(b"b")) == b"a" * 9 + b"b"
    with pytest.raises(EOFError):
        inflate.gzip_decode(gzip.compress(b"a" * 9)[:-9])
    with pytest.raises(inflate.Swollen):
        inflate.gzip_decode(gzip.compress(b"a" * (ROOM // 2)) * 2 + gzip.compress(b"b"))
