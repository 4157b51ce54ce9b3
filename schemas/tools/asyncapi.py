"""The catalogue as an AsyncAPI 3 document: channels, operations, keys, headers, both content modes, promises.

Payloads are the schemas that the neighbour needs: a writer's for what the service reads, a reader's for what it writes.
"""

from typing import Any, Final

from schemas.catalogue import CHANNELS, DEAD_LETTER_HEADERS, DEAD_LETTER_RETENTION, Channel
from schemas.events import LOWER_ID_PATTERN, NO_NUL, DeadLetterReason
from schemas.tools import examples
from schemas.tools.json_schema import Schema, Side, schema_of, with_components
from schemas.topics import DEAD_LETTERS

BINDING: Final = "0.5.0"
STRUCTURED: Final = "application/cloudevents+json"
DEAD_LETTER_RETENTION_MS: Final = 7 * 24 * 3600 * 1000
SECURITY: Final[dict[str, Schema]] = {
    "plain": {"type": "plain", "description": "SASL/PLAIN, over TLS only."},
    "scram256": {"type": "scramSha256", "description": "SASL/SCRAM-SHA-256."},
    "scram512": {"type": "scramSha512", "description": "SASL/SCRAM-SHA-512."},
    "oauth": {
        "type": "oauth2",
        "description": "SASL/OAUTHBEARER with a token of your identity provider.",
        "flows": {
            "clientCredentials": {
                "tokenUrl": "https://identity.example.com/token",
                "availableScopes": {"kafka": "Whatever your broker's ACLs ask for."},
            }
        },
    },
    "certificate": {"type": "X509", "description": "Mutual TLS with a client certificate."},
}
RIGHTS: Final = (
    "Rights (ACLs) you need: Read on a topic and on your own group to subscribe; Write on a topic to publish. Nobody "
    "but the service needs Write on what it publishes, and only its operators Read on the dead letters."
)


def document(version: str) -> Schema:
    """The whole document. `version`: of the release, which is that of the contract."""
    schemas: dict[str, Schema] = {}
    messages: dict[str, Schema] = {}
    channels: dict[str, Schema] = {}
    operations: dict[str, Schema] = {}
    for channel in CHANNELS:
        modes = ("structured", "binary") if channel.is_read else ("structured",)
        names = {mode: f"{channel.type}.{mode}" for mode in modes}
        for mode, name in names.items():
            messages[name] = _message(channel, mode, schemas)
        key = channel.type
        channels[key] = {
            "address": channel.topic,
            "title": channel.summary.partition(":")[0].rstrip("."),
            "description": _promises(channel),
            "messages": {mode: {"$ref": f"#/components/messages/{name}"} for mode, name in names.items()},
            "bindings": {"kafka": _topic(channel.topic)},
        }
        operations[("receive." if channel.is_read else "send.") + key] = {
            "action": "receive" if channel.is_read else "send",
            "title": ("The service reads " if channel.is_read else "The service publishes ") + key,
            "description": ("You: " if channel.is_read else "You, who subscribe: ") + channel.action,
            "channel": {"$ref": f"#/channels/{key}"},
            "messages": [{"$ref": f"#/channels/{key}/messages/{mode}"} for mode in modes],
            **({"bindings": {"kafka": _group()}} if channel.is_read else {}),
        }
    _dead_letters(messages, channels, operations)
    _changes(messages, channels, operations)
    return {
        "asyncapi": "3.0.0",
        "id": "urn:campaign-stats",
        "info": {
            "title": "campaign-stats",
            "version": version,
            "description": "Keeps campaign statistics true and stops campaigns whose mail bounces. CloudEvents 1.0 on "
            "Kafka; the key of every record is the campaign's id in lower case. At least once in both directions, one "
            f"stable id per fact. Topic names may have an installation's prefix before them.\n\n{RIGHTS}",
            "license": {"name": "MIT"},
        },
        "defaultContentType": STRUCTURED,
        "servers": {
            "kafka": {
                "host": "{bootstrap}",
                "protocol": "kafka-secure",
                "description": "Your Kafka cluster; `kafka` without TLS only inside a machine.",
                "variables": {"bootstrap": {"default": "kafka.example.com:9093", "description": "Its brokers."}},
                "security": [{"$ref": f"#/components/securitySchemes/{name}"} for name in SECURITY],
            }
        },
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": schemas, "securitySchemes": dict(SECURITY)},
    }


def _message(channel: Channel, mode: str, schemas: dict[str, Schema]) -> Schema:
    side: Side = "writer" if channel.is_read else "reader"
    schema = schema_of(channel, "event" if mode == "structured" else "data", side)
    name = f"{channel.type}.{'event' if mode == 'structured' else 'data'}"
    for defined, one in schema.pop("$defs", {}).items():
        schemas[defined] = with_components(one)
    schemas[name] = with_components({key: value for key, value in schema.items() if key not in ("$schema", "$id")})
    kept = examples.parsed(channel.type)
    return {
        "name": channel.type,
        "title": f"{channel.type}, {mode} mode",
        "summary": channel.summary,
        "contentType": STRUCTURED if mode == "structured" else "application/json",
        "headers": _headers(channel.type, mode),
        "payload": {"$ref": f"#/components/schemas/{name}"},
        "correlationId": {
            "description": "Travels from a hint or request to everything that follows from it.",
            "location": f"$message.{'payload#/correlationid' if mode == 'structured' else 'header#/ce_correlationid'}",
        },
        "bindings": {"kafka": {"key": _key(channel), "bindingVersion": BINDING}},
        "examples": [_example(one, event, mode) for one, event in kept.items()],
    }


def _example(name: str, event: dict[str, Any], mode: str) -> Schema:
    summary = name.replace("-", " ")
    if mode == "structured":
        return {"name": name, "summary": summary, "headers": {"content-type": STRUCTURED}, "payload": event}
    headers = {f"ce_{key}": value for key, value in event.items() if key not in ("data", "datacontenttype")}
    return {
        "name": name,
        "summary": summary,
        "headers": {"content-type": "application/json", **headers},
        "payload": event["data"],
    }


def _headers(event_type: str, mode: str) -> Schema:
    if mode == "structured":
        return {
            "type": "object",
            "properties": {"content-type": {"type": "string", "const": STRUCTURED}},
            "description": "No `ce_` headers: a record that has them is taken as binary mode.",
        }
    text = {"type": "string", "pattern": NO_NUL, "minLength": 1}
    return {
        "type": "object",
        "description": "The attributes as UTF-8 text, named with `ce_` before; of two with one name the last counts.",
        "required": ["ce_specversion", "ce_id", "ce_source", "ce_type"],
        "properties": {
            "content-type": {"type": "string", "const": "application/json"},
            "ce_specversion": {"type": "string", "const": "1.0"},
            "ce_id": text,
            "ce_source": text,
            "ce_type": {"type": "string", "const": event_type},
            "ce_time": {"type": "string", "format": "date-time"},
            "ce_subject": {"type": "string"},
            "ce_correlationid": text,
            "ce_traceparent": {"type": "string"},
        },
    }


def _promises(channel: Channel) -> str:
    lines = [channel.summary, "", "Promised:", *(f"- {one}" for one in channel.promises)]
    return "\n".join([*lines, "", f"Order: {channel.ordering}", "", f"Kept: {channel.retention}"])


def _key(channel: Channel) -> Schema:
    if channel.is_read:
        said = "The campaign's id in lower case is right; `data.campaign_id` decides, and any other key is read too."
        return {"type": "string", "description": said}
    return {"type": "string", "pattern": LOWER_ID_PATTERN, "description": "The campaign's id in lower case."}


def _topic(name: str, retention_ms: int | None = None) -> Schema:
    kept = {} if retention_ms is None else {"retention.ms": retention_ms}
    return {
        "topic": name,
        "partitions": 12,
        "replicas": 3,
        "topicConfiguration": {"cleanup.policy": ["delete"], **kept},
        "bindingVersion": BINDING,
    }


def _group() -> Schema:
    description = "The service's consumer group, with the installation's prefix before it."
    return {"groupId": {"type": "string", "description": description}, "bindingVersion": BINDING}


def _dead_letters(messages: dict[str, Schema], channels: dict[str, Schema], operations: dict[str, Schema]) -> None:
    reasons = "\n".join(f"- `{reason}`: {reason.meaning}" for reason in DeadLetterReason)
    messages["dead_letter"] = {
        "name": "dead_letter",
        "title": "A record that could not be read",
        "contentType": "application/octet-stream",
        "headers": {
            "type": "object",
            "description": "The record's own headers, then these; all text.",
            "required": list(DEAD_LETTER_HEADERS),
            "properties": {
                name: {
                    "type": "string",
                    "description": text,
                    **({"x-listed": [str(reason) for reason in DeadLetterReason]} if name.endswith("reason") else {}),
                }
                for name, text in DEAD_LETTER_HEADERS.items()
            },
        },
        "payload": {"description": "The original value, byte for byte; null for `unreadable` and `too_large`."},
        "bindings": {
            "kafka": {"key": {"description": "The record's own, whatever it was."}, "bindingVersion": BINDING}
        },
        "examples": [
            {
                "name": "no-campaign-id",
                "summary": "a hint without campaign_id",
                "headers": {
                    "dead-letter-topic": "prospect.status-changed",
                    "dead-letter-partition": "3",
                    "dead-letter-offset": "1842",
                    "dead-letter-reason": "invalid_campaign_id",
                    "dead-letter-error": "$.data.campaign_id: expected an RFC 9562 UUID (8-4-4-4-12 hex); "
                    "send the campaign's id",
                    "dead-letter-time": "2026-04-22T11:30:00.250000Z",
                },
            }
        ],
    }
    channels["dead_letters"] = {
        "address": DEAD_LETTERS,
        "title": "What could not be read",
        "description": "Original key, value and headers of every record that can never be read, for operators: "
        f"`campaign-stats dead-letters list|show|redrive`.\n\nReasons, the first that applies:\n{reasons}\n\n"
        f"Kept: {DEAD_LETTER_RETENTION}",
        "messages": {"dead_letter": {"$ref": "#/components/messages/dead_letter"}},
        "bindings": {"kafka": _topic(DEAD_LETTERS, DEAD_LETTER_RETENTION_MS)},
    }
    operations["send.dead_letters"] = {
        "action": "send",
        "title": "The service sets aside",
        "channel": {"$ref": "#/channels/dead_letters"},
        "messages": [{"$ref": "#/channels/dead_letters/messages/dead_letter"}],
    }


def _changes(messages: dict[str, Schema], channels: dict[str, Schema], operations: dict[str, Schema]) -> None:
    row = {
        "type": ["object", "null"],
        "properties": {"campaign_id": {"type": "string", "format": "uuid"}},
        "description": "The row; only `campaign_id` is looked at.",
    }
    messages["change_record"] = {
        "name": "change_record",
        "title": "A change record of campaign_prospects, as Debezium writes it",
        "contentType": "application/json",
        "payload": {
            "type": ["object", "string", "null"],
            "description": "With or without the {schema, payload} wrapper, as an envelope, flattened to the row, as a "
            "CloudEvent, or the outbox event router's payload, also as JSON within a string; null is a tombstone.",
            "properties": {
                "op": {"type": "string", "description": "c, u, d, r; t and m are ignored."},
                "before": row,
                "after": row,
                "source": {"type": "object", "properties": {"table": {"type": "string"}, "schema": {"type": "string"}}},
            },
        },
        "bindings": {"kafka": {"key": {"description": "Not looked at."}, "bindingVersion": BINDING}},
        "examples": [
            {"name": name, "summary": name.replace("-", " "), "payload": record}
            for name, record in examples.change_records().items()
        ],
    }
    channels["change_records"] = {
        "address": None,
        "title": "Change records read as hints",
        "description": "For a product without events of its own: the topic named by CAMPAIGN_STATS_CDC_TOPIC, which a "
        "connector writes. Whatever changed, its campaign is recounted. Deletes need REPLICA IDENTITY FULL.",
        "messages": {"change_record": {"$ref": "#/components/messages/change_record"}},
    }
    operations["receive.change_records"] = {
        "action": "receive",
        "title": "The service reads change records",
        "channel": {"$ref": "#/channels/change_records"},
        "messages": [{"$ref": "#/channels/change_records/messages/change_record"}],
        "bindings": {"kafka": _group()},
    }
