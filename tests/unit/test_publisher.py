"""A producer that is given up: nothing of it is left, and nothing of it is sent later."""

import asyncio
import gc
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError

from consumer.broker import Connection, Outgoing, Publisher, publisher


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("connecting", [False, True], ids=["silent", "connecting"])
async def test_a_producer_that_is_given_up_leaves_no_task_sends_nothing_and_hides_no_error(
    nodes: int, connecting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    monkeypatch.setattr(publisher, "SEND_DEADLINE_S", 0.3)
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", acks="all", enable_idempotence=True)
    producer._txn_manager.set_pid_and_epoch(7, 0)
    closed, sent = asyncio.Event(), []

    async def send(node: int, request: object, *, group: object = None) -> object:
        if connecting:  # closing the client does not end this
            await asyncio.sleep(0.8)
            sent.append(node)
        await closed.wait()
        raise KafkaConnectionError

    async def close() -> None:
        closed.set()

    async def partitions(_: str) -> set[int]:
        return set(range(6))

    client = producer.client
    monkeypatch.setattr(client, "send", send)
    monkeypatch.setattr(client, "close", close)
    monkeypatch.setattr(client, "force_metadata_update", loop.create_future)
    monkeypatch.setattr(client, "_maybe_wait_metadata", loop.create_future)
    monkeypatch.setattr(client, "_wait_on_metadata", partitions)
    monkeypatch.setattr(client.cluster, "leader_for_partition", lambda partition: partition.partition % nodes)
    monkeypatch.setattr(client.cluster, "partitions_for_topic", lambda _: set(range(6)))
    ours = Publisher(Connection("127.0.0.1:1", {}), idempotence=True)
    ours._producer, ours._requests = producer, publisher._Requests(producer._sender)
    await producer._sender.start()
    before = asyncio.all_tasks()
    results = await ours.publish([Outgoing("t", str(number).encode(), b"v" * 100_000) for number in range(30)])
    assert all(result.error is not None for result in results)
    for _ in range(5):
        await asyncio.sleep(0)
    left = {task.get_coro().__qualname__ for task in asyncio.all_tasks() - before}  # type: ignore[union-attr]
    assert not [name for name in left if "Sender" in name or "Accumulator" in name]
    assert producer._sender.sender_task.done()
    del producer, ours, results
    await asyncio.sleep(0.9)  # longer than the connection takes
    gc.collect()
    assert sent == []
    assert told == []
