"""Embeddings of texts: the mean of the model's last hidden states, normalized to length 1.

Shapes: N texts per pass, T tokens of the longest text, D hidden size.

The work is split into passes of a bounded number of tokens, so that generation continues between
two passes. The KV cache of running sequences is never touched.
"""

import inspect
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.serve.engine.protocol import Vectors


@dataclass(frozen=True)
class EmbeddingOutput:
    """The result of one pass."""

    key: Hashable
    """Key of the job, as given to `add`."""

    vectors: Vectors
    """Embeddings of the job's next texts, in input order."""

    is_last: bool
    """Whether the job is done."""


@dataclass
class _Reading:
    """Progress within a text that is longer than one pass."""

    cache: DynamicCache
    total_D: Tensor
    num_read: int = 0


@dataclass
class EmbeddingJob:
    """Texts whose embeddings are still to be computed."""

    key: Hashable
    texts: deque[tuple[int, ...]]
    reading: _Reading | None = None


class Embedder:
    """The queue of embedding jobs of one model. Not thread-safe."""

    num_slots: Final = 1
    """Number of jobs that run at a time; they take turns, so that the others count as waiting."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_context: int,
        pass_tokens: int = 256,
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Start without any job.

        Args:
            model: a causal LM, in evaluation mode.
            max_context: maximum tokens per text.
            pass_tokens: maximum tokens per pass, padding included.
            before_pass: called before each pass.
        """
        self._before_pass = before_pass
        base = model.base_model
        assert isinstance(base, PreTrainedModel)
        self._model, self._device = base, model.device
        self._max_context, self._pass_tokens = max_context, pass_tokens
        self._passes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self.jobs: deque[EmbeddingJob] = deque()
        """Unfinished jobs."""

    def check(self, texts: Sequence[tuple[int, ...]]) -> None:
        """Reject invalid texts; may be called from any thread.

        Raises:
            ValueError: there is no text, or one is empty or longer than the context.
        """
        if not texts:
            raise UserError("got no text, wanted at least one")
        for number, ids in enumerate(texts):
            if not 1 <= len(ids) <= self._max_context:
                raise UserError(
                    f"text {number} has {len(ids)} tokens, wanted 1 to {self._max_context}"
                )

    def add(self, key: Hashable, texts: Sequence[tuple[int, ...]]) -> None:
        """Queue a job: the token ids of some texts.

        Raises:
            ValueError: see `check`.
        """
        self.check(texts)
        self.jobs.append(EmbeddingJob(key, deque(texts)))

    def remove(self, key: Hashable) -> None:
        """Drop a job; does nothing if it is done."""
        self.jobs = deque(job for job in self.jobs if job.key != key)

    @torch.inference_mode()
    def step(self) -> list[EmbeddingOutput]:
        """Run one pass for one job; jobs take turns between texts or batches of texts."""
        if not self.jobs:
            return []
        job = self.jobs[0]
        self._before_pass()
        vectors_ND = self._pass(job)
        if not job.texts:
            self.jobs.popleft()
        elif job.reading is None:
            # Not within a long text: at most one cache exists at a time.
            self.jobs.rotate(-1)
        if vectors_ND is None:
            return []
        normed_ND = torch.nn.functional.normalize(vectors_ND, dim=1)
        return [EmbeddingOutput(job.key, normed_ND.cpu().numpy(), not job.texts)]

    def _pass(self, job: EmbeddingJob) -> Tensor | None:
        """Return the means of a job's next texts, (N, D), or None if a long one continues."""
        if len(job.texts[0]) > self._pass_tokens:
            return self._read_on(job)
        batch: list[tuple[int, ...]] = []
        longest = 0
        while job.texts:
            longest = max(longest, len(job.texts[0]))
            if longest * (len(batch) + 1) > self._pass_tokens:
                break
            batch.append(job.texts.popleft())
        return self._means(batch)

    def _means(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the mean hidden state of each text, (N, D), computed in one pass."""
        lengths_N = torch.tensor([len(ids) for ids in batch], device=self._device)
        rows = [torch.tensor(ids) for ids in batch]
        # Right-padded, which causal attention never sees, with id 0, which every model has.
        ids_NT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
        columns_T = torch.arange(ids_NT.shape[1], device=self._device)
        mask_NT = columns_T < lengths_N.unsqueeze(1)
        states_NTD = self._model(
            input_ids=ids_NT, attention_mask=mask_NT.long(), use_cache=False
        ).last_hidden_state.float()
        total_ND = states_NTD.masked_fill(~mask_NT.unsqueeze(2), 0.0).sum(1)
        return total_ND / lengths_N.unsqueeze(1)

    def _read_on(self, job: EmbeddingJob) -> Tensor | None:
        """Read the next chunk of a long text; return its mean, (1, D), after the last chunk."""
        ids = job.texts[0]
        if job.reading is None:
            job.reading = _Reading(DynamicCache(), torch.zeros(()))
        reading = job.reading
        start = reading.num_read
        chunk = ids[start : start + self._pass_tokens]
        end = start + len(chunk)
        options: dict[str, Any] = {}
        if self._passes_positions:
            options["position_ids"] = torch.arange(start, end, device=self._device).unsqueeze(0)
        states_1TD = self._model(
            input_ids=torch.tensor([chunk], device=self._device),
            attention_mask=torch.ones(1, end, dtype=torch.long, device=self._device),
            past_key_values=reading.cache,
            use_cache=True,
            **options,
        ).last_hidden_state
        reading.total_D = reading.total_D.to(self._device) + states_1TD[0].float().sum(0)
        reading.num_read = end
        if end < len(ids):
            return None
        job.texts.popleft()
        job.reading = None
        return (reading.total_D / len(ids)).unsqueeze(0)
