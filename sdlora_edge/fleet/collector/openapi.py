"""The API's own description, in OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from ... import __version__
from ..report import SIZE_LIMIT
from .lookups import CONDITIONS

_JSON = "application/json"


def _answer(text: str, *, kind: str = _JSON) -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": {"type": "object"}}}}


def _parameter(
    name: str, text: str, schema: dict[str, Any], where: str = "query"
) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "description": text,
        "required": where == "path",
        "schema": schema,
    }


_TEXT: dict[str, Any] = {"type": "string"}
_FILTER = [
    _parameter("channel", "Only devices of this channel.", _TEXT),
    _parameter("group", "Only devices of this group.", _TEXT),
    _parameter("task", "Only devices that serve this task.", {"type": "integer"}),
]
_LIMIT = _parameter(
    "limit", "At most this many.", {"type": "integer", "minimum": 1, "maximum": 1000}
)
_REFUSED = {"401": {"description": "No token, or a wrong one."}}


def _get(text: str, answer: str, parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    responses = {"200": _answer(answer), **_REFUSED}
    return {"get": {"summary": text, "parameters": parameters or [], "responses": responses}}


def description() -> dict[str, Any]:
    """The whole document."""
    condition = _parameter(
        "condition", "Only devices in this condition.", {"type": "string", "enum": [*CONDITIONS]}
    )
    offset = _parameter("offset", "Skip this many.", {"type": "integer", "minimum": 0})
    device = _parameter("id", "Id of the device.", _TEXT, "path")
    health = _get("Whether the collector works.", "It does.")
    health["get"]["security"] = []
    health["get"]["responses"] = {
        "200": _answer("It does."),
        "503": {"description": "The database does not answer."},
    }
    one = _get("One device, with its newest report.", "The device.", [device])
    one["get"]["responses"]["404"] = {"description": "It is not enrolled."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sdlora-edge collector", "version": __version__},
        "security": [{"token": []}],
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/healthz": health,
            "/metrics": _get("Metrics, in the text format of Prometheus.", "Text."),
            "/v1/reports": {"post": _post()},
            "/v1/devices": _get(
                "Devices, by name.",
                "{devices, total}",
                [*_FILTER, condition, _LIMIT, offset],
            ),
            "/v1/devices/{id}": one,
            "/v1/channels": _get("Steps and waves of each channel's roll-out.", "{channels}"),
            "/v1/events": _get(
                "What happened, the newest first.",
                "{events}",
                [_FILTER[0], _parameter("device", "Only of this device.", _TEXT), _LIMIT],
            ),
        },
    }


def _post() -> dict[str, Any]:
    texts = {
        "400": "It is malformed.",
        "401": "It is not signed.",
        "403": "The device is not enrolled, or another key signed it.",
        "409": "A report with this number, or a later one, is known already.",
        "413": f"It has more than {SIZE_LIMIT} bytes.",
        "503": "The database does not answer: send it again later.",
    }
    return {
        "summary": "Take a sealed report. Its signature is its permission: no token is asked for.",
        "security": [],
        "requestBody": {
            "required": True,
            "content": {
                _JSON: {"schema": {"type": "object", "required": ["key", "report", "signature"]}}
            },
        },
        "responses": {
            "200": _answer("It is stored."),
            **{code: {"description": text} for code, text in texts.items()},
        },
    }
