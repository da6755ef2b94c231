"""Models that say what a test lets them say."""

import asyncio
import threading
from collections.abc import AsyncGenerator

from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.protocol.chat import ChatRequest, CompletionRequest


class Scripted:
    """A model that says given pieces, and keeps what it was asked."""

    def __init__(
        self,
        *pieces: str,
        error: Exception | None = None,
        held: bool = False,
        first_seconds: float = 0.0,
    ) -> None:
        """Begin.

        Args:
            pieces: of every answer.
            error: what is raised behind them.
            held: wait for `let` before each piece but the first.
            first_seconds: how long it thinks before the first piece.
        """
        self.asked: list[ChatRequest | CompletionRequest] = []
        self._pieces, self._error, self._held = pieces, error, held
        self._first_seconds = first_seconds
        self._let = threading.Semaphore(0)
        self.num_running = 0

    def let(self) -> None:
        """Let the model say its next piece."""
        self._let.release()

    async def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | OutputDelta, None]:
        self.asked.append(request)
        self.num_running += 1
        try:
            yield 3
            await asyncio.sleep(self._first_seconds)
            for number, piece in enumerate(self._pieces):
                while self._held and number and not self._let.acquire(blocking=False):
                    await asyncio.sleep(0.01)
                is_last = number == len(self._pieces) - 1 and self._error is None
                yield OutputDelta(0, piece, 1, finish_reason="stop" if is_last else None)
            if self._error is not None:
                raise self._error
        finally:
            self.num_running -= 1

    async def adapters(self) -> list[str]:
        return []

    async def check(self) -> None:
        pass

    @property
    def fields(self) -> dict[str, object]:
        """What the newest request says, as it says it."""
        return self.asked[-1].model_dump(exclude_unset=True)

    @property
    def messages(self) -> list[tuple[str, str]]:
        """The newest request's conversation: role and text."""
        request = self.asked[-1]
        assert isinstance(request, ChatRequest)
        return [(message.role, message.text) for message in request.messages]
