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
    """A token of an answer, or of its echoed prompt, with its log-probability."""

    content: bytes
    """Bytes that the token stands for; of a control token its spelling."""

    logprob: float | None
    """Natural logarithm of the token's probability; None for the first token of a prompt."""

    top_logprobs: tuple[tuple[bytes, float], ...] = ()
    """Bytes and log-probabilities of the most likely tokens at this place, in descending order."""

    offset: int = 0
    """Number of characters of the answer before the token; a part of a character is at its own."""

    is_end: bool = False
    """Whether the token only ends the answer, as EOS does."""


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


def token_text(content: bytes) -> str:
    r"""Return a token's bytes as text; those of a part of a character as `bytes:\xe4\xb8`."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
