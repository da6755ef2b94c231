"""The deltas of streamed answers. Imports nothing heavy: the gateway needs no torch."""

from dataclasses import dataclass

from raytune_llama.chat.tools import ToolCallChunk
from raytune_llama.serve.protocol.chat import FinishReason

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


def text_bytes(text: str) -> list[int] | None:
    """Return the bytes of a token's text, or None if it holds only part of a character."""
    return None if REPLACEMENT in text else list(text.encode())
