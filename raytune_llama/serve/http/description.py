"""The OpenAPI document: what every route may answer, as it is."""

from typing import Any

from fastapi import FastAPI

from raytune_llama.serve.http.request_guard import PUBLIC_PATHS
from raytune_llama.serve.protocol.chat import ErrorResponse

_MEANINGS = {
    400: "The request is not one, or can't be answered",
    401: "No key, or none that is let in",
    404: "No such model",
    408: "The request did not arrive in time",
    413: "The request is too large",
    429: "As many requests wait as may; try again later",
    431: "The request has too many headers",
    503: "The model can't answer now; try again later",
    504: "The answer was not whole in time",
}

READ_ERROR_STATUSES = (400, 401, 431)
"""Statuses of routes that ask nothing of a model."""

MODEL_ERROR_STATUSES = (*READ_ERROR_STATUSES, 404, 408, 413, 429, 503, 504)
"""Statuses of routes that let a model answer."""


def describe_error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what FastAPI's `responses` are for a route that may refuse with these statuses."""
    return {
        status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses
    }


STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` events, one a chunk",
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
"""What a route that streams answers beside JSON; the schema is that of an event."""


class DescribedApp(FastAPI):
    """An application whose document says what it does, where FastAPI's says what is usual."""

    needs_keys: bool = False
    """Whether routes but the open ones ask for a key."""

    def openapi(self) -> dict[str, Any]:
        """Return the document."""
        if self.openapi_schema is None:
            document = super().openapi()
            operations = [
                (path, operation)
                for path, methods in document["paths"].items()
                for operation in methods.values()
            ]
            for path, operation in operations:
                # FastAPI's status of a request that does not fit; here it is 400.
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
