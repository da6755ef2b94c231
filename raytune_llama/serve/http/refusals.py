"""Errors in OpenAI's format."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from raytune_llama.serve.errors import (
    BusyError,
    EngineError,
    InvalidRequestError,
    UnknownModelError,
)
from raytune_llama.serve.http.stream import QueueTimeoutError, RequestTimeoutError
from raytune_llama.serve.http.validation import describe_invalid_body
from raytune_llama.serve.protocol.chat import ErrorBody, ErrorResponse

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1
"""Default of the header Retry-After for 429 and 503, in seconds."""

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_MAX_MESSAGE_CHARACTERS = 2000


class ApiError(HTTPException):
    """HTTP error with OpenAI's error body."""

    def __init__(
        self, status: int, body: ErrorBody, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, body.message, headers)
        self.body = body


def build_api_error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> ApiError:
    """Return an error with OpenAI's body.

    Args:
        status: HTTP status.
        message: what is wrong; long messages, which may quote the client, are truncated.
        param: the invalid field.
        code: OpenAI's error code, if one applies.
        headers: additional headers; Retry-After is set for 429 and 503.
    """
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    retry = {"Retry-After": str(RETRY_SECONDS)} if status in {429, 503} else {}
    if len(message) > _MAX_MESSAGE_CHARACTERS:
        message = message[:_MAX_MESSAGE_CHARACTERS] + " ..."
    body = ErrorBody(message=message, type=kind, param=param, code=code)
    return ApiError(status, body, {**retry, **(headers or {})})


def build_error_response(error: ApiError) -> JSONResponse:
    """Return the HTTP response for an error."""
    content = ErrorResponse(error=error.body).model_dump()
    return JSONResponse(content, error.status_code, headers=error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Register handlers that return every error in OpenAI's format."""

    def on(kind: type[Exception], make: Callable[[Any], ApiError]) -> None:
        async def handle(_: Request, error: Exception) -> JSONResponse:
            return build_error_response(make(error))

        app.add_exception_handler(kind, handle)

    on(RequestValidationError, _from_validation_error)
    on(HTTPException, _from_http_exception)
    on(
        InvalidRequestError,
        lambda error: build_api_error(400, error.message, error.param, error.code),
    )
    on(
        UnknownModelError,
        lambda error: build_api_error(404, error.message, error.param, error.code),
    )
    on(BusyError, lambda error: build_api_error(429, str(error), code="rate_limit_exceeded"))
    on(EngineError, lambda error: build_api_error(503, str(error)))
    on(QueueTimeoutError, lambda error: build_api_error(503, str(error), code="queue_timeout"))
    # OpenAI's clients retry by themselves unless this header is set.
    no_retry = {"X-Should-Retry": "false"}
    on(
        RequestTimeoutError,
        lambda error: build_api_error(504, str(error), None, "timeout", no_retry),
    )
    # Starlette re-raises it, so that the server logs it.
    text = "The server had an error while processing your request"
    on(Exception, lambda _: build_api_error(500, text))


def _from_validation_error(error: RequestValidationError) -> ApiError:
    body = describe_invalid_body(error.errors())
    return build_api_error(400, body.message, body.param, body.code)


def _from_http_exception(error: HTTPException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    return build_api_error(error.status_code, error.detail, headers=error.headers)
