"""How long an answer may take, from its request to its last token."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from raytune_llama.serve.config import RequestLimits

T = TypeVar("T")

NUM_WAITED_FOR = 2
"""Items of an answer that `queue_seconds` is for: the prompt's size and the first part."""


class QueueTimeoutError(RuntimeError):
    """No token of an answer came in time; try again later."""


class RequestTimeoutError(RuntimeError):
    """An answer was not whole in time."""


async def enforce_timeouts(
    items: AsyncGenerator[T, None], limits: RequestLimits
) -> AsyncGenerator[T, None]:
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
                raise RequestTimeoutError(f"the answer took more than {seconds:g} s") from error
            num_items += 1
            yield item
