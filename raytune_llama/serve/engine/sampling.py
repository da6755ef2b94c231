"""Sampling: from logits to the next token of each sequence.

Shapes: N sequences, V vocabulary rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raytune_llama.serve.engine.protocol import Constraint, SampledToken, SamplingOptions


@dataclass
class Sampler:
    """Samples the tokens of one sequence."""

    sampling: SamplingOptions
    seen: set[int]
    """Token ids in the sequence so far, prompt included."""

    constraint: Constraint | None = None
    """Restricts the tokens; None: no restriction."""

    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed)

    def sample(self, logits_V: Tensor) -> SampledToken:
        """Sample the next token.

        Args:
            logits_V: logits in float32; -inf for tokens that are never generated.
        """
        sampling = self.sampling
        raw_V = logits_V
        if sampling.repetition_penalty != 1.0 and self.seen:
            logits_V = self._penalized(logits_V)
        if self.constraint is not None:
            logits_V = _restricted(logits_V, self.constraint.allowed_tokens())
        token = int(logits_V.argmax()) if sampling.temperature == 0 else self._draw(logits_V)
        self.seen.add(token)
        if self.constraint is not None:
            self.constraint.advance(token)
        if sampling.num_logprobs is None:
            return SampledToken(token)
        logprobs_V = raw_V.log_softmax(0)
        top = logprobs_V.topk(sampling.num_logprobs)
        likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return SampledToken(token, float(logprobs_V[token]), likeliest)

    def _penalized(self, logits_V: Tensor) -> Tensor:
        ids = torch.tensor(sorted(self.seen), device=logits_V.device)
        had = logits_V[ids]
        penalty = self.sampling.repetition_penalty
        return logits_V.index_put((ids,), torch.where(had > 0, had / penalty, had * penalty))

    def _draw(self, logits_V: Tensor) -> int:
        sampling = self.sampling
        num_kept = min(sampling.top_k or len(logits_V), len(logits_V))
        # On the CPU, whose generators are reproducible across machines.
        kept, ids = logits_V.topk(num_kept) if sampling.top_k else logits_V.sort(descending=True)
        # Shifted to a maximum of 0: with a tiny temperature others become -inf, and none inf.
        below = kept.double().cpu() - float(kept[0])
        weights = (below / sampling.temperature).softmax(0)
        if sampling.top_p < 1.0:
            # The token that crosses the threshold is kept.
            before = weights.cumsum(0) - weights
            weights = weights.masked_fill(before >= sampling.top_p, 0.0)
        place = torch.multinomial(weights, 1, generator=self.generator)
        return int(ids[int(place)])


def _restricted(logits_V: Tensor, allowed: Tensor) -> Tensor:
    """Return the logits with -inf for disallowed tokens and rows beyond the vocabulary."""
    restricted_V = torch.full_like(logits_V, -torch.inf)
    places = allowed.nonzero().squeeze(1).to(logits_V.device)
    restricted_V[places] = logits_V[places]
    return restricted_V


def sample_batch(logits_NV: Tensor, choosers: Sequence[Sampler]) -> list[SampledToken]:
    """Sample the next token of every sequence; plain greedy ones with a single argmax."""
    plain = [chooser.sampling == SamplingOptions(temperature=0) for chooser in choosers]
    simple = [p and c.constraint is None for p, c in zip(plain, choosers, strict=True)]
    likeliest = logits_NV.argmax(1).tolist() if any(simple) else []
    choices: list[SampledToken] = []
    for row, chooser in enumerate(choosers):
        if simple[row]:
            chooser.seen.add(likeliest[row])
            choices.append(SampledToken(likeliest[row]))
        else:
            choices.append(chooser.sample(logits_NV[row]))
    return choices
