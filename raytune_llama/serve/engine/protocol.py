"""The protocol of engines: requests and outputs. Imports no torch: the gateway needs none."""

from collections.abc import AsyncGenerator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from raytune_llama.config.errors import UserError
from raytune_llama.serve.errors import InvalidRequestError

if TYPE_CHECKING:
    from torch import Tensor

    from raytune_llama.serve.engine.lora import LoraLayerWeights


Vectors = NDArray[np.float32]
"""Embeddings of texts, (N, D): N texts, D hidden size."""

EngineFinishReason = Literal["stop", "length"]
"""Why a sequence has ended: at a stop token, or at its length limit."""


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters of a sequence.

    The logits are changed in this order: bias, repetition penalty, frequency and presence
    penalties, temperature. Log-probabilities are those of the unchanged logits.
    """

    temperature: float = 1.0
    """Divisor of the logits; 0: greedy decoding."""

    top_p: float = 1.0
    """Nucleus sampling: only the most likely tokens with this total probability are sampled."""

    top_k: int | None = None
    """Number of most likely tokens to sample from; None: all."""

    min_p: float = 0.0
    """Minimum probability of a token relative to the most likely one, from 0 to 1: less likely
    tokens are not sampled. Applied to the probabilities at `temperature`, before top-p; 0: no
    minimum."""

    repetition_penalty: float = 1.0
    """Penalty for tokens that the sequence already has: divides positive logits and multiplies
    negative ones (Keskar et al. 2019)."""

    frequency_penalty: float = 0.0
    """Number subtracted from a token's logit for each time that it was generated; tokens of the
    prompt do not count."""

    presence_penalty: float = 0.0
    """Number subtracted from the logit of every token that was generated at least once."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    """Distinct token ids, and what is added to the logit of each: -100 practically bans a token,
    and 100 practically forces it. No bias makes a token possible that a constraint or the end of
    the vocabulary excludes."""

    seed: int | None = None
    """Seed of the sampler: equal seeds give equal tokens; None: a random seed per request."""

    num_logprobs: int | None = None
    """Number of most likely tokens whose log-probabilities are returned besides the sampled
    token's; None: no log-probabilities."""


class Constraint(Protocol):
    """Restricts which tokens a sequence may sample next."""

    def allowed_tokens(self) -> "Tensor":
        """Return the boolean mask of tokens allowed next, (V,); at least one is."""
        ...

    def advance(self, token: int) -> None:
        """Consume a token, which must be allowed."""
        ...

    def copy(self) -> Self:
        """Return an independent copy at the same position."""
        ...


@dataclass(frozen=True)
class SampledToken:
    """A token, sampled or of the prompt."""

    token: int
    """Token id."""

    logprob: float | None = None
    """Natural log-probability under the model's own logits: before bias, penalties, temperature,
    top-p, top-k and any constraint. None: not requested."""

    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the most likely tokens, in descending order."""


@dataclass(frozen=True)
class EngineRequest:
    """A generation request: token ids in, token ids out."""

    prompt: tuple[int, ...]
    """Token ids of the prompt; at least one."""

    sampling: SamplingOptions
    """Sampling parameters."""

    max_tokens: int
    """Maximum number of new tokens."""

    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence; the stop token itself is yielded too."""

    constraint: Constraint | None = None
    """Restricts the tokens; each sequence advances its own copy. None: no restriction."""

    adapter: Hashable | None = None
    """Key of an attached adapter; None: the base model only."""

    num_prompt_logprobs: int | None = None
    """Number of most likely tokens returned for each position of the prompt besides the prompt's
    own token; None: no log-probabilities of the prompt."""

    def check(self, *, max_context: int, num_tokens: int) -> None:
        """Reject a request that an engine can't run.

        Args:
            max_context: maximum tokens per sequence, prompt and answer.
            num_tokens: vocabulary size.

        Raises:
            ValueError: the prompt is empty, or leaves no room for a token; or `logit_bias` names a
                token that does not exist.
        """
        length = len(self.prompt)
        if not 1 <= length < max_context:
            raise UserError(f"got a prompt of {length} tokens, wanted 1 to {max_context - 1}")
        for token, _ in self.sampling.logit_bias:
            if not 0 <= token < num_tokens:
                raise InvalidRequestError(
                    f"logit_bias: got token id {token}, wanted 0 to {num_tokens - 1}", "logit_bias"
                )


@dataclass(frozen=True)
class TokenOutput:
    """The next token of a sequence."""

    key: Hashable
    """Key of the sequence, as given to `add`."""

    sampled: SampledToken
    """The sampled token."""

    finish_reason: EngineFinishReason | None
    """Why the sequence has ended, set with its last token; None before."""

    prompt: tuple[SampledToken, ...] = ()
    """Log-probabilities of the prompt's tokens but the first, with the sequence's first token;
    empty with the others, and if not requested."""


class InferenceEngine(Protocol):
    """Generates tokens and embeddings for many requests concurrently."""

    @property
    def capacity(self) -> int:
        """Maximum number of sequences, running and waiting."""
        ...

    def generate(self, generation: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        """Yield a request's tokens as they are sampled, the last one with its finish reason.

        A caller that closes the generator early frees the request's slot.

        Raises:
            BusyError: too many requests are waiting.
            ValueError: the request can't be run; see `EngineRequest.check`.
            EngineError: the engine has failed.
        """
        ...

    def embed(self, texts: Sequence[tuple[int, ...]]) -> AsyncGenerator[Vectors, None]:
        """Yield the embeddings of texts in order, some at a time, interleaved with generation.

        A caller that closes the generator early cancels the work.

        Raises:
            BusyError: too many requests are waiting.
            ValueError: a text is empty or does not fit the context.
            EngineError: the engine has failed.
        """
        ...

    def check_health(self) -> None:
        """Raise EngineError if the engine can't generate any more."""
        ...

    def close(self) -> None:
        """Stop the engine; running requests end with an EngineError."""
        ...


class AdapterEngine(Protocol):
    """Holds LoRA adapters of its model, which run in one batch with the model itself."""

    async def attach(self, key: Hashable, updates: "Mapping[str, LoraLayerWeights]") -> None:
        """Attach an adapter; requests may name it afterwards.

        Args:
            key: unique key of the adapter, never reused.
            updates: LoRA factors by the name of the model's linear layer.

        Raises:
            UserError: the engine can't run such an adapter.
            EngineError: out of memory for the adapter, which affects nothing else; or the engine
                has failed.
        """
        ...

    def detach(self, key: Hashable) -> None:
        """Detach an adapter; no request may use it any more."""
        ...
