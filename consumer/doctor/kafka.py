"""Checks of our topics; they change nothing."""

import json
import shlex
from collections.abc import Collection
from typing import Final

from consumer import broker
from consumer.broker import Cluster, TopicShape
from consumer.doctor.findings import AGAIN, Finding, a_warning, an_error
from consumer.errors import ConfigError, Unavailable
from consumer.settings import PREFIX, Settings
from schemas.topics import Topics

PARTITIONS: Final = 12  # as `topics --create` makes them
REPLICATION: Final = 3


async def examine_kafka(connection: broker.Connection, settings: Settings) -> list[tuple[str, list[Finding]]]:
    names = Topics(settings.topic_prefix)
    try:
        cdc = [settings.cdc_topic] if settings.cdc_topic else []
        cluster = await broker.describe_topics(connection, [*names.all, *cdc])
        rights = broker.needed_rights(names, settings.group, settings.cdc_topic)
        lacking = await broker.lacking_rights(connection, rights)
    except ConfigError as error:  # they refused us in between
        return [("kafka", [an_error(problem, "`run` does not start", AGAIN) for problem in error.problems])]
    except Unavailable as error:
        servers = shlex.quote(connection.bootstrap_servers)
        return [
            (
                "kafka",
                [
                    an_error(
                        f"cannot be asked ({error.detail})",
                        "`run` waits for it, alive but not ready: no hint is read, no event is published",
                        f"kafka-broker-api-versions.sh --bootstrap-server {servers}  # until it works: address,"
                        " firewall, TLS, user and password, is it running?",
                    )
                ],
            )
        ]
    secured = settings.kafka_security_protocol != "PLAINTEXT"
    tools = f"--bootstrap-server {shlex.quote(connection.bootstrap_servers)}" + (
        " --command-config client.properties" if secured else ""
    )
    hidden = {right.name for right in lacking if right.resource == "topic"}  # whether they are there nobody says
    unread = [
        an_error(
            f"topic {name} of change records is missing",
            "`run` does not start",
            f"unset {PREFIX}CDC_TOPIC  # or let the connector make it, it is not ours",
        )
        for name in cdc
        if name not in cluster.topics and name not in hidden
    ]
    forbidden = [an_error(right.problem, "`run` does not start", right.grant(connection)) for right in lacking]
    return [("kafka", unread), ("kafka rights", forbidden), *topic_findings(cluster, names, tools, hidden)]


def topic_findings(
    cluster: Cluster, names: Topics, tools: str, hidden: Collection[str] = ()
) -> list[tuple[str, list[Finding]]]:
    """What is wrong with our topics, but those `hidden` from us; `tools` are the options that Kafka's own tools need to
    reach the brokers.
    """
    present = {name: cluster.topics[name] for name in names.all if name in cluster.topics}
    replication = max(1, min(REPLICATION, len(cluster.brokers)))
    missing = [
        an_error(
            f"topic {name} is missing",
            "`run` does not start",
            f"campaign-stats topics --create --partitions {PARTITIONS} --replication {replication}",
        )
        for name in names.all
        if name not in present and name not in hidden
    ]
    partitions = [
        a_warning(
            f"topic {name} has one partition",
            "only one replica of the service can work on it, all others stand idle",
            f"kafka-topics.sh {tools} --alter --topic {name} --partitions {PARTITIONS}",
        )
        for name in names.read
        if name in present and present[name].partitions < 2
    ]
    lonely = {name: shape for name, shape in present.items() if shape.replication < 2}
    replicas = [
        a_warning(
            f"{'topic' if len(lonely) == 1 else 'topics'} {', '.join(lonely)}: partitions with one replica",
            "when that broker is away nothing is read or published there; when its disk is lost, so are the events",
            _reassignment(cluster, lonely, tools),
        )
    ]
    policies = [
        an_error(
            f"topic {name} has cleanup.policy={shape.cleanup_policy}",
            "compaction deletes all but the last record of a campaign, answers and pauses too, and refuses dead letters"
            " without a key",
            f"kafka-configs.sh {tools} --alter --entity-type topics --entity-name {name} --add-config"
            " cleanup.policy=delete",
        )
        for name, shape in present.items()
        if shape.cleanup_policy is not None and "compact" in shape.cleanup_policy
    ]
    policies += [
        a_warning(
            f"cleanup.policy of topic {name} may not be read",
            "nobody sees here whether it is `delete`, as it should be",
            f"kafka-configs.sh {tools} --describe --entity-type topics --entity-name {name}  # as one who may",
        )
        for name, shape in present.items()
        if shape.cleanup_policy is None
    ]
    return [
        ("topics", missing),
        ("partitions", partitions),
        ("replicas", replicas if lonely else []),
        ("cleanup policy", policies),
    ]


def _reassignment(cluster: Cluster, topics: dict[str, TopicShape], tools: str) -> str:
    """Shell lines that give each partition of `topics` more replicas, spread over the brokers there are."""
    again = f"{AGAIN}  # once the cluster has more than one broker: it then says how to move the topics"
    if len(cluster.brokers) < 2:
        return again
    moves = []
    for name, shape in topics.items():
        for partition, held in sorted(shape.replicas.items()):
            turn = partition % len(cluster.brokers)
            others = [one for one in cluster.brokers[turn:] + cluster.brokers[:turn] if one not in held]
            moves.append({"topic": name, "partition": partition, "replicas": [*held, *others][:REPLICATION]})
    plan = json.dumps({"version": 1, "partitions": moves}, separators=(",", ":"))
    return (
        f"echo {shlex.quote(plan)} > replicas.json\n"
        f"kafka-reassign-partitions.sh {tools} --reassignment-json-file replicas.json --execute"
    )
