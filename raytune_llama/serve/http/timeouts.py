"""Time limits of a response, from the request to the last token."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from raytune_llama.serve.config import RequestLimits

T = TypeVar("T")

NUM_WAITED_FOR = 2
"""Number of items that `queue_seconds` applies to: the prompt token count and the first delta."""


class QueueTimeoutError(RuntimeError):
    """No token was generated in time; retry later."""


class RequestTimeoutError(RuntimeError):
    """A response was not complete in time."""


async def enforce_timeouts(
    items: AsyncGenerator[T, None], limits: RequestLimits
) -> AsyncGenerator[T, None]:
    """Yield the items of a response; close it if they take too long.

    Raises:
        QueueTimeoutError: the first items did not arrive within `queue_seconds`.
        RequestTimeoutError: the last item did not arrive within `request_seconds`.
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
                    text = f"No token generated within {seconds:g} s. Please try again later."
                    raise QueueTimeoutError(text) from error
                text = f"Request timed out after {seconds:g} s"
                raise RequestTimeoutError(text) from error
            num_items += 1
            yield item
