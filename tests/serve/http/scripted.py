"""Models whose output a test dictates."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from raytune_llama.serve.engine.protocol import Vectors
from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.serve.protocol.completions import CompletionRequest
from raytune_llama.serve.protocol.embeddings import EmbeddingRequest


class Scripted:
    """A model that generates given pieces, and keeps its requests."""

    def __init__(
        self,
        *pieces: str,
        error: Exception | None = None,
        held: bool = False,
        first_seconds: float = 0.0,
        adapters: Sequence[str] = (),
    ) -> None:
        """Start without requests.

        Args:
            pieces: deltas of every answer.
            error: raised after them.
            held: wait for `let` before each piece but the first.
            first_seconds: seconds before the first piece.
            adapters: names of its adapters.
        """
        self.asked: list[ChatRequest | CompletionRequest] = []
        self.embedded: list[EmbeddingRequest] = []
        self._pieces, self._error, self._held = pieces, error, held
        self._first_seconds, self._adapters = first_seconds, list(adapters)
        self._let = threading.Semaphore(0)
        self.num_running = 0
        """Number of streams that are not closed."""

    def let(self) -> None:
        """Let the model generate its next piece."""
        self._let.release()

    async def respond(self, request: ChatRequest | CompletionRequest) -> Stream[OutputDelta]:
        self.asked.append(request)
        self.num_running += 1
        return Stream(3, self._generate(), self._end)

    def _end(self) -> None:
        self.num_running -= 1

    async def _generate(self) -> AsyncGenerator[OutputDelta, None]:
        await asyncio.sleep(self._first_seconds)
        for number, piece in enumerate(self._pieces):
            while self._held and number and not self._let.acquire(blocking=False):
                await asyncio.sleep(0.01)
            is_last = number == len(self._pieces) - 1 and self._error is None
            yield OutputDelta(0, piece, 1, finish_reason="stop" if is_last else None)
        if self._error is not None:
            raise self._error

    async def embed(self, request: EmbeddingRequest) -> Stream[Vectors]:
        """Return one unit vector of two dimensions per text."""
        self.embedded.append(request)
        num_texts = 1 if isinstance(request.input, str) else len(request.input)

        async def vectors() -> AsyncGenerator[Vectors, None]:
            yield np.tile(np.array([[0.0, 1.0]], dtype=np.float32), (num_texts, 1))

        return Stream(3, vectors())

    async def adapters(self) -> list[str]:
        return self._adapters

    async def check(self) -> None:
        pass

    @property
    def fields(self) -> dict[str, object]:
        """The fields that the newest request has set."""
        return self.asked[-1].model_dump(exclude_unset=True)

    @property
    def messages(self) -> list[tuple[str, str]]:
        """The newest request's conversation: role and text."""
        request = self.asked[-1]
        assert isinstance(request, ChatRequest)
        return [(message.role, message.text) for message in request.messages]
