"""What a model returns for a request: a stream of deltas. Imports nothing heavy."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from raytune_llama.chat.tools import ToolCallChunk
from raytune_llama.serve.protocol.chat import FinishReason

T = TypeVar("T")

REPLACEMENT = "\ufffd"
"""Character that a decoder emits for invalid bytes, and for an incomplete character."""


@dataclass(frozen=True)
class OutputToken:
    """A token of an answer with its log-probability."""

    text: str
    """Text of the token decoded alone."""

    logprob: float
    """Natural logarithm of the token's probability."""

    top_logprobs: tuple[tuple[str, float], ...] = ()
    """Texts and log-probabilities of the most likely tokens at this position."""


@dataclass(frozen=True)
class OutputDelta:
    """A streamed part of one answer of a request."""

    index: int
    """Index of the answer."""

    text: str
    """New text; may be empty."""

    num_tokens: int
    """Number of tokens generated since the previous delta."""

    tokens: tuple[OutputToken, ...] = ()
    """New tokens with log-probabilities, if requested."""

    finish_reason: FinishReason | None = None
    """Why the answer has ended, set with its last delta; None before."""

    calls: tuple[ToolCallChunk, ...] = ()
    """New parts of the answer's tool calls, which come after all text."""


def _do_nothing() -> None:
    """Release nothing."""


@dataclass(frozen=True, eq=False)
class Stream(Generic[T]):
    """The answer to an accepted request. Whoever gets it has to close it."""

    num_prompt_tokens: int
    """Number of tokens of the prompt, or of all input texts."""

    deltas: AsyncGenerator[T, None]
    """The parts of the answer as they are computed; see the method that returned the stream."""

    release: Callable[[], None] = _do_nothing
    """Called once when the stream is closed, whether or not it was read."""

    async def aclose(self) -> None:
        """Stop the computation and release what it holds."""
        try:
            await self.deltas.aclose()
        finally:
            self.release()


def text_bytes(text: str) -> list[int] | None:
    """Return the bytes of a token's text, or None if it holds only part of a character."""
    return None if REPLACEMENT in text else list(text.encode())
