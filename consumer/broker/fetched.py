"""What fetches brought, handed out so that neither broken nor swollen bytes harm what stands beside them.

aiokafka by itself forgets everything of a poll when one batch in it is broken, does not say which, and limits a poll by
records only, however large they are. This takes the place of the dictionary in which it keeps what it has fetched.
"""

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any, Final
from weakref import ref

from aiokafka.errors import RecordTooLargeError

from consumer.broker.inflate import Swollen
from consumer.generation import Passed

POLL_BYTES: Final = 16 * 2**20  # of records that one poll hands out; one more run of a batch may be larger


class Fetched(OrderedDict[Any, Any]):
    """Per partition what a fetch brought: the client's FetchResult or FetchError.

    `passed` collects what cannot be handed out; the next fetch goes on behind it. The caller empties it, and sets
    `bytes_left` before each poll.
    """

    def __init__(self, fetcher: Any) -> None:
        super().__init__()
        self._subscriptions = fetcher._subscriptions
        self.passed: list[Passed] = []
        self.bytes_left = POLL_BYTES
        self.update(fetcher._records)
        fetcher._records = self

    def __setitem__(self, partition: Any, result: Any) -> None:
        """Keep a result that will be handed out our way."""
        if hasattr(result, "getall"):
            records = result._partition_records
            records._records = _Batches(records._records)
            records._consumer_record = _as_it_is
            # Through a weak reference: in a cycle the fetched megabyte would stay until the next garbage collection.
            result.getall = partial(self._take, partition, ref(result))
        elif isinstance(result._error, RecordTooLargeError):  # a cut batch; the client goes on behind its first offset
            at = self._subscriptions.subscription.assignment.state_value(partition).position
            name, error = (partition.topic, partition.partition), type(result._error).__name__
            self.passed.append(Passed(name, at, at, error, too_large=True))
            return
        super().__setitem__(partition, result)

    def _take(self, partition: Any, fetched: Any, most: int) -> list[Any]:
        """Up to `most` records, in place of FetchResult.getall: also limited by bytes, and none is forgotten."""
        taken: list[Any] = []
        result = fetched()
        if self.bytes_left <= 0 or not result.has_more() or not result.check_assignment(partition):
            return taken
        records, left = result._partition_records, self.bytes_left
        batches, at = records._records, records.next_fetch_offset
        batches.most = most
        try:
            for run in records:
                if run[0].offset < at:  # a batch is fetched whole, wherever in it we begin
                    run = [record for record in run if record.offset >= at]
                at = records.next_fetch_offset
                taken += run
                left -= batches.size(run)
                batches.most = most - len(taken)
                if left <= 0 or not batches.most:
                    result._update_position()
                    self.bytes_left = left
                    return taken
            result._update_position()
        except Exception as error:  # checksum, compression, header key not UTF-8, ...: it only reads bytes
            self._pass_over(partition, result, records.next_fetch_offset, batches.last, error)
        result._partition_records, self.bytes_left = None, left
        return taken

    def _pass_over(self, partition: Any, result: Any, first: int, last: int, error: Exception) -> None:
        """The client cannot hand out the rest of this batch: wherever in it one begins, it reads the batch whole."""
        state = result._assignment.state_value(partition)
        last = max(first, min(last, state.highwater - 1))  # if the batch's own header is broken
        name, is_swollen = (partition.topic, partition.partition), isinstance(error, Swollen)
        self.passed.append(Passed(name, first, last, type(error).__name__, too_large=is_swollen))
        state.consumed_to(last + 1)


def _as_it_is(_: Any, run: Any) -> Any:
    """In place of PartitionRecords._consumer_record, which would copy every field of a record into another one."""
    return run


class _Run(list[Any]):
    """Records of a batch, one after the other. The client takes it for one record, the last of them."""

    __slots__ = ()

    @property
    def offset(self) -> int:
        """Where the last one stands."""
        return int(self[-1].offset)


class _Batches:
    """The batches of one fetch. `last`: the last offset of the one that was read last. `most`: records in a run."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.has_next = batches.has_next
        self.last = -1
        self.most = 1
        self._is_packed = False

    def next_batch(self) -> Any:
        """The next one."""
        batch = self._batches.next_batch()
        self.last = batch.next_offset - 1
        self._is_packed = getattr(batch, "compression_type", None) != 0  # batches of before 2017 do not tell
        return batch if batch.is_control_batch else _InRuns(batch, self)

    def size(self, run: list[Any]) -> int:
        """Bytes that `run` holds beyond those fetched: none if its batch came as it is, which saves 0.3 us a record."""
        if not self._is_packed:
            return 0
        size = sum([len(record.value or b"") + len(record.key or b"") for record in run])
        for headers in [record.headers for record in run if record.headers]:
            size += sum(len(name) + len(content or b"") for name, content in headers)
        return size


class _InRuns:
    """A batch whose records come in runs: the client's loop in Python then turns once for many of them."""

    def __init__(self, batch: Any, batches: _Batches) -> None:
        self._batch = batch
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        """All else that the client asks of a batch."""
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[_Run]:
        """Runs; raises what a broken record raises, behind a run of those before it."""
        records = chain(self._batch)
        while True:
            run = _Run()
            try:
                run.extend(islice(records, self._batches.most))  # keeps what it has when the next one raises
            except Exception:
                if run:
                    yield run
                raise
            if not run:
                return
            yield run
