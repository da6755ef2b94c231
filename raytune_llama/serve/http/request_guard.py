"""What is accepted as a request: API keys, sizes, time limits and strict JSON.

`RequestGuardMiddleware` runs before every route, and cancels requests of gone clients. It is plain
ASGI: FastAPI's own kind of middleware hides from a stream that its client has disconnected.
"""

import asyncio
import json
import logging
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_llama.config.errors import UserError
from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.http.keys import AcceptedKeys
from raytune_llama.serve.http.metrics import ServeMetrics, route_path
from raytune_llama.serve.http.rate_limit import ANONYMOUS_KEY, KEY_NAME
from raytune_llama.serve.http.refusals import ApiError, build_api_error, build_error_response
from raytune_llama.serve.protocol.fields import RequestModel

logger = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/", "/health"})
"""Routes that need no API key."""

_MAX_LENGTH_DIGITS = 18

# Linear time on any input: an unterminated string extends to the end of the text.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_SHOWN_CHARACTERS = 64
_MAX_LOGGED_FIELDS = 100


def add_request_guard(app: FastAPI, keys: AcceptedKeys, limits: RequestLimits) -> None:
    """Add the guard to an application, and in front of it CORS, if other origins are allowed."""
    app.add_middleware(RequestGuardMiddleware, keys=keys, limits=limits)
    if limits.allow_origins:
        # The last one added is the first to see a request: CORS preflights come without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.allow_origins,
            allow_methods=["GET", "HEAD", "POST"],
            # OpenAI's client for browsers sends many of its own.
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Should-Retry"],
        )


class _StalledError(RuntimeError):
    """A client does not read its response."""


class RequestGuardMiddleware:
    """Rejects requests without a key, too large or too slow; cancels those of gone clients."""

    def __init__(self, app: ASGIApp, keys: AcceptedKeys, limits: RequestLimits) -> None:
        self._app, self._keys, self._limits = app, keys, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or respond with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _normalize(scope)
        # Check the key before waiting for the body.
        found = self._check_headers(scope) or await self._body(receive)
        match found:
            case None:
                logger.info("client disconnected before its request was complete")
            case ApiError():
                await build_error_response(found)(scope, receive, send)
            case _:
                await self._respond(scope, bytes(found), receive, send)

    def _check_headers(self, scope: Scope) -> ApiError | None:
        """Return the error of a request's path, headers or key, or None."""
        limits, headers = self._limits, Headers(scope=scope)
        num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if num_bytes > limits.header_bytes:
            close = {"Connection": "close"}
            message = f"Request headers exceed the maximum size of {limits.header_bytes} bytes"
            return build_api_error(431, message, headers=close)
        name = self._name(headers)
        scope[KEY_NAME] = name or ANONYMOUS_KEY
        if route_path(scope) not in PUBLIC_PATHS and self._keys.is_required and name is None:
            message = (
                "Missing or incorrect API key. Provide your API key in an Authorization header "
                "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            return build_api_error(401, message, code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return build_api_error(400, "Invalid Content-Length header, expected a number")
        if len(length) > _MAX_LENGTH_DIGITS or int(length) > limits.body_bytes:
            return self._too_large()
        return None

    def _name(self, headers: Headers) -> str | None:
        """Return the name of the request's API key; None if missing or not accepted."""
        if not self._keys.is_required:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        name = self._keys.find(key.strip())
        return name if scheme.lower() == "bearer" else None

    def _too_large(self) -> ApiError:
        message = f"Request body exceeds the maximum size of {self._limits.body_bytes} bytes"
        return build_api_error(413, message)

    async def _body(self, receive: Receive) -> bytearray | ApiError | None:
        """Return a request's body or its error; None if the client has disconnected."""
        body, seconds = bytearray(), self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._limits.body_bytes:
                        return self._too_large()
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            text = f"Timed out after {seconds:g} s waiting for the complete request body"
            return build_api_error(408, text, headers={"Connection": "close"})

    async def _respond(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application; cancel it if the client disconnects or does not read."""
        exchange = _Exchange(body, receive, send, self._limits.send_seconds)
        responding = asyncio.ensure_future(self._app(scope, exchange.receive, exchange.send))
        watching = asyncio.create_task(exchange.watch())
        try:
            await asyncio.wait({responding, watching}, return_when=asyncio.FIRST_COMPLETED)
            # Servers report a disconnect after a complete response too; the route may clean up.
            if not exchange.is_complete:
                responding.cancel()
            await asyncio.wait({responding})
        finally:
            watching.cancel()
            responding.cancel()
            await asyncio.gather(watching, responding, return_exceptions=True)
        if responding.cancelled():
            return
        try:
            responding.result()
        except _StalledError as error:
            logger.warning("%s; response aborted", error)


def _normalize(scope: Scope) -> Scope:
    """Return a request without slashes at the end of its path; HEAD as GET.

    The server sends no body in response to HEAD.
    """
    path, prefix = scope["path"], scope.get("root_path", "")
    trimmed = path.rstrip("/")
    if trimmed in {"", prefix}:
        trimmed = path
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": trimmed, "method": method}


class FieldPolicy:
    """What is done about fields of requests that nobody documents."""

    def __init__(self, metrics: ServeMetrics, *, is_strict: bool) -> None:
        """Start without known fields.

        Args:
            metrics: metrics to update.
            is_strict: whether such fields are refused.
        """
        self._metrics, self._is_strict = metrics, is_strict
        self._logged: set[str] = set()

    def check(self, request: RequestModel) -> None:
        """Count and log the ignored fields of a request, each name once.

        Raises:
            ApiError: status 400, there are some and they are refused.
        """
        for name in request.ignored_fields():
            shown = name[:_MAX_SHOWN_CHARACTERS]
            if self._is_strict:
                text = f"{shown}: unknown field; remove it, or set limits.strict_requests=false"
                raise build_api_error(400, text, shown, "unknown_parameter")
            self._metrics.ignored_fields.inc()
            if shown not in self._logged and len(self._logged) < _MAX_LOGGED_FIELDS:
                self._logged.add(shown)
                logger.warning("requests have the unknown field %r, which is ignored", shown)


class _Exchange:
    """A complete request and its response, as a route sees them."""

    def __init__(self, body: bytes, receive: Receive, send: Send, send_seconds: float) -> None:
        self._body, self._receive, self._send = body, receive, send
        self._send_seconds = send_seconds
        self._is_received, self._gone = False, asyncio.Event()
        self.is_complete = False
        """Whether the end of the response has been sent."""

    async def receive(self) -> Message:
        """Return the body; on later calls, wait for the client's disconnect."""
        if not self._is_received:
            self._is_received = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def watch(self) -> None:
        """Return when the client has disconnected."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()

    async def send(self, message: Message) -> None:
        """Send a part of the response.

        Raises:
            _StalledError: the client does not read it.
        """
        try:
            async with asyncio.timeout(self._send_seconds):
                await self._send(message)
        except TimeoutError as error:
            raise _StalledError(f"client read nothing for {self._send_seconds:g} s") from error
        is_body = message["type"] == "http.response.body"
        self.is_complete = is_body and not message.get("more_body", False)


def read_json(body: bytes, max_depth: int) -> Any:  # noqa: ANN401  # any JSON value
    """Parse a JSON body.

    Stricter than Python's parser, as RFC 8259 recommends: only UTF-8, no NaN or Infinity, no
    number beyond float64, no duplicate keys in an object, no lone surrogates.

    Args:
        body: JSON text, encoded.
        max_depth: maximum nesting of objects and arrays.

    Raises:
        ValueError: the body is not valid JSON under these rules.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"Invalid request body: not UTF-8 (invalid byte at position {error.start})"
        raise UserError(message) from error
    depth = measure_depth(body)
    if depth > max_depth:
        raise UserError(
            f"Invalid request body: JSON nested {depth} levels deep, maximum {max_depth}"
        )
    try:
        value = json.loads(
            text,
            parse_constant=_reject_constant,
            parse_float=_parse_finite_float,
            object_pairs_hook=_reject_duplicate_keys,
        )
    except json.JSONDecodeError as error:
        raise UserError(f"Could not parse the JSON body of the request: {error}") from error
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError("Invalid request body: lone surrogate in a string") from error
    return value


def measure_depth(body: bytes) -> int:
    """Return the maximum nesting depth of a JSON text, ignoring brackets inside strings."""
    brackets = np.frombuffer(_STRING.sub(b"", body).translate(None, _NO_BRACKETS), dtype=np.uint8)
    is_open = (brackets == ord("[")) | (brackets == ord("{"))
    depths = np.where(is_open, 1, -1).cumsum(dtype=np.int32)
    return int(depths.max(initial=0))


def _reject_constant(name: str) -> NoReturn:
    raise UserError(f"Invalid request body: {name} is not valid JSON")


def _parse_finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        shown = text[:_MAX_SHOWN_CHARACTERS]
        raise UserError(f"Invalid request body: number {shown} is too large for float64")
    return value


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in found if names.count(name) > 1)
        shown = duplicate[:_MAX_SHOWN_CHARACTERS]
        raise UserError(f"Invalid request body: duplicate key {shown!r} in an object")
    return found


def build_route_class(max_depth: int) -> type[APIRoute]:
    """Return a route class whose request bodies are parsed by `read_json`.

    Args:
        max_depth: maximum nesting of objects and arrays.
    """

    class StrictRequest(Request):
        """A request whose body is parsed by `read_json`."""

        async def json(self) -> Any:  # noqa: ANN401  # like Starlette's
            try:
                return read_json(await self.body(), max_depth)
            except ValueError as error:
                raise build_api_error(400, str(error)) from error

    class StrictRoute(APIRoute):
        """A route that requires a JSON body in UTF-8."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_strictly(request: Request) -> Response:
                if request.method == "POST":
                    _check_type(request)
                return await handle(StrictRequest(request.scope, request.receive))

            return handle_strictly

    return StrictRoute


def _check_type(request: Request) -> None:
    """Reject a Content-Type other than JSON in UTF-8.

    Raises:
        ApiError: status 400.
    """
    got = request.headers.get("content-type", "")
    kind, _, rest = got.lower().partition(";")
    charset = rest.partition("charset=")[2].strip(' "')
    if kind.strip() != "application/json" or charset not in {"", "utf-8", "utf8"}:
        raise _unsupported_content_type(got)


def _unsupported_content_type(got: str) -> ApiError:
    shown = repr(got[:_MAX_SHOWN_CHARACTERS]) if got else "none"
    message = f"Invalid Content-Type header ({shown}), expected application/json in UTF-8"
    return build_api_error(400, message, code="unsupported_content_type")
