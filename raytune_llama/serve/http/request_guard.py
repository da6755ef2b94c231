"""Checks before every route: API keys and request limits; cancels requests of gone clients.

Plain ASGI: FastAPI's own kind of middleware hides from a stream that its client has disconnected.
"""

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.http.keys import ApiKeys
from raytune_llama.serve.http.rate_limit import ANONYMOUS_KEY, KEY_NAME
from raytune_llama.serve.http.refusals import ApiError, build_api_error, build_error_response

logger = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/", "/health"})
"""Routes that need no API key."""

_MAX_LENGTH_DIGITS = 18


class _StalledError(RuntimeError):
    """A client does not read its response."""


class RequestGuardMiddleware:
    """Rejects requests without a key, too large or too slow; cancels those of gone clients."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: RequestLimits) -> None:
        self._app, self._keys, self._limits = app, keys, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or respond with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
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
        if scope["path"] not in PUBLIC_PATHS and self._keys.hashes and name is None:
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
