"""A model's stream on its way to the client: time limits, metrics and server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, Generic, Self, TypeVar

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import Send

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.errors import BusyError, EngineError, InvalidRequestError
from raytune_llama.serve.generation.output import Stream
from raytune_llama.serve.http.metrics import RequestOutcome, RequestRecorder

T = TypeVar("T")
V = TypeVar("V")

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class QueueTimeoutError(RuntimeError):
    """No token was generated in time; retry later."""


class RequestTimeoutError(RuntimeError):
    """A response was not complete in time."""


class ObservedStream(Generic[T]):
    """A model's stream that keeps the time limits of a request and records its metrics.

    async with await ObservedStream.open(model.respond(request), limits, recorder) as stream:
        async for delta in stream:
            ...
    """

    def __init__(self, limits: RequestLimits, recorder: RequestRecorder) -> None:
        self._limits, self._recorder = limits, recorder
        self._start = asyncio.get_running_loop().time()
        self._outcome: RequestOutcome = "gone"
        self._has_delta = False
        self._stream: Stream[T] | None = None
        self.num_prompt_tokens = 0
        """Number of tokens of the prompt, or of all input texts."""

    @classmethod
    async def open(
        cls, opening: Awaitable[Stream[T]], limits: RequestLimits, recorder: RequestRecorder
    ) -> Self:
        """Wait until the model has accepted a request.

        Args:
            opening: returns the model's stream.
            limits: time limits, from now on.
            recorder: records the request's metrics.

        Raises:
            QueueTimeoutError: it was not accepted within `queue_seconds`.
            InvalidRequestError: the request can't be answered.
            BusyError: too many requests are waiting.
            EngineError: the model has failed.
        """
        self = cls(limits, recorder)
        try:
            self._stream = await self._in_time(opening)
        except BaseException:
            recorder.end(self._outcome)
            raise
        self.num_prompt_tokens = self._stream.num_prompt_tokens
        recorder.record_prompt(self.num_prompt_tokens)
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """Return the next delta.

        Raises:
            QueueTimeoutError: the first one did not arrive within `queue_seconds`.
            RequestTimeoutError: the last one did not arrive within `request_seconds`.
            BusyError: too many requests are waiting; only for the first one.
            EngineError: the model has failed.
        """
        assert self._stream is not None
        delta = await self._in_time(anext(self._stream.deltas))
        self._has_delta = True
        self._recorder.record_delta(delta)
        return delta

    async def read_first(self) -> T:
        """Return the first delta; close the stream if it can't be had.

        Errors of overload come with it. A streamed response reads it before its status is sent, so
        that they have a status of their own.

        Raises:
            RuntimeError: as `__anext__`.
        """
        try:
            return await anext(self)
        except BaseException:
            await self.aclose()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop the model's work on the request, and record how the request has ended."""
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                await stream.aclose()
            finally:
                self._recorder.end(self._outcome)

    async def _in_time(self, item: Awaitable[V]) -> V:
        """Await an item within the time limits, and remember how the request ends with it."""
        limits = self._limits
        is_first = not self._has_delta and limits.queue_seconds < limits.request_seconds
        seconds = limits.queue_seconds if is_first else limits.request_seconds
        timer = asyncio.timeout_at(self._start + seconds)
        try:
            async with timer:
                return await item
        except StopAsyncIteration:
            self._outcome = "ok"
            raise
        except InvalidRequestError:
            self._outcome = "refused"
            raise
        except BusyError:
            self._outcome = "busy"
            raise
        except EngineError:
            self._outcome = "failed"
            raise
        except TimeoutError as error:
            if not timer.expired():
                raise
            self._outcome = "late"
            if is_first:
                text = f"No token generated within {seconds:g} s. Please try again later."
                raise QueueTimeoutError(text) from error
            raise RequestTimeoutError(f"Request timed out after {seconds:g} s") from error


class EventStream(StreamingResponse):
    """Streams server-sent events as they are produced.

    Starlette leaves the generator of a disconnected client to the garbage collector, which may run
    much later; until then the model would continue to generate.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], source: ObservedStream[Any]) -> None:
        """Create a response.

        Args:
            events: server-sent events.
            source: what they are made from; closed after them, even if none was sent.
        """
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._events, self._source = events, source

    async def stream_response(self, send: Send) -> None:
        """Send the events, then close their generator and its source."""
        try:
            await super().stream_response(send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
                await self._source.aclose()
