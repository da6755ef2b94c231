"""Sampling: from logits to the next token of each sequence, and to log-probabilities.

Shapes: N sequences or positions, V vocabulary rows.
"""

from collections import Counter
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

    is_plain: bool = field(init=False)
    """Whether each token is the most likely one, and nothing else is returned."""

    counts: Counter[int] = field(init=False, default_factory=Counter)
    """How often each token was sampled, counted only if a penalty depends on it."""

    def __post_init__(self) -> None:
        self.is_plain = self.constraint is None and self.sampling == SamplingOptions(temperature=0)
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
        changed_V = self._changed(logits_V)
        if self.constraint is not None:
            changed_V = _restricted(changed_V, self.constraint.allowed_tokens())
        token = int(changed_V.argmax()) if sampling.temperature == 0 else self._draw(changed_V)
        self.seen.add(token)
        if sampling.frequency_penalty or sampling.presence_penalty:
            self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.advance(token)
        if sampling.num_logprobs is None:
            return SampledToken(token)
        return score_tokens(logits_V.unsqueeze(0), [token], sampling.num_logprobs)[0]

    def _changed(self, logits_V: Tensor) -> Tensor:
        """Return the logits with the bias and the penalties, in vLLM's order."""
        sampling = self.sampling
        if sampling.logit_bias:
            ids, bias = zip(*sampling.logit_bias, strict=True)
            logits_V = _added(logits_V, ids, bias)
        if sampling.repetition_penalty != 1.0 and self.seen:
            logits_V = self._penalized(logits_V)
        if self.counts:
            penalties = [
                -(count * sampling.frequency_penalty + sampling.presence_penalty)
                for count in self.counts.values()
            ]
            logits_V = _added(logits_V, list(self.counts), penalties)
        return logits_V

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
        if sampling.min_p > 0.0:
            weights = weights.masked_fill(weights < sampling.min_p * weights[0], 0.0)
            weights = weights / weights.sum()
        if sampling.top_p < 1.0:
            # The token that crosses the threshold is kept.
            before = weights.cumsum(0) - weights
            weights = weights.masked_fill(before >= sampling.top_p, 0.0)
        place = torch.multinomial(weights, 1, generator=self.generator)
        return int(ids[int(place)])


def _added(logits_V: Tensor, ids: Sequence[int], values: Sequence[float]) -> Tensor:
    """Return the logits with a value added to each of some tokens; -inf remains -inf."""
    device = logits_V.device
    places = torch.tensor(ids, device=device)
    return logits_V.index_add(0, places, torch.tensor(values, dtype=logits_V.dtype, device=device))


def _restricted(logits_V: Tensor, allowed: Tensor) -> Tensor:
    """Return the logits with -inf for disallowed tokens and rows beyond the vocabulary."""
    restricted_V = torch.full_like(logits_V, -torch.inf)
    places = allowed.nonzero().squeeze(1).to(logits_V.device)
    restricted_V[places] = logits_V[places]
    return restricted_V


def sample_batch(logits_NV: Tensor, choosers: Sequence[Sampler]) -> list[SampledToken]:
    """Sample the next token of every sequence; plain greedy ones with a single argmax."""
    has_plain = any(chooser.is_plain for chooser in choosers)
    likeliest = logits_NV.argmax(1).tolist() if has_plain else []
    choices: list[SampledToken] = []
    for row, chooser in enumerate(choosers):
        if chooser.is_plain:
            chooser.seen.add(likeliest[row])
            choices.append(SampledToken(likeliest[row]))
        else:
            choices.append(chooser.sample(logits_NV[row]))
    return choices


def score_tokens(logits_NV: Tensor, tokens: Sequence[int], num_top: int) -> list[SampledToken]:
    """Return a token's log-probability in each row, and those of the row's most likely tokens.

    Args:
        logits_NV: logits in float32; -inf for tokens that are never generated.
        tokens: one token id per row.
        num_top: number of most likely tokens.
    """
    logprobs_NV = logits_NV.log_softmax(1)
    ids_N1 = torch.tensor(tokens, device=logits_NV.device).unsqueeze(1)
    own = logprobs_NV.gather(1, ids_N1).squeeze(1).tolist()
    top = logprobs_NV.topk(num_top, dim=1)
    return [
        SampledToken(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, own, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]
