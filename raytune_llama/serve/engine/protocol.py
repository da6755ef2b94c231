"""What every engine is asked and answers: the protocol. No torch here: the gateway needs none."""

from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


Vectors = NDArray[np.float32]
"""Vectors of texts, (N, D): N texts, D hidden size."""

EngineFinishReason = Literal["stop", "length"]
"""Why a sequence has ended: at a token that ends it, or at its limit."""


@dataclass(frozen=True)
class SamplingOptions:
    """How a sequence's tokens are chosen."""

    temperature: float = 1.0
    """Logits are divided by it; 0: always the likeliest token."""

    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""

    top_k: int | None = None
    """Only so many of the likeliest tokens are drawn from; None: all."""

    repetition_penalty: float = 1.0
    """Logits of tokens that the sequence has already are divided by it where positive, else
    multiplied (Keskar et al. 2019)."""

    seed: int | None = None
    """Equal seeds draw equal tokens; None: each request draws anew."""

    num_logprobs: int | None = None
    """How many of the likeliest tokens' log-probabilities are told beside the chosen one's; None:
    no log-probability at all."""


class Constraint(Protocol):
    """What restricts a sequence's tokens, one after the other."""

    def allowed_tokens(self) -> "Tensor":
        """Return which tokens may come next, (V,) of booleans; at least one may."""
        ...

    def advance(self, token: int) -> None:
        """Go on by a token that may come."""
        ...

    def copy(self) -> Self:
        """Return another that stands where this one does."""
        ...


@dataclass(frozen=True)
class SampledToken:
    """A token that was chosen."""

    token: int
    """Its id."""

    logprob: float | None = None
    """Natural logarithm of its probability, before temperature and cuts; None: not asked for."""

    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the likeliest tokens, the likeliest first."""


@dataclass(frozen=True)
class EngineRequest:
    """What is asked of the model: ids in, ids out."""

    prompt: tuple[int, ...]
    """Token ids; at least one."""

    sampling: SamplingOptions
    """How tokens are chosen."""

    max_tokens: int
    """New tokens, at most."""

    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence; such a token is told too."""

    constraint: Constraint | None = None
    """What restricts the tokens; each sequence goes on by a copy of its own."""

    adapter: Hashable | None = None
    """Key of an adapter that the engine has; None: the base alone."""


@dataclass(frozen=True)
class TokenOutput:
    """A sequence's next token."""

    key: Hashable
    """Of the sequence, as `add` was told."""

    sampled: SampledToken
    """The token."""

    finish_reason: EngineFinishReason | None
    """Set with the last token."""

    @property
    def is_last(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None


class InferenceEngine(Protocol):
    """Generates for many requests at a time."""

    def generate(self, generation: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """Yield a request's tokens as they come, the last one with its finish.

        A caller that ends the iteration before frees what the request holds.

        Raises:
            BusyError: as many wait as may.
            ValueError: the prompt does not fit.
            EngineError: the engine has failed.
        """
        ...

    def embed(self, texts: Sequence[tuple[int, ...]]) -> AsyncGenerator[Vectors, None]:
        """Yield the vectors of texts in their order, some at a time, between others' tokens.

        A caller that ends the iteration before ends the work.

        Raises:
            BusyError: as many wait as may.
            ValueError: a text is empty or does not fit.
            EngineError: the engine has failed.
        """
        ...

    def check_health(self) -> None:
        """Raise EngineError where nothing can be generated any more."""
        ...

    def close(self) -> None:
        """End; what still runs ends with an EngineError."""
        ...
