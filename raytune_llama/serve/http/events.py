"""A server-sent event stream that closes its generator when the response ends, however it ends."""

from collections.abc import AsyncGenerator

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import Send

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Streams server-sent events as they are produced.

    Starlette leaves the generator of a disconnected client to the garbage collector, which may run
    much later; until then the model would continue to generate.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._events = events

    async def stream_response(self, send: Send) -> None:
        """Send the events, then close their generator."""
        try:
            await super().stream_response(send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
