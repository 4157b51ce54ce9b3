"""The sync-stats door as an OpenAPI 3.1 document, with every error it has."""

from typing import Final

from schemas import door
from schemas.events import CAMPAIGN_ID_PATTERN
from schemas.tools.json_schema import DIALECT, Schema, shaped, with_components

HEADERS: Final[dict[str, Schema]] = {
    "WWW-Authenticate": {"description": "Always `Bearer`.", "schema": {"type": "string", "const": "Bearer"}},
    "Allow": {"description": "Always `POST`.", "schema": {"type": "string", "const": "POST"}},
    "Retry-After": {
        "description": "Seconds to wait, a whole number of at least 1.",
        "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"},
    },
}


def document(version: str) -> Schema:
    """The whole document. `version`: of the release, which is that of the contract."""
    schemas: dict[str, Schema] = {}
    for model in (door.SyncStatsAnswer, door.DoorError):
        shape = shaped(model, "reader")  # clients must take fields that are added
        schemas |= {name: with_components(one) for name, one in shape.pop("$defs", {}).items()}
        schemas[model.__name__] = with_components(shape)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "campaign-stats: the sync-stats door",
            "version": version,
            "description": "Recounts one campaign from its prospects while the caller waits, runs the bounce guard on "
            "it and answers with the row. Open only when the operators configured tokens. Fields may be added: ignore "
            "those you do not know. Calls made at once for one campaign share a recount. A repeated call does no harm.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "jsonSchemaDialect": DIALECT,
        "servers": [{"url": "http://127.0.0.1:8081", "description": "Default; put TLS in front of it."}],
        "security": [{"token": []}],
        "paths": {
            door.PATH: {
                "post": {
                    "operationId": "syncStats",
                    "summary": "Recount a campaign and answer with it",
                    "description": "The numbers are those of the rows at some moment after the call came in.",
                    "parameters": [
                        {
                            "name": "id",
                            "in": "path",
                            "required": True,
                            "description": "The campaign's id, upper or lower case.",
                            "schema": {"type": "string", "pattern": rf"^{CAMPAIGN_ID_PATTERN}$"},
                            "example": str(door.EXAMPLE.campaign.id),
                        }
                    ],
                    "responses": {"200": _answer(), **{str(one.status): _refusal(one) for one in door.REFUSALS}},
                }
            }
        },
        "components": {
            "schemas": schemas,
            "headers": HEADERS,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token speaks for one user, whose campaigns alone it sees, or for all.",
                }
            },
        },
    }


def _answer() -> Schema:
    example = door.EXAMPLE.model_dump(mode="json", exclude_unset=True)
    return {
        "description": "The campaign just recounted, as after the guard.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/SyncStatsAnswer"}, "example": example}
        },
    }


def _refusal(refusal: door.Refusal) -> Schema:
    answer: Schema = {
        "description": f"{refusal.when} {refusal.action}",
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/DoorError"},
                "examples": {
                    f"{refusal.status}-{number}": {"value": {"error": sentence}}
                    for number, sentence in enumerate(refusal.sentences, 1)
                },
            }
        },
    }
    if refusal.header:
        answer["headers"] = {refusal.header: {"$ref": f"#/components/headers/{refusal.header}"}}
    return answer
