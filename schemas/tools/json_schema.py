"""pydantic models -> JSON Schema 2020-12, twice: closed for writers, open for readers.

A writer's schema says what may be sent: no unknown fields, only listed values, what is absent is left out. A reader's
says what must be taken: unknown fields, unknown values of a list. Every document that a writer's schema takes the
reader's takes too; `compatibility.py` shows it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel

from schemas.catalogue import CHANNELS, Channel
from schemas.events import NO_NUL, Envelope, Incoming

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
EXTENSION: Final = {"type": ["string", "integer", "boolean"], "pattern": NO_NUL}  # CloudEvents 1.0, its type system

Side = Literal["writer", "reader"]
Form = Literal["event", "data"]
Schema = dict[str, Any]  # Any: JSON Schema is as deep as it likes


def documents() -> Iterator[tuple[str, Schema]]:
    """File name and schema: for each event the whole of it (structured mode) and its data (a value in binary mode)."""
    for channel in CHANNELS:
        for form in ("event", "data"):
            for side in ("writer", "reader"):
                yield name_of(channel.type, form, side), schema_of(channel, form, side)


def name_of(event_type: str, form: Form, side: Side) -> str:
    """`<type>.<form>.<side>.json`."""
    return f"{event_type}.{form}.{side}.json"


def schema_of(channel: Channel, form: Form, side: Side) -> Schema:
    """A schema that stands alone."""
    model: type[BaseModel] = channel.model
    if form == "event":
        model = whole(channel)
    schema = shaped(model, side)
    if form == "event":
        _name_the_type(schema, channel, side)
    which = "the whole event, structured mode" if form == "event" else "the data, a record's value in binary mode"
    return {
        "$schema": DIALECT,
        "$id": f"urn:campaign-stats:{channel.type}:{form}:{side}",
        "title": f"{channel.type}: {which}; for {side}s",
        **schema,
    }


def whole(channel: Channel) -> type[BaseModel]:
    """The model of the whole event."""
    envelope: Any = Incoming if channel.is_read else Envelope  # Any: what it wraps is known at run time only
    model: type[BaseModel] = envelope[channel.model]
    return model


def shaped(model: type[BaseModel], side: Side) -> Schema:
    """The schema of a model for one side, without titles that only repeat names."""
    shape = _shape(model.model_json_schema(mode="validation"), side)
    shape.pop("title", None)
    return shape


def _name_the_type(schema: Schema, channel: Channel, side: Side) -> None:
    schema["properties"]["type"] = {"const": channel.type, "description": schema["properties"]["type"]["description"]}
    schema["description"] = f"{channel.summary} {channel.action}"
    if not channel.is_read:
        return
    schema["properties"]["data_base64"] = {"type": "null", "description": "Not read: put JSON into `data`."}
    if side == "reader":
        schema["additionalProperties"] = {"pattern": NO_NUL}
    else:
        del schema["properties"]["data_base64"]
        schema["patternProperties"] = {"^(?!data$)[a-z0-9]+$": EXTENSION}  # CloudEvents 1.0, naming of attributes


def _shape(node: Mapping[str, Any], side: Side) -> Schema:
    """One schema node and all below it."""
    shape: Schema = {}
    for key, value in node.items():
        if key == "properties":
            required = node.get("required", [])
            shape[key] = {name: _property(one, name in required, side) for name, one in value.items()}
        elif key == "$defs":
            shape[key] = {name: _titleless(_shape(one, side)) for name, one in value.items()}
        elif key == "anyOf":
            shape[key] = [_shape(one, side) for one in value]
        elif key == "additionalProperties" and isinstance(value, dict):
            shape[key] = _shape(value, side)
        elif key == "x-listed":
            shape["enum" if side == "writer" else key] = value
        elif key == "x-writer":
            shape |= value if side == "writer" else {}
        elif key != "default":
            shape[key] = value
    if shape.get("type") == "object" and "additionalProperties" not in shape:
        shape["additionalProperties"] = side == "reader"
    return shape


def _property(node: Mapping[str, Any], is_required: bool, side: Side) -> Schema:
    shape = _titleless(_shape(node, side))
    if side == "writer" and not is_required and {"type": "null"} in shape.get("anyOf", ()):
        [only] = [one for one in shape.pop("anyOf") if one != {"type": "null"}]  # absent, never null
        shape = {**only, **shape}
    return shape


def _titleless(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key != "title"}


def with_components(node: Any) -> Any:  # Any: JSON Schema is as deep as it likes
    """The same schema with its references as AsyncAPI and OpenAPI want them."""
    if isinstance(node, dict):
        return {
            key: value.replace("#/$defs/", "#/components/schemas/") if key == "$ref" else with_components(value)
            for key, value in node.items()
        }
    return [with_components(one) for one in node] if isinstance(node, list) else node
