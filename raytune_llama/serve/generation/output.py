"""The parts in which a model's answers come. Imports nothing heavy: the gateway needs no torch."""

from dataclasses import dataclass

from raytune_llama.chat.tools import ToolCallChunk
from raytune_llama.serve.protocol.chat import FinishReason

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, and for those whose rest is to come."""


@dataclass(frozen=True)
class OutputToken:
    """A token of an answer, as log-probabilities name it."""

    text: str
    """What it decodes to alone."""

    logprob: float
    """Natural logarithm of its probability."""

    top_logprobs: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens in its place."""


@dataclass(frozen=True)
class OutputDelta:
    """A piece of one of a request's answers."""

    index: int
    """Of the answer."""

    text: str
    """What is new; may be empty."""

    num_tokens: int
    """Tokens generated since the part before."""

    tokens: tuple[OutputToken, ...] = ()
    """The new tokens, where log-probabilities were asked for."""

    finish_reason: FinishReason | None = None
    """Set with the answer's last part."""

    calls: tuple[ToolCallChunk, ...] = ()
    """What is new of its calls of tools; they come behind all text."""


def text_bytes(text: str) -> list[int] | None:
    """Return a token's bytes, or None where it is a part of a character."""
    return None if REPLACEMENT in text else list(text.encode())
