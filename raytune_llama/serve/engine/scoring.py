"""Log-likelihoods of continuations: what a model says of given answers, without generating any.

    scores = ContinuationScorer(model, max_context=2048).score([Candidates(context, options)])

Shapes: Q tokens per pass, L columns that it sees, U positions with logits, V vocabulary rows.

Contexts that begin alike, as questions with the same examples before them do, are computed once:
sorted, they form a tree, which is walked with one KV cache that grows on the way down and is
cropped on the way up. Below it, several contexts, each with all its continuations, share a pass:
they lie next to each other in one row without padding, and a mask separates them.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from raytune_llama.config.errors import UserError

MIN_SHARED_TOKENS = 16
"""Minimum number of tokens that contexts share for a pass of their own to be worth it."""


@dataclass(frozen=True)
class Candidates:
    """A context, and the continuations of it to score."""

    context: tuple[int, ...]
    """Token ids; at least one."""

    continuations: tuple[tuple[int, ...], ...]
    """Token ids of each continuation; at least one each."""


@dataclass(frozen=True)
class Score:
    """Score of a continuation."""

    logprob: float
    """Sum of the natural log-probabilities of its tokens."""

    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


@dataclass(frozen=True)
class _Segment:
    """One context's share of a pass: the rest of the context and the starts of its continuations.

    A continuation's last token predicts nothing that is asked for, and is left out.
    """

    number: int
    """Index of the candidates."""

    candidates: Candidates

    start: int
    """Number of the context's tokens that are in the cache."""

    @property
    def num_tokens(self) -> int:
        inputs = sum(len(tokens) - 1 for tokens in self.candidates.continuations)
        return len(self.candidates.context) - self.start + inputs


@dataclass
class _Layout:
    """The tokens of a pass, in order."""

    ids: list[int]
    positions: list[int]
    owners: list[int]
    """Index of the segment of each token."""

    branches: list[int]
    """Index of the continuation that a token is of; -1: of the context."""

    asked: list[list[tuple[list[int], tuple[int, ...]]]]
    """By segment and continuation: the places in the pass that predict its tokens, and these."""


class ContinuationScorer:
    """Scores continuations with one model. Not thread-safe."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_context: int,
        pass_tokens: int = 1024,
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to score; nothing is computed yet.

        Args:
            model: a causal LM with full attention in every layer, in evaluation mode.
            max_context: maximum tokens of a context with a continuation.
            pass_tokens: maximum tokens per pass. One context with its continuations is never
                split over several passes unless it alone is longer.
            before_pass: called before each pass, which has one row.
        """
        self._model, self._device = model, model.device
        self._max_context, self._pass_tokens = max_context, pass_tokens
        self._before_pass = before_pass
        # Without position ids, tokens of different contexts can't share a row.
        self._passes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._cache = DynamicCache()
        self._num_stored = 0

    def check(self, candidates: Candidates) -> None:
        """Reject candidates that can't be scored.

        Raises:
            UserError: the context or a continuation is empty, or they do not fit the model.
        """
        longest = max(map(len, candidates.continuations), default=0)
        if not candidates.context or not min(map(len, candidates.continuations), default=0):
            raise UserError("got an empty context or continuation, wanted at least one token each")
        # As in generation, the last token needs no position of its own.
        length = len(candidates.context) + longest - 1
        if length > self._max_context:
            raise UserError(
                f"a context of {len(candidates.context)} tokens with a continuation of {longest} "
                f"does not fit the model's {self._max_context} positions"
            )

    @torch.inference_mode()
    def score(self, batch: Sequence[Candidates]) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Yield the index of each candidates and the scores of its continuations.

        They come in the order of computation, which is not that of `batch`.

        Raises:
            UserError: see `check`; before anything is computed.
        """
        for candidates in batch:
            self.check(candidates)
        order = sorted(range(len(batch)), key=lambda number: batch[number].context)
        self._cache, self._num_stored = DynamicCache(), 0
        yield from self._walk([(number, batch[number]) for number in order])

    def _walk(
        self, branch: list[tuple[int, Candidates]]
    ) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Score contexts, in sorted order, that all begin with the tokens in the cache."""
        before = self._num_stored
        first = branch[0][1].context
        shared = [_num_shared(one, other) for (_, one), (_, other) in itertools.pairwise(branch)]
        common = min(shared, default=len(first) - 1)
        is_long = len(branch) == 1 and _Segment(*branch[0], before).num_tokens > self._pass_tokens
        if is_long or (len(branch) > 1 and common >= before + MIN_SHARED_TOKENS):
            self._extend(first[before:common])
        alone: list[_Segment] = []
        for part in _split(branch, shared, self._num_stored + MIN_SHARED_TOKENS):
            segment = _Segment(*part[0], self._num_stored)
            is_too_long = segment.num_tokens > self._pass_tokens and not is_long
            if len(part) > 1 or is_too_long:
                yield from self._walk(part)
            else:
                alone.append(segment)
        yield from self._score_together(alone)
        self._crop(before)

    def _score_together(
        self, segments: Sequence[_Segment]
    ) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Score contexts that share no more than the cache, as many per pass as fit."""
        waiting: list[_Segment] = []
        for segment in segments:
            if not self._passes_positions or segment.num_tokens > self._pass_tokens:
                yield (
                    segment.number,
                    tuple(
                        self._score_alone(segment, tokens)
                        for tokens in segment.candidates.continuations
                    ),
                )
                continue
            total = segment.num_tokens + sum(each.num_tokens for each in waiting)
            if waiting and total > self._pass_tokens:
                yield from self._score_pass(waiting)
                waiting = []
            waiting.append(segment)
        if waiting:
            yield from self._score_pass(waiting)

    def _score_pass(self, segments: Sequence[_Segment]) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Score contexts in one pass."""
        layout = _lay_out(segments)
        kept = sorted({place for row in layout.asked for places, _ in row for place in places})
        logits_UV = self._forward(layout.ids, layout.positions, self._mask(layout), kept)
        self._crop(self._num_stored - len(layout.ids))
        index = {place: number for number, place in enumerate(kept)}
        rows = [[index[p] for p in places] for row in layout.asked for places, _ in row]
        tokens = [tokens for row in layout.asked for _, tokens in row]
        scores = iter(_score(logits_UV, rows, tokens))
        for segment in segments:
            count = len(segment.candidates.continuations)
            yield segment.number, tuple(itertools.islice(scores, count))

    def _score_alone(self, segment: _Segment, continuation: tuple[int, ...]) -> Score:
        """Score one continuation, in several passes if it is long."""
        before = self._num_stored
        context = segment.candidates.context
        ids = [*context[segment.start :], *continuation[:-1]]
        first = len(ids) - len(continuation)
        total, is_greedy = 0.0, True
        for start in range(0, len(ids), self._pass_tokens):
            chunk = ids[start : start + self._pass_tokens]
            kept = [place for place in range(len(chunk)) if start + place >= first]
            tokens = continuation[start + kept[0] - first :][: len(kept)] if kept else ()
            positions = range(self._num_stored, self._num_stored + len(chunk))
            logits_UV = self._forward(chunk, positions, None, kept or [len(chunk) - 1])
            if kept:
                (score,) = _score(logits_UV, [range(len(kept))], [tokens])
                total, is_greedy = total + score.logprob, is_greedy and score.is_greedy
        self._crop(before)
        return Score(total, is_greedy)

    def _extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the cache."""
        for start in range(0, len(tokens), self._pass_tokens):
            chunk = tokens[start : start + self._pass_tokens]
            positions = range(self._num_stored, self._num_stored + len(chunk))
            self._forward(chunk, positions, None, [len(chunk) - 1])

    def _forward(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        mask_11QL: Tensor | None,
        kept: Sequence[int],
    ) -> Tensor:
        """Add tokens to the cache; return the logits at some places, (U, V) in float32."""
        self._before_pass()
        options: dict[str, Any] = {}
        if self._passes_positions:
            options["position_ids"] = self._tensor([positions])
        if mask_11QL is None:
            mask_11QL = self._tensor([[1] * (self._num_stored + len(ids))])
        output = self._model(
            input_ids=self._tensor([ids]),
            attention_mask=mask_11QL,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=self._tensor(kept),
            **options,
        )
        self._num_stored += len(ids)
        return output.logits[0].float()

    def _mask(self, layout: _Layout) -> Tensor:
        """Return what each token of a pass sees, as what is added to attention scores.

        That is the cache, the earlier tokens of its context and those of its own continuation.
        """
        owner_Q, branch_Q = self._tensor(layout.owners), self._tensor(layout.branches)
        place_Q = torch.arange(len(layout.ids), device=self._device)
        is_earlier_QQ = place_Q.unsqueeze(0) <= place_Q.unsqueeze(1)
        is_own_QQ = owner_Q.unsqueeze(0) == owner_Q.unsqueeze(1)
        is_line_QQ = (branch_Q.unsqueeze(0) == branch_Q.unsqueeze(1)) | (branch_Q.unsqueeze(0) < 0)
        dtype = self._model.dtype
        mask_QL = torch.zeros(
            len(layout.ids), self._num_stored + len(layout.ids), dtype=dtype, device=self._device
        )
        hidden_QQ = ~(is_earlier_QQ & is_own_QQ & is_line_QQ)
        mask_QL[:, self._num_stored :].masked_fill_(hidden_QQ, torch.finfo(dtype).min)
        return mask_QL[None, None]

    def _crop(self, num_tokens: int) -> None:
        """Keep only the first tokens of the cache."""
        if num_tokens == 0:
            self._cache = DynamicCache()
        elif num_tokens < self._num_stored:
            self._cache.crop(num_tokens - self._num_stored)
        self._num_stored = num_tokens

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, device=self._device)


def _num_shared(one: Candidates, other: Candidates) -> int:
    """Return the number of tokens that two contexts can share in the cache.

    The last token of a context is never shared: its logits are needed.
    """
    pairs = zip(one.context[:-1], other.context[:-1], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _split(
    branch: Sequence[tuple[int, Candidates]], shared: Sequence[int], wanted: int
) -> Iterator[list[tuple[int, Candidates]]]:
    """Split sorted contexts where neighbours share fewer than the wanted number of tokens."""
    part = [branch[0]]
    for item, num_shared in zip(branch[1:], shared, strict=True):
        if num_shared < wanted:
            yield part
            part = []
        part.append(item)
    yield part


def _lay_out(segments: Sequence[_Segment]) -> _Layout:
    """Return the tokens of a pass: each context's rest, then its continuations."""
    layout = _Layout([], [], [], [], [])
    for owner, segment in enumerate(segments):
        context, end = segment.candidates.context, len(segment.candidates.context)
        asked: list[tuple[list[int], tuple[int, ...]]] = []
        rest = context[segment.start :]
        _append(layout, rest, segment.start, owner, -1)
        last = len(layout.ids) - 1
        for branch, tokens in enumerate(segment.candidates.continuations):
            first = len(layout.ids)
            _append(layout, tokens[:-1], end, owner, branch)
            asked.append(([last, *range(first, len(layout.ids))], tokens))
        layout.asked.append(asked)
    return layout


def _append(layout: _Layout, tokens: Sequence[int], start: int, owner: int, branch: int) -> None:
    layout.ids.extend(tokens)
    layout.positions.extend(range(start, start + len(tokens)))
    layout.owners.extend([owner] * len(tokens))
    layout.branches.extend([branch] * len(tokens))


def _score(
    logits_UV: Tensor, rows: Sequence[Sequence[int]], tokens: Sequence[tuple[int, ...]]
) -> list[Score]:
    """Return the score of each continuation from the rows of logits that predict its tokens."""
    device = logits_UV.device
    row_N = torch.tensor([row for each in rows for row in each], device=device)
    token_N = torch.tensor([token for each in tokens for token in each], device=device)
    # Normalizers of the rows, each of which may predict several continuations' first tokens.
    total_U, greedy_U = logits_UV.logsumexp(1), logits_UV.argmax(1)
    logprobs = (logits_UV[row_N, token_N] - total_U[row_N]).tolist()
    greedy = (greedy_U[row_N] == token_N).tolist()
    ends = list(itertools.accumulate(map(len, tokens), initial=0))
    return [
        Score(sum(logprobs[first:last]), all(greedy[first:last]))
        for first, last in itertools.pairwise(ends)
    ]
