"""What Kafka must let us do: the list, and which of it the brokers do not grant."""

import asyncio
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IncompatibleBrokerVersion,
    KafkaError,
    TopicAuthorizationFailedError,
    for_code,
)
from aiokafka.protocol.admin import DescribeGroupsRequest_v3, DescribeGroupsResponse_v3
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Schema, String

from consumer.broker.link import CALL_DEADLINE_S, STOP_DEADLINE_S, Connection, close, refused_is_an_error
from consumer.errors import MAY_NOT, Unavailable
from schemas.topics import Topics

GROUP_DEADLINE_S: Final = 3.0  # a coordinator that is away holds up only those who join, not what needs no partitions
RETRY_S: Final = 0.2  # a broker's first question about groups creates the topic they are kept in
BIT: Final = {"Read": 3, "Write": 4}  # of the brokers' answer: the codes of Kafka's AclOperation
NOT_TOLD: Final = -(2**31)


@dataclass(frozen=True, slots=True)
class Right:
    """One operation on one topic or group, and what it is for. Kafka lets who has it see (Describe) the thing too."""

    operation: Literal["Read", "Write"]
    resource: Literal["topic", "group"]
    name: str
    why: str

    @property
    def problem(self) -> str:
        """What is wrong where it is lacking."""
        return f"Kafka: {MAY_NOT} {self.operation} {self.resource} {self.name} ({self.why})"

    def grant(self, connection: Connection) -> str:
        """The command that gives it, for those who may do everything; `client.properties` holds their login."""
        user = connection.security.get("sasl_plain_username")
        principal = shlex.quote(f"User:{user}") if user else '"User:$PRINCIPAL"'
        login = (
            "" if connection.security.get("security_protocol") == "PLAINTEXT" else " --command-config client.properties"
        )
        return (
            f"kafka-acls.sh --bootstrap-server {shlex.quote(connection.bootstrap_servers)}{login}"
            f" --add --allow-principal {principal} --operation {self.operation}"
            f" --{self.resource} {shlex.quote(self.name)}"
        )


def needed_rights(topics: Topics, group: str, cdc_topic: str | None = None) -> list[Right]:
    """All that `run` needs, and nothing more: no right on the cluster, none to make topics or to look at settings."""
    hints, requests = topics.read
    return [
        Right("Read", "topic", hints, "read hints"),
        Right("Read", "topic", requests, "read sync requests"),
        *([Right("Read", "topic", cdc_topic, "read change records")] if cdc_topic else []),
        Right("Read", "group", group, "join the group, commit offsets"),
        *(Right("Write", "topic", topic, "publish events") for topic in topics.written),
        Right("Write", "topic", topics.dead_letters, "keep what cannot be read"),
    ]


async def lacking_rights(connection: Connection, rights: Sequence[Right]) -> list[Right]:
    """Those the brokers do not grant us, in order. A topic that is missing counts as granted where it may be seen.

    Brokers that do not tell (older than Kafka 2.3, or without rights) lack nothing here. Makes no topic. Raises
    ConfigError when the brokers refuse us, Unavailable when they cannot be reached.
    """
    admin = AIOKafkaAdminClient(**connection.arguments())
    async with refused_is_an_error(connection):
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                await admin.start()
                topics = [right.name for right in rights if right.resource == "topic"]
                granted: dict[tuple[str, str], int | None] = {**await _of_topics(admin, topics)}
                for right in rights:
                    if right.resource == "group":
                        granted["group", right.name] = await _of_group(admin, right.name)
        except (KafkaError, OSError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while asking for our rights") from error
        finally:
            await close(admin, STOP_DEADLINE_S)
    return [right for right in rights if not _allows(granted.get((right.resource, right.name)), right)]


def _allows(operations: int | None, right: Right) -> bool:
    return operations is None or operations == NOT_TOLD or bool(operations >> BIT[right.operation] & 1)


async def _of_topics(admin: Any, topics: Sequence[str]) -> dict[tuple[str, str], int]:
    """What may be done to each, as bits; 0 for one that may not even be seen. Those that are missing are left out."""
    try:
        answer = await admin._send_request(_AskTopics(topics))
    except (IncompatibleBrokerVersion, NotImplementedError):  # the client's words for an older broker
        return {}
    codes = {TopicAuthorizationFailedError.errno: 0}
    return {
        ("topic", name): codes.get(code, operations)
        for code, name, _, _, operations in answer.topics
        if code in (0, *codes)
    }


async def _of_group(admin: Any, group: str) -> int | None:
    """The same for a group; None when nobody says, in a while: whoever joins then hears of it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(GROUP_DEADLINE_S):
            return await _told_by_coordinator(admin, group)
    return None


async def _told_by_coordinator(admin: Any, group: str) -> int | None:
    while True:
        try:
            coordinator = await admin.find_coordinator(group)
            answer = await admin._send_request(_AskGroup(group), coordinator)
            [[code, *_, operations]] = answer.groups
            if code:
                raise for_code(code)
        except GroupAuthorizationFailedError:
            return 0
        except (IncompatibleBrokerVersion, NotImplementedError):
            return None
        except KafkaError as error:
            if not error.retriable:
                raise
            await asyncio.sleep(RETRY_S)
        else:
            return int(operations)


async def unreadable(client: Any, topics: Sequence[str]) -> list[str]:
    """Those of the topics that we may not read, in order, as far as the brokers tell. Raises what the client raises."""
    try:
        answer = await client.send(client.get_random_node(), _AskTopics(topics))
    except (IncompatibleBrokerVersion, NotImplementedError):
        return []
    may_read = {
        name
        for code, name, *_, operations in answer.topics
        if code != TopicAuthorizationFailedError.errno and (operations == NOT_TOLD or operations >> BIT["Read"] & 1)
    }
    return [topic for topic in topics if topic not in may_read]


async def hidden_problems(client: Any, topics: Sequence[str]) -> dict[str, str]:
    """A sentence for each of the topics that the brokers hide from us: asked for all there are they leave it out, as if
    it were missing.

    Raises what the client raises.
    """
    if not topics:
        return {}
    try:
        answer = await client.send(client.get_random_node(), _AskTopics(topics))
    except (IncompatibleBrokerVersion, NotImplementedError):
        return {}
    return {
        name: f"Kafka: {MAY_NOT} see topic {name}: deploy/README.md says which right it takes"
        for code, name, *_ in answer.topics
        if code == TopicAuthorizationFailedError.errno
    }


class _TopicsAnswer(Response):  # type: ignore[misc]  # aiokafka has no types, and knows no version that tells rights
    API_KEY = 3
    API_VERSION = 8
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            Array(("node_id", Int32), ("host", String("utf-8")), ("port", Int32), ("rack", String("utf-8"))),
        ),
        ("cluster_id", String("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            Array(
                ("error_code", Int16),
                ("topic", String("utf-8")),
                ("is_internal", Boolean),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("isr", Array(Int32)),
                        ("offline_replicas", Array(Int32)),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
        ("cluster_authorized_operations", Int32),
    )


class _TopicsQuestion(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _TopicsAnswer
    SCHEMA = Schema(
        ("topics", Array(String("utf-8"))),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class _AskTopics(Request[_TopicsQuestion]):  # type: ignore[misc]
    API_KEY = 3

    def __init__(self, topics: Sequence[str]) -> None:
        self._topics = list(topics)

    def build(self, request_struct_class: type[_TopicsQuestion]) -> _TopicsQuestion:
        """For the one version there is."""
        return request_struct_class(self._topics, False, False, True)


class _GroupQuestion(DescribeGroupsRequest_v3):  # type: ignore[misc]  # whose answer the client reads as an older one
    RESPONSE_TYPE = DescribeGroupsResponse_v3


class _AskGroup(Request[_GroupQuestion]):  # type: ignore[misc]
    API_KEY = 15

    def __init__(self, group: str) -> None:
        self._group = group

    def build(self, request_struct_class: type[_GroupQuestion]) -> _GroupQuestion:
        """For the one version there is."""
        return request_struct_class([self._group], True)
