"""Kafka: the source we read from, the publisher we write with. aiokafka has no types; its Any stays in this package."""

from consumer.broker.commands import (
    CREATE_TOPICS,
    Cluster,
    Group,
    Reader,
    Scan,
    TopicShape,
    create_topics,
    delete_topics,
    describe_topics,
)
from consumer.broker.link import Connection, TokenProvider, present, refusals, tls_context
from consumer.broker.publisher import ACKNOWLEDGED, NEW_TOPIC_S, Outgoing, Publisher, Sent
from consumer.broker.rights import Right, lacking_rights, needed_rights
from consumer.broker.source import Batch, Source

__all__ = [
    "ACKNOWLEDGED",
    "CREATE_TOPICS",
    "NEW_TOPIC_S",
    "Batch",
    "Cluster",
    "Connection",
    "Group",
    "Outgoing",
    "Publisher",
    "Reader",
    "Right",
    "Scan",
    "Sent",
    "Source",
    "TokenProvider",
    "TopicShape",
    "create_topics",
    "delete_topics",
    "describe_topics",
    "lacking_rights",
    "needed_rights",
    "present",
    "refusals",
    "tls_context",
]
