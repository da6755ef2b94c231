"""What goes wrong, told in OpenAI's form."""

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
from raytune_llama.serve.http.timeouts import QueueTimeoutError, RequestTimeoutError
from raytune_llama.serve.protocol.chat import ErrorBody, ErrorResponse

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1
"""What a client that was refused for load is told to wait."""

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_MAX_PROBLEMS = 8
_MAX_MESSAGE_CHARACTERS = 2000


class ApiError(HTTPException):
    """A status with OpenAI's body."""

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
    """Return a refusal.

    Args:
        status: of HTTP.
        message: what is wrong; a client's own words in it are cut where they are long.
        param: the field at fault.
        code: OpenAI's name of what is wrong, where it has one.
        headers: beside those that the status asks for.
    """
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    retry = {"Retry-After": str(RETRY_SECONDS)} if status in {429, 503} else {}
    if len(message) > _MAX_MESSAGE_CHARACTERS:
        message = message[:_MAX_MESSAGE_CHARACTERS] + " ..."
    body = ErrorBody(message=message, type=kind, param=param, code=code)
    return ApiError(status, body, {**retry, **(headers or {})})


def build_error_response(refusal: ApiError) -> JSONResponse:
    """Return the answer that tells a refusal."""
    content = ErrorResponse(error=refusal.body).model_dump()
    return JSONResponse(content, refusal.status_code, headers=refusal.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Let whatever goes wrong be told in OpenAI's form."""

    def on(kind: type[Exception], make: Callable[[Any], ApiError]) -> None:
        async def handle(_: Request, error: Exception) -> JSONResponse:
            return build_error_response(make(error))

        app.add_exception_handler(kind, handle)

    on(RequestValidationError, _of_validation)
    on(HTTPException, _of_status)
    on(InvalidRequestError, lambda error: build_api_error(400, error.message, error.param))
    on(
        UnknownModelError,
        lambda error: build_api_error(404, error.message, error.param, "model_not_found"),
    )
    on(BusyError, lambda error: build_api_error(429, str(error), code="rate_limit_exceeded"))
    on(EngineError, lambda error: build_api_error(503, str(error)))
    on(QueueTimeoutError, lambda error: build_api_error(503, str(error), code="queue_timeout"))
    # Clients of OpenAI's ask again by themselves where this header does not stop them.
    once = {"X-Should-Retry": "false"}
    on(RequestTimeoutError, lambda error: build_api_error(504, str(error), None, "timeout", once))
    # Starlette raises it again, so that the server logs it.
    on(Exception, lambda _: build_api_error(500, "the server has failed; its log says why"))


def _of_validation(error: RequestValidationError) -> ApiError:
    problems = error.errors()[:_MAX_PROBLEMS]
    text = "; ".join(
        f"{_path(one) or 'body'}: {one['msg'].removeprefix('Value error, ')}" for one in problems
    )
    return build_api_error(400, text, _path(problems[0]) or None)


def _path(one: Mapping[str, Any]) -> str:
    """Return the field at fault, with dots."""
    return ".".join(str(part) for part in one["loc"] if part not in {"body", "path"})[:256]


def _of_status(error: HTTPException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    return build_api_error(error.status_code, error.detail, headers=error.headers)
