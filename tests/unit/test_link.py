"""What the client's own way of sending overlooks."""

from typing import Any

import pytest
from aiokafka.client import ConnectionGroup
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    GroupLoadInProgressError,
    KafkaError,
    NotCoordinatorForGroupError,
    TopicAuthorizationFailedError,
)
from aiokafka.protocol.commit import (
    OffsetFetchRequest,
    OffsetFetchResponse_v1,
    OffsetFetchResponse_v2,
    OffsetFetchResponse_v3,
)
from aiokafka.structs import TopicPartition

from consumer.broker.link import be_impatient, reading_refused

PARTITIONS = [("prospect.status-changed", [(0, 42, "", 0)])]
REQUEST = OffsetFetchRequest("campaign-stats", [("prospect.status-changed", [0])])


class Client:
    """The edge to aiokafka: answers everything with `answer`."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[Any, Any, Any]] = []
        self._request_timeout_ms = 40_000
        self._conns: dict[Any, Any] = {}

    async def _get_conn(self, node_id: Any, **how: Any) -> None:
        return None

    async def ready(self, node_id: Any, *, group: Any) -> bool:
        return True

    async def send(self, node_id: Any, request: Any, *, group: Any = ConnectionGroup.DEFAULT) -> Any:
        self.asked.append((node_id, request, group))
        return self.answer


def answers(code: int, topics: Any) -> list[Any]:
    """In each version that has an error of the whole, as read from bytes."""
    return [
        OffsetFetchResponse_v2.decode(OffsetFetchResponse_v2(topics=topics, error_code=code).encode()),
        OffsetFetchResponse_v3.decode(
            OffsetFetchResponse_v3(throttle_time_ms=0, topics=topics, error_code=code).encode()
        ),
    ]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        *((answer, NotCoordinatorForGroupError) for answer in answers(16, [])),
        *((answer, GroupLoadInProgressError) for answer in answers(14, [])),
    ],
)
async def test_committed_offsets_that_a_broker_refuses_as_a_whole_are_an_error_to_try_again(
    answer: Any, error: type[KafkaError]
) -> None:
    client = Client(answer)
    be_impatient(client)
    with pytest.raises(error) as raised:
        await client.send(1, REQUEST, group=ConnectionGroup.COORDINATION)
    assert type(raised.value) is error
    assert raised.value.retriable  # else the client gives up instead of looking for the new coordinator
    assert client.asked == [(1, REQUEST, ConnectionGroup.COORDINATION)]


@pytest.mark.parametrize("answer", [*answers(0, PARTITIONS), OffsetFetchResponse_v1(topics=PARTITIONS), None])
async def test_an_answer_without_an_error_of_the_whole_is_handed_out_as_it_is(answer: Any) -> None:
    client = Client(answer)
    be_impatient(client)
    assert await client.send(1, REQUEST) is answer
    assert client.asked == [(1, REQUEST, ConnectionGroup.DEFAULT)]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (TopicAuthorizationFailedError("a.b"), "the user may not Read topic a.b"),
        (TopicAuthorizationFailedError(TopicPartition("a.b", 3)), "the user may not Read topic a.b"),
        (TopicAuthorizationFailedError({"b", "a"}), "the user may not Read topic a, b"),
        (TopicAuthorizationFailedError(), "TopicAuthorizationFailedError"),
        (GroupAuthorizationFailedError("g"), "the user may not Read group g"),
        (GroupAuthorizationFailedError("Unable to get coordinator id for g"), "the user may not Read group g"),
        (KafkaError("a.b"), "KafkaError"),
    ],
)
def test_a_lacking_right_is_named_in_whatever_form_the_client_hands_out_its_topic(error: KafkaError, why: str) -> None:
    assert reading_refused(error) == why
