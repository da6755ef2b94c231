"""Continuous batching: one pass of the model gives every running sequence its next token.

Shapes: N sequences, Q new tokens of a row, L columns, V vocabulary rows.

Sequences join and leave between two passes. A prompt is read in pieces between passes, so that a
long one does not hold up those that are being answered.
"""

import inspect
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raytune_llama.serve.engine.base import Finish, Generation, Step
from raytune_llama.serve.engine.cache import SlotCache
from raytune_llama.serve.engine.embed import Embedder
from raytune_llama.serve.engine.sampling import Chooser, choose_all


@dataclass
class _Sequence:
    key: Hashable
    generation: Generation
    chooser: Chooser
    num_stored: int = 0
    """Tokens whose keys and values are in the cache."""
    generated: list[int] = field(default_factory=list)


class Stepper:
    """The sequences that a model is working on. Not for several threads at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_context: int,
        num_tokens: int | None = None,
        prefill_tokens: int = 256,
    ) -> None:
        """Begin without any sequence.

        Args:
            model: a causal LM, in evaluation mode.
            num_slots: sequences at a time; more wait.
            max_context: tokens of a sequence, prompt and answer, at most.
            num_tokens: ids of the tokenizer; rows beyond are never generated. None: all rows are.
            prefill_tokens: longest piece of a prompt read between two tokens of the others.
        """
        self._model, self._device = model, model.device
        self._num_slots, self._max_context = num_slots, max_context
        self._num_tokens, self._prefill_tokens = num_tokens, prefill_tokens
        self._cache = SlotCache(model.config, num_slots)
        accepted = inspect.signature(model.forward).parameters
        self._passes_positions = "position_ids" in accepted
        # The place in the list is the row in the cache.
        self._decoding: list[_Sequence] = []
        self._prefilling: _Sequence | None = None
        self._waiting: deque[_Sequence] = deque()

    @property
    def num_running(self) -> int:
        """Sequences that have a slot."""
        return len(self._decoding) + (self._prefilling is not None)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._waiting)

    def build_embedder(self) -> Embedder:
        """Return what makes vectors of texts with the same model, in passes of the same bound."""
        return Embedder(
            self._model, max_context=self._max_context, pass_tokens=self._prefill_tokens
        )

    def check(self, generation: Generation) -> None:
        """Refuse what can't be answered; may be called by any thread.

        Raises:
            ValueError: the prompt is empty, or leaves no room for a token.
        """
        length = len(generation.prompt)
        if not 1 <= length < self._max_context:
            raise ValueError(
                f"got a prompt of {length} tokens, wanted 1 to {self._max_context - 1}"
            )

    def add(self, key: Hashable, generation: Generation) -> None:
        """Take a sequence in.

        Raises:
            ValueError: the prompt is empty, or leaves no room for a token.
        """
        self.check(generation)
        constraint = generation.constraint.copy() if generation.constraint else None
        chooser = Chooser(generation.sampling, set(generation.prompt), constraint)
        self._waiting.append(_Sequence(key, generation, chooser))

    def remove(self, key: Hashable) -> None:
        """Let a sequence go, wherever it is; nothing where it has ended."""
        for sequence in [s for s in self._waiting if s.key == key]:
            self._waiting.remove(sequence)
        if self._prefilling is not None and self._prefilling.key == key:
            self._prefilling = None
        for row in [row for row, s in enumerate(self._decoding) if s.key == key]:
            self._free(row)

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """Read a piece of a prompt, and give every sequence that is answered its next token."""
        # Those that decode come first: a prompt that ends here is told its first token only.
        steps = self._decode()
        return steps + self._prefill()

    def _decode(self) -> list[Step]:
        if not self._decoding:
            return []
        ids_N1 = torch.tensor([[s.generated[-1]] for s in self._decoding], device=self._device)
        positions_N1 = torch.tensor([[s.num_stored] for s in self._decoding], device=self._device)
        logits_NV = self._forward(ids_N1, positions_N1, first=0)
        for sequence in self._decoding:
            sequence.num_stored += 1
        steps = self._choose(logits_NV, self._decoding)
        for row in reversed([row for row, step in enumerate(steps) if step.finish]):
            self._free(row)
        return steps

    def _prefill(self) -> list[Step]:
        if self._prefilling is None:
            if not self._waiting or len(self._decoding) == self._num_slots:
                return []
            self._prefilling = self._waiting.popleft()
        sequence, row = self._prefilling, len(self._decoding)
        start = sequence.num_stored
        piece = sequence.generation.prompt[start : start + self._prefill_tokens]
        ids_1Q = torch.tensor([piece], device=self._device)
        positions_1Q = torch.arange(start, start + len(piece), device=self._device).unsqueeze(0)
        logits_1V = self._forward(ids_1Q, positions_1Q, first=row)
        sequence.num_stored += len(piece)
        if sequence.num_stored < len(sequence.generation.prompt):
            return []
        self._prefilling = None
        steps = self._choose(logits_1V, [sequence])
        if steps[0].finish is None:
            self._decoding.append(sequence)
        return steps

    def _forward(self, ids_NQ: Tensor, positions_NQ: Tensor, *, first: int) -> Tensor:
        """Return the logits behind each row's last token, (N, V) in float32."""
        length_N1 = positions_NQ[:, -1:] + 1
        num_columns = int(length_N1.max())
        self._cache.look(first, positions_NQ, num_columns)
        options: dict[str, Any] = {}
        if self._passes_positions:
            options["position_ids"] = positions_NQ
        columns_L = torch.arange(num_columns, device=self._device)
        output = self._model(
            input_ids=ids_NQ,
            attention_mask=columns_L < length_N1,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        logits_NV = output.logits[:, -1].float()
        if self._num_tokens is not None:
            logits_NV[:, self._num_tokens :] = -torch.inf
        return logits_NV

    def _choose(self, logits_NV: Tensor, sequences: Sequence[_Sequence]) -> list[Step]:
        choices = choose_all(logits_NV, [sequence.chooser for sequence in sequences])
        steps: list[Step] = []
        for sequence, choice in zip(sequences, choices, strict=True):
            sequence.generated.append(choice.token)
            steps.append(Step(sequence.key, choice, self._finish(sequence)))
        return steps

    def _finish(self, sequence: _Sequence) -> Finish | None:
        generation, count = sequence.generation, len(sequence.generated)
        if sequence.generated[-1] in generation.stop_ids:
            return "stop"
        is_full = len(generation.prompt) + count >= self._max_context
        return "length" if is_full or count >= generation.max_tokens else None

    def _free(self, row: int) -> None:
        """Give up a row; the last ones move up, so that rows in use stay neighbours."""
        last = len(self._decoding) - 1
        if row != last:
            moved = self._decoding[last]
            self._cache.move(last, row, moved.num_stored)
            self._decoding[row] = moved
        self._decoding.pop()
        if self._prefilling is not None:
            self._cache.move(last + 1, last, self._prefilling.num_stored)
