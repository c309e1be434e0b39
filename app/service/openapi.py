"""The service's OpenAPI document: BentoML's own, amended.

BentoML knows neither the shapes, levels and labels of the datasets that are served at this moment, nor the statuses and
the form of our errors, nor the events of a stream.
"""

from http import HTTPStatus
from typing import Any

from app.service.settings import HEALTH_CHECKS

INFO = {
    "title": "PixelCNN",
    "version": "1",  # of the requests and answers
    "description": "Images completed, generated and scored by PixelCNN models: exact likelihoods, pixel by pixel.",
}
ERROR = {
    "type": "object",
    "title": "Error",
    "description": "What is wrong, in one sentence that says what to do.",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {"error": {"type": "string"}},
}
# Of a stream, the schema is that of each event; `data` is JSON on one line.
EVENT = {
    "type": "object",
    "title": "Event",
    "description": "rows: {start, rows}; result: as /complete answers; error: {error}.",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["rows", "result", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
HEALTH_ERRORS = {**dict.fromkeys(HEALTH_CHECKS, ()), "/readyz": (503,)}
ERRORS = {"get": (401, 500), "post": (400, 401, 404, 408, 413, 415, 429, 500, 504)}


def _error(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    retry = {"Retry-After": {"description": "seconds", "required": True, "schema": {"type": "integer"}}}
    error = {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}
    return {**error, "headers": retry} if status in (429, 503) else error


def _nested(shape: list[int], items: dict[str, Any]) -> dict[str, Any]:
    for length in reversed(shape):
        items = {"type": "array", "items": items, "minItems": length, "maxItems": length}
    return items


def _for_dataset(request: dict[str, Any], dataset: str, about: dict[str, Any]) -> dict[str, Any]:
    """Narrow a request's schema to one dataset: its champion's shape, levels and labels."""
    channels, *size = about["shape"]
    properties = {**request["properties"], "dataset": {"type": "string", "const": dataset}}
    label = {"type": "integer", "minimum": -1, "maximum": len(about["labels"]) - 1}
    properties["label"] = {**properties["label"], "anyOf": [label, {"type": "null"}]}
    if "image" in properties:
        # A level under a missing pixel is ignored, so any integer may stand there.
        known = {"type": "integer", "minimum": 0, "maximum": about["levels"] - 1}
        level = {"type": "integer"} if "observed" in properties else known
        png = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png", "minLength": 1}
        shape = size if channels == 1 else [*size, channels]
        properties["image"] = {**properties["image"], "oneOf": [_nested(shape, level), png]}
    if "observed" in properties:
        bit = {"type": "integer", "minimum": 0, "maximum": 1}
        properties["observed"] = {**properties["observed"], **_nested(size, bit)}
    return {**request, "title": f"{request['title']} of {dataset}", "properties": properties}


def amended(document: dict[str, Any], served: dict[str, Any]) -> dict[str, Any]:
    """Return BentoML's document, amended to how this service behaves and what it serves, as `GET /models` answers."""
    schemas = document["components"]["schemas"]
    for name in ("InvalidArgument", "NotFound", "InternalServerError", "TaskStatusResponse"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR
    for name, schema in schemas.items():
        schema.pop("root_input", None)  # BentoML's own mark
        # The plain schema remains where nothing is served: `oneOf` must not be empty.
        if name.endswith("Request") and served:
            schemas[name] = {"oneOf": [_for_dataset(schema, *one) for one in served.items()]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method == "post":
                content = operation["requestBody"]["content"]["application/json"]
                content["schema"] = {"$ref": f"#/components/schemas/{content['schema']['title']}"}
                operation["requestBody"]["required"] = True
            answer = operation["responses"]["200"]
            if "text/event-stream" in answer.get("content", {}):
                answer["content"]["text/event-stream"]["schema"] = EVENT
            errors = {str(status): _error(status) for status in HEALTH_ERRORS.get(path, ERRORS[method])}
            operation["responses"] = {"200": answer, **errors}
    # From 3.1 on the schemas are JSON Schema, as pydantic writes it.
    return {**document, "openapi": "3.1.0", "info": INFO}
