"""A stream of server-sent events that lets go of what it tells of when it ends, however it ends."""

from collections.abc import AsyncGenerator

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import Send

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events as they come.

    Starlette leaves a stream whose client has gone to the garbage collector, which may come much
    later; until then a model would go on.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._events = events

    async def stream_response(self, send: Send) -> None:
        """Send the events; close what makes them."""
        try:
            await super().stream_response(send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
