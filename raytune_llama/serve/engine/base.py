"""What every engine is asked and tells: the protocol, and its errors."""

from collections.abc import AsyncGenerator, Hashable
from dataclasses import dataclass
from typing import Literal, Protocol

from raytune_llama.serve.engine.sampling import Choice, Constraint, Sampling

Finish = Literal["stop", "length"]
"""Why a sequence has ended: at a token that ends it, or at its limit."""


@dataclass(frozen=True)
class Generation:
    """What is asked of the model: ids in, ids out."""

    prompt: tuple[int, ...]
    """Token ids; at least one."""

    sampling: Sampling
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
class Step:
    """A sequence's next token."""

    key: Hashable
    """Of the sequence, as `add` was told."""

    choice: Choice
    """The token."""

    finish: Finish | None
    """Set with the last token."""


class Engine(Protocol):
    """Generates for many requests at a time."""

    def generate(self, generation: Generation) -> AsyncGenerator[Step, None]:
        """Yield a request's tokens as they come, the last one with its finish.

        A caller that ends the iteration before frees what the request holds.

        Raises:
            BusyError: as many wait as may.
            ValueError: the prompt does not fit.
            EngineError: the engine has failed.
        """
        ...

    def check(self) -> None:
        """Raise EngineError where nothing can be generated any more."""
        ...

    def close(self) -> None:
        """End; what still runs ends with an EngineError."""
        ...
