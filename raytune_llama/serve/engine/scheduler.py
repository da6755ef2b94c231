"""Continuous batching: one forward pass gives every running sequence its next token.

Shapes: N sequences, Q new tokens per row, L columns, U columns with logits, V vocabulary rows.

Sequences join and leave between two passes. Decode and prefill passes alternate; a prefill reads
a chunk of a long prompt, so that running sequences are not delayed, or several short prompts.
"""

import inspect
import itertools
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raytune_llama.model.vocab import num_embedding_rows
from raytune_llama.serve.engine.cache import SlotCache
from raytune_llama.serve.engine.embed import Embedder
from raytune_llama.serve.engine.lora import LoraLayers, LoraLayerWeights
from raytune_llama.serve.engine.protocol import (
    EngineFinishReason,
    EngineRequest,
    SampledToken,
    TokenOutput,
)
from raytune_llama.serve.engine.sampling import Sampler, sample_batch, score_tokens


@dataclass
class _SequenceState:
    key: Hashable
    generation: EngineRequest
    sampler: Sampler
    num_stored: int = 0
    """Number of tokens whose keys and values are in the cache."""
    generated: list[int] = field(default_factory=list)
    scored: list[SampledToken] = field(default_factory=list)
    """Log-probabilities of the prompt so far, until they are returned with the first token."""

    def tokens_to_score(self, count: int) -> tuple[int, ...]:
        """Return the tokens of the prompt that the next `count` positions predict, if wanted."""
        if self.generation.num_prompt_logprobs is None:
            return ()
        start = self.num_stored + 1
        return self.generation.prompt[start : start + count]


class BatchScheduler:
    """Schedules the sequences of one model. Not thread-safe."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_context: int,
        num_tokens: int | None = None,
        prefill_tokens: int = 256,
    ) -> None:
        """Start without any sequence.

        Args:
            model: a causal LM, in evaluation mode.
            num_slots: maximum number of running sequences; more wait.
            max_context: maximum tokens per sequence, prompt and answer.
            num_tokens: vocabulary size of the tokenizer; logit rows beyond it are never generated.
                None: all rows are.
            prefill_tokens: maximum prompt tokens per prefill pass, padding included.
        """
        self._model, self._device = model, model.device
        self.num_slots: Final = num_slots
        """Maximum number of running sequences."""

        self._max_context = max_context
        self._num_tokens = num_embedding_rows(model) if num_tokens is None else num_tokens
        self._prefill_tokens = prefill_tokens
        self._cache = SlotCache(model.config, num_slots)
        # None until an adapter is attached.
        self._lora: LoraLayers | None = None
        accepted = inspect.signature(model.forward).parameters
        self._passes_positions = "position_ids" in accepted
        # The index in the list is the row in the cache.
        self._decoding: list[_SequenceState] = []
        self._prefilling: _SequenceState | None = None
        self._waiting: deque[_SequenceState] = deque()

    @property
    def num_running(self) -> int:
        """Number of sequences that have a slot."""
        return len(self._decoding) + (self._prefilling is not None)

    @property
    def num_waiting(self) -> int:
        """Number of sequences waiting for a slot."""
        return len(self._waiting)

    def attach(self, key: Hashable, updates: Mapping[str, LoraLayerWeights]) -> None:
        """Attach an adapter, which sequences may name from now on; see `LoraLayers.attach`."""
        if self._lora is None:
            self._lora = LoraLayers(self._model)
        self._lora.attach(key, updates)

    def detach(self, key: Hashable) -> None:
        """Detach an adapter; no sequence may use it any more."""
        assert self._lora is not None, "the adapter is attached"
        self._lora.detach(key)

    def build_embedder(self) -> Embedder:
        """Return an embedder on the same model, with passes of at most `prefill_tokens` tokens."""
        return Embedder(
            self._model,
            max_context=self._max_context,
            pass_tokens=self._prefill_tokens,
            # Embeddings use no adapter, whatever the rows of the previous pass used.
            before_pass=lambda: self._set_row_adapters(()),
        )

    def check(self, generation: EngineRequest) -> None:
        """Reject an invalid request; may be called from any thread.

        Raises:
            ValueError: see `EngineRequest.check`.
        """
        generation.check(max_context=self._max_context, num_tokens=self._num_tokens)

    def add(self, key: Hashable, generation: EngineRequest) -> None:
        """Queue a sequence.

        Raises:
            ValueError: see `EngineRequest.check`.
        """
        self.check(generation)
        constraint = generation.constraint.copy() if generation.constraint else None
        chooser = Sampler(generation.sampling, set(generation.prompt), constraint)
        self._waiting.append(_SequenceState(key, generation, chooser))

    @torch.inference_mode()
    def remove(self, key: Hashable) -> None:
        """Remove a sequence, waiting or running; does nothing if it has ended."""
        for sequence in [s for s in self._waiting if s.key == key]:
            self._waiting.remove(sequence)
        if self._prefilling is not None and self._prefilling.key == key:
            self._prefilling = None
        for row in [row for row, s in enumerate(self._decoding) if s.key == key]:
            self._free(row)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Sample the next token of every running sequence, then prefill prompts.

        If more sequences join in the next prefill pass than are running, it comes first: a decoding
        pass takes about as long for one sequence as for many. The number of running sequences more
        than doubles each time, so they are delayed by at most log2(slots) passes.
        """
        if self._prefilling is None and self._num_joining() > len(self._decoding):
            return self._prefill()
        # Decode first: a sequence whose prefill ends in this step gets only its first token.
        steps = self._decode()
        return steps + self._prefill()

    def _decode(self) -> list[TokenOutput]:
        if not self._decoding:
            return []
        chunks = [sequence.generated[-1:] for sequence in self._decoding]
        logits_NV = self._forward(chunks, self._decoding, first=0)
        steps = self._choose(logits_NV, self._decoding)
        self._free_ended(steps, first=0)
        return steps

    def _prefill(self) -> list[TokenOutput]:
        reading, first = self._next_prompts(), len(self._decoding)
        if not reading:
            return []
        chunks = [
            sequence.generation.prompt[sequence.num_stored :][: self._prefill_tokens]
            for sequence in reading
        ]
        logits_NV = self._forward(chunks, reading, first=first)
        # A prompt that needs another pass is alone in this one.
        is_partial = reading[0].num_stored < len(reading[0].generation.prompt)
        self._prefilling = reading[0] if is_partial else None
        if is_partial:
            return []
        steps = self._choose(logits_NV, reading)
        self._decoding += reading
        self._free_ended(steps, first=first)
        return steps

    def _next_prompts(self) -> list[_SequenceState]:
        """Return the sequences to prefill next: one long prompt, or as many as fit, in order."""
        if self._prefilling is not None:
            return [self._prefilling]
        return [self._waiting.popleft() for _ in range(self._num_joining())]

    def _num_joining(self) -> int:
        """Return the number of waiting sequences that the next prefill pass takes, in order."""
        number = longest = 0
        for sequence in itertools.islice(self._waiting, self.num_slots - len(self._decoding)):
            # Prompts are padded to the longest.
            longest = max(longest, len(sequence.generation.prompt))
            if number and longest * (number + 1) > self._prefill_tokens:
                break
            number += 1
        return number

    def _forward(
        self, chunks: Sequence[Sequence[int]], sequences: Sequence[_SequenceState], *, first: int
    ) -> Tensor:
        """Store each sequence's new tokens; return the logits of the last, (N, V) in float32.

        Also scores the tokens of prompts whose log-probabilities are requested; only then are
        logits computed at all positions.

        Rows are right-padded: the padding's keys and values are masked, and overwritten by later
        tokens. Rows of several tokens start in the same column, as causal masks do.
        """
        counts = [len(chunk) for chunk in chunks]
        longest = max(counts)
        ids_NQ = self._tensor([[*c, *[0] * (longest - len(c))] for c in chunks])
        start_N1 = self._tensor([[sequence.num_stored] for sequence in sequences])
        positions_NQ = start_N1 + torch.arange(longest, device=self._device)
        num_columns = max(sequence.num_stored for sequence in sequences) + longest
        assert longest == 1 or len({sequence.num_stored for sequence in sequences}) == 1
        self._cache.set_view(first, positions_NQ, num_columns)
        self._set_row_adapters([sequence.generation.adapter for sequence in sequences])
        options: dict[str, Any] = {}
        if self._passes_positions:
            options["position_ids"] = positions_NQ
        scored = [s.tokens_to_score(count) for s, count in zip(sequences, counts, strict=True)]
        last_N = self._tensor(counts).sub(1)
        if any(scored):
            kept_U, place_N = torch.arange(longest, device=self._device), last_N
        else:
            kept_U, place_N = last_N.unique(return_inverse=True)
        output = self._model(
            input_ids=ids_NQ,
            attention_mask=torch.arange(num_columns, device=self._device)
            < start_N1 + self._tensor(counts).unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=kept_U,
            **options,
        )
        for row, (sequence, tokens) in enumerate(zip(sequences, scored, strict=True)):
            num_top = sequence.generation.num_prompt_logprobs
            if tokens and num_top is not None:
                logits_QV = self._without_surplus(output.logits[row, : len(tokens)])
                sequence.scored += score_tokens(logits_QV, tokens, num_top)
            sequence.num_stored += counts[row]
        return self._without_surplus(output.logits[torch.arange(len(counts)), place_N])

    def _without_surplus(self, logits_NV: Tensor) -> Tensor:
        """Return logits in float32, -inf beyond the vocabulary; may change its argument."""
        logits_NV = logits_NV.float()
        logits_NV[:, self._num_tokens :] = -torch.inf
        return logits_NV

    def _set_row_adapters(self, adapters: Sequence[Hashable | None]) -> None:
        if self._lora is not None:
            self._lora.set_row_adapters(adapters)

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _choose(self, logits_NV: Tensor, sequences: Sequence[_SequenceState]) -> list[TokenOutput]:
        choices = sample_batch(logits_NV, [sequence.sampler for sequence in sequences])
        steps: list[TokenOutput] = []
        for sequence, choice in zip(sequences, choices, strict=True):
            sequence.generated.append(choice.token)
            prompt, sequence.scored = tuple(sequence.scored), []
            steps.append(TokenOutput(sequence.key, choice, self._finish(sequence), prompt))
        return steps

    def _finish(self, sequence: _SequenceState) -> EngineFinishReason | None:
        generation, count = sequence.generation, len(sequence.generated)
        if sequence.generated[-1] in generation.stop_ids:
            return "stop"
        is_full = len(generation.prompt) + count >= self._max_context
        return "length" if is_full or count >= generation.max_tokens else None

    def _free_ended(self, steps: Sequence[TokenOutput], *, first: int) -> None:
        for row in reversed([row for row, step in enumerate(steps, first) if step.finish_reason]):
            self._free(row)

    def _free(self, row: int) -> None:
        """Free a row; the last ones move up, so that rows in use stay adjacent."""
        last = len(self._decoding) - 1
        if row != last:
            moved = self._decoding[last]
            self._cache.move(last, row, moved.num_stored)
            self._decoding[row] = moved
        self._decoding.pop()
        if self._prefilling is not None:
            self._cache.move(last + 1, last, self._prefilling.num_stored)
