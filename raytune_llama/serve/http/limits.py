"""How large, how deep and how long a request and its answer may be; who may ask from a browser."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, TypeVar

from pydantic import Field

from raytune_llama.config import settings

T = TypeVar("T")

NUM_WAITED_FOR = 2
"""Items of an answer that `queue_seconds` is for: the prompt's size and the first part."""


@settings
class Limits:
    """Bounds on every request, whoever asks."""

    body_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    """Of a request; larger ones are refused as they arrive, with 413."""

    header_bytes: Annotated[int, Field(ge=1024)] = 64 * 2**10
    """Of a request's path and headers together; more are refused with 431."""

    json_depth: Annotated[int, Field(ge=8, le=200)] = 64
    """Objects and lists within one another; deeper ones are refused before they are read."""

    body_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a request's body may take to arrive; then it is refused with 408."""

    queue_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait for an answer's first token; then it is refused with 503."""

    request_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest whole answer; then it is refused with 504, and a stream ends with an error."""

    send_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a client may leave what it was sent unread; then its answer is ended."""

    allow_origins: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Web pages that browsers let ask, `https://example.org`, or `*`: all. None: no other page."""


class QueueTimeoutError(RuntimeError):
    """No token of an answer came in time; try again later."""


class AnswerTimeoutError(RuntimeError):
    """An answer was not whole in time."""


async def within(items: AsyncGenerator[T, None], limits: Limits) -> AsyncGenerator[T, None]:
    """Yield the items of an answer, and close it where they take too long.

    Raises:
        QueueTimeoutError: the first ones did not come in `queue_seconds`.
        AnswerTimeoutError: the last one did not come in `request_seconds`.
    """
    begin, num_items = asyncio.get_running_loop().time(), 0
    async with aclosing(items):
        while True:
            is_first = num_items < NUM_WAITED_FOR and limits.queue_seconds < limits.request_seconds
            seconds = limits.queue_seconds if is_first else limits.request_seconds
            timer = asyncio.timeout_at(begin + seconds)
            try:
                async with timer:
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                if not timer.expired():
                    raise
                if is_first:
                    raise QueueTimeoutError(f"no token came in {seconds:g} s") from error
                raise AnswerTimeoutError(f"the answer took more than {seconds:g} s") from error
            num_items += 1
            yield item
