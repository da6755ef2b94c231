"""The OpenAPI document, with the actual responses of every route."""

from typing import Any

from fastapi import FastAPI

from raytune_llama.serve.http.request_guard import PUBLIC_PATHS
from raytune_llama.serve.protocol.chat import ErrorResponse

_MEANINGS = {
    400: "Invalid request",
    401: "Missing or incorrect API key",
    404: "Model not found",
    408: "Timed out waiting for the request body",
    413: "Request body too large",
    429: "Rate limit exceeded, or too many queued requests; retry later",
    431: "Request headers too large",
    503: "Model overloaded or unavailable; retry later",
    504: "Request timed out",
}

READ_ERROR_STATUSES = (400, 401, 431)
"""Error statuses of routes that do not run a model."""

MODEL_ERROR_STATUSES = (*READ_ERROR_STATUSES, 404, 408, 413, 429, 503, 504)
"""Error statuses of routes that run a model."""


def describe_error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` argument for a route that may fail with these statuses."""
    return {
        status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses
    }


STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion; with `stream`, one server-sent event per chunk",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "properties": {"data": {"type": "string"}},
                    "required": ["data"],
                }
            }
        },
    }
}
"""Event-stream response of a route that can stream; the schema is that of one event."""


class DescribedApp(FastAPI):
    """A FastAPI application whose OpenAPI document lists its actual error statuses."""

    needs_keys: bool = False
    """Whether all routes except the public ones require an API key."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        if self.openapi_schema is None:
            document = super().openapi()
            operations = [
                (path, operation)
                for path, methods in document["paths"].items()
                for operation in methods.values()
            ]
            for path, operation in operations:
                # FastAPI's status for an invalid request; here it is 400.
                operation["responses"].pop("422", None)
                if self.needs_keys and path not in PUBLIC_PATHS:
                    operation["security"] = [{"key": []}]
            components = document.setdefault("components", {})
            for name in ("HTTPValidationError", "ValidationError"):
                components.get("schemas", {}).pop(name, None)
            if self.needs_keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            self.openapi_schema = document
        return self.openapi_schema
