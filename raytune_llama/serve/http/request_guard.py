"""What stands before every route: keys, bounds, and an end to what nobody waits for.

Written as plain ASGI: FastAPI's own kind of middleware hides from a stream that its client has
gone.
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
"""Routes that need no key."""

_MAX_LENGTH_DIGITS = 18


class _StalledError(RuntimeError):
    """A client does not take what it is sent."""


class RequestGuardMiddleware:
    """Refuses requests without a key, too large or too slow; ends those whose client has gone."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: RequestLimits) -> None:
        self._app, self._keys, self._limits = app, keys, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A key is asked for before a body is waited for.
        found = self._refusal(scope) or await self._body(receive)
        match found:
            case None:
                logger.info("a client has gone before its request was whole")
            case ApiError():
                await build_error_response(found)(scope, receive, send)
            case _:
                await self._answer(scope, bytes(found), receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Return what is wrong with a request's first lines."""
        limits, headers = self._limits, Headers(scope=scope)
        num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if num_bytes > limits.header_bytes:
            close = {"Connection": "close"}
            message = f"a request has at most {limits.header_bytes} bytes of headers"
            return build_api_error(431, message, headers=close)
        name = self._name(headers)
        scope[KEY_NAME] = name or ANONYMOUS_KEY
        if scope["path"] not in PUBLIC_PATHS and self._keys.hashes and name is None:
            return build_api_error(401, "wanted Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return build_api_error(400, "Content-Length: wanted a number")
        if len(length) > _MAX_LENGTH_DIGITS or int(length) > limits.body_bytes:
            return self._too_large()
        return None

    def _name(self, headers: Headers) -> str | None:
        """Return the name of the key that a request came with; None: of none that is known."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        name = self._keys.find(key.strip())
        return name if scheme.lower() == "bearer" else None

    def _too_large(self) -> ApiError:
        return build_api_error(413, f"a request has at most {self._limits.body_bytes} bytes")

    async def _body(self, receive: Receive) -> bytearray | ApiError | None:
        """Return a request's body, or what is wrong with it; None: its client has gone."""
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
            text = f"the request was not whole in {seconds:g} s"
            return build_api_error(408, text, headers={"Connection": "close"})

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let a request be answered for as long as its client is there and reads."""
        exchange = _Exchange(body, receive, send, self._limits.send_seconds)
        answering = asyncio.ensure_future(self._app(scope, exchange.tell, exchange.send))
        watching = asyncio.create_task(exchange.watch())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            # Behind a whole answer servers say that the client has gone; the route may tidy up.
            if not exchange.is_whole:
                answering.cancel()
            await asyncio.wait({answering})
        finally:
            watching.cancel()
            answering.cancel()
            await asyncio.gather(watching, answering, return_exceptions=True)
        if answering.cancelled():
            return
        try:
            answering.result()
        except _StalledError as error:
            logger.warning("%s; its answer was ended", error)


class _Exchange:
    """A whole request and its answer, as a route sees them."""

    def __init__(self, body: bytes, receive: Receive, send: Send, send_seconds: float) -> None:
        self._body, self._receive, self._send = body, receive, send
        self._send_seconds = send_seconds
        self._is_told, self._gone = False, asyncio.Event()
        self.is_whole = False
        """Whether the last of the answer is sent."""

    async def tell(self) -> Message:
        """Return the body; later, that the client has gone."""
        if not self._is_told:
            self._is_told = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def watch(self) -> None:
        """Return when the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()

    async def send(self, message: Message) -> None:
        """Send a piece of the answer.

        Raises:
            _StalledError: the client does not take it.
        """
        try:
            async with asyncio.timeout(self._send_seconds):
                await self._send(message)
        except TimeoutError as error:
            raise _StalledError(f"a client read nothing for {self._send_seconds:g} s") from error
        is_body = message["type"] == "http.response.body"
        self.is_whole = is_body and not message.get("more_body", False)
