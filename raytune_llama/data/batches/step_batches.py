"""Dataloader: the micro-batch tensors of each worker and step.

The sample at a position is a pure function of (store fingerprint, seed, position): there is no
iterator state to save, and a run resumes from its step number alone, on any number of workers.

Shapes: B = sequences per micro-batch, T = sequence length in tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from raytune_llama.config.errors import UserError
from raytune_llama.data.batches import packing
from raytune_llama.data.batches.config import block_quotas
from raytune_llama.data.batches.order import (
    EpochOrder,
    GroupedOrder,
    MixedOrder,
    Order,
    SampleIndex,
)
from raytune_llama.data.batches.packing import SourceSequences

_PADDED_MULTIPLE = 8
"""Padded lengths are rounded up to a multiple of it, which suits tensor cores."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Batch sizes and sequence order of a run; independent of the number of workers."""

    sequence_tokens: int
    """Sequence length T in tokens."""
    sequences_per_step: int
    """Number of sequences per optimizer step, over all workers."""
    micro_batch_sequences: int
    """Number of sequences per micro-batch, which is one forward pass of one worker."""
    seed: int
    """Seed of the order, together with the store's fingerprint."""
    order: Order
    """Order of the sequences of all sources."""
    total_positions: int
    """Number of sequences in the run; positions continue across epochs."""
    is_padded: bool = False
    """Whether a micro-batch is padded only to its longest sequence."""

    @classmethod
    def create(
        cls,
        source_sequences: Sequence[int],
        *,
        sequence_tokens: int,
        sequences_per_step: int,
        micro_batch_sequences: int,
        seed: int,
        weights: Sequence[float] | None = None,
        max_steps: int | None = None,
        num_epochs: float | None = None,
        is_padded: bool = False,
    ) -> Self:
        """Plan a run, bounded by steps or by epochs (part of one is allowed).

        Args:
            source_sequences: Number of sequences per epoch of each source.
            sequence_tokens: Sequence length T in tokens.
            sequences_per_step: Number of sequences per optimizer step, over all workers.
            micro_batch_sequences: Number of sequences per micro-batch.
            seed: Seed of the order.
            weights: Relative weight of each source; None: every sequence once per epoch.
            max_steps: Number of optimizer steps.
            num_epochs: Number of passes over all sequences.
            is_padded: Whether sequences vary in length and are sorted by it.

        Raises:
            UserError: Not exactly one of the two bounds is given, weights are given with epochs,
                a number is not positive, no source is given, or a weight is too small.
        """
        if (max_steps is None) == (num_epochs is None):
            raise UserError(
                f"max_steps is {max_steps} and num_epochs is {num_epochs}; set exactly one of them"
            )
        _check_positive(
            sequence_tokens=sequence_tokens,
            sequences_per_step=sequences_per_step,
            micro_batch_sequences=micro_batch_sequences,
            max_steps=max_steps,
            num_epochs=num_epochs,
            source_sequences=min(source_sequences, default=0),
            weights=None if weights is None else min(weights, default=0),
        )
        if max_steps is None:
            total = math.ceil((num_epochs or 0) * sum(source_sequences))
        else:
            total = max_steps * sequences_per_step
        group = sequences_per_step if is_padded else 1
        return cls(
            sequence_tokens=sequence_tokens,
            sequences_per_step=sequences_per_step,
            micro_batch_sequences=micro_batch_sequences,
            seed=seed,
            order=_build_order(source_sequences, weights, max_steps, total, group=group),
            total_positions=total,
            is_padded=is_padded,
        )

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps in the run; the last one may have fewer sequences."""
        return -(-self.total_positions // self.sequences_per_step)

    def positions(self, step: int, rank: int, world_size: int) -> range:
        """Return the positions of a worker's sequences in a step."""
        start = step * self.sequences_per_step
        stop = min(start + self.sequences_per_step, self.total_positions)
        return range(start + rank, stop, world_size)

    def sample(self, position: int, fingerprint: str) -> SampleIndex:
        """Return the sequence at a position, for a store with this fingerprint."""
        return self.order.sample(position, fingerprint, self.seed)

    def num_micro_batches(self, world_size: int) -> int:
        """Return the number of micro-batches per worker and step, including a partial last step."""
        return num_micro_batches(self.sequences_per_step, self.micro_batch_sequences, world_size)


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward pass, int64 on the CPU, shape (B, T)."""

    ids_BT: torch.Tensor
    """Input ids, shape (B, T)."""
    labels_BT: torch.Tensor
    """Next id of each input (already shifted), or -100; shape (B, T)."""
    positions_BT: torch.Tensor
    """Position ids, which restart at 0 at each isolated document; shape (B, T)."""


@dataclass(frozen=True)
class StepBatch:
    """One worker's share of an optimizer step."""

    step: int
    """Optimizer step, from 0."""
    micro_batches: tuple[MicroBatch, ...]
    """Micro-batches for gradient accumulation, the same number on every worker."""
    positions: tuple[int, ...]
    """Positions of the real sequences, in row order."""
    num_filler_sequences: int
    """Number of rows without targets that only fill the shape."""
    source_sequences: tuple[int, ...]
    """Number of real sequences per source on this worker."""
    source_targets: tuple[int, ...]
    """Number of target tokens per source on this worker."""
    num_tokens: int
    """Number of input tokens on this worker without padding, targets or not."""


@dataclass(frozen=True)
class StepTotal:
    """Counts of an optimizer step over all workers."""

    source_sequences: tuple[int, ...]
    """Number of real sequences per source."""
    source_targets: tuple[int, ...]
    """Number of target tokens per source."""
    num_tokens: int
    """Number of input tokens without padding."""

    @property
    def num_targets(self) -> int:
        """Number of target tokens in the step."""
        return sum(self.source_targets)


def read_steps(
    sources: Sequence[SourceSequences],
    fingerprint: str,
    plan: BatchPlan,
    *,
    rank: int,
    world_size: int,
    start_step: int = 0,
) -> Iterator[StepBatch]:
    """Stream one worker's batches from a step to the end of the run.

    Args:
        sources: Sequences of each source, in the plan's order.
        fingerprint: Fingerprint of the token store.
        plan: Batch plan of the run.
        rank: Rank of this worker.
        world_size: Number of workers.
        start_step: First step to read, for resuming.
    """
    assert tuple(source.num_sequences for source in sources) == plan.order.source_sequences
    num_rows = plan.num_micro_batches(world_size) * plan.micro_batch_sequences
    for step in range(start_step, plan.num_steps):
        positions = tuple(plan.positions(step, rank, world_size))
        num_sequences, num_targets = [0] * len(sources), [0] * len(sources)
        rows: list[packing.PackedSequence] = []
        for position in positions:
            sample = plan.sample(position, fingerprint)
            rows.append(sources[sample.source].read(sample))
            num_sequences[sample.source] += 1
            num_targets[sample.source] += rows[-1].num_targets
        yield StepBatch(
            step=step,
            micro_batches=tuple(
                _stack(rows[row : row + plan.micro_batch_sequences], plan)
                for row in range(0, num_rows, plan.micro_batch_sequences)
            ),
            positions=positions,
            num_filler_sequences=num_rows - len(rows),
            source_sequences=tuple(num_sequences),
            source_targets=tuple(num_targets),
            num_tokens=sum(len(row.ids) for row in rows),
        )


def num_micro_batches(num_sequences: int, micro_batch_sequences: int, world_size: int) -> int:
    """Return the number of micro-batches per worker that cover all sequences."""
    largest_share = -(-num_sequences // world_size)
    return -(-largest_share // micro_batch_sequences)


def _stack(rows: list[packing.PackedSequence], plan: BatchPlan) -> MicroBatch:
    length = plan.sequence_tokens
    if plan.is_padded:
        longest = max((len(row.ids) for row in rows), default=1)
        length = min(length, -(-longest // _PADDED_MULTIPLE) * _PADDED_MULTIPLE)
    return stack_sequences(rows, plan.micro_batch_sequences, length)


def stack_sequences(
    sequences: Sequence[packing.PackedSequence], micro_batch_sequences: int, sequence_tokens: int
) -> MicroBatch:
    """Stack sequences into a micro-batch; `FILLER` rows replace missing sequences."""
    rows = [*sequences, *[packing.FILLER] * (micro_batch_sequences - len(sequences))]
    arrays = np.empty((3, micro_batch_sequences, sequence_tokens), dtype=np.int64)
    for number, row in enumerate(rows):
        row.write(*arrays[:, number])
    return MicroBatch(*map(torch.from_numpy, arrays))


def _check_positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and number <= 0:
            raise UserError(f"{name}: got {number}, wanted a number above 0")


def _build_order(
    source_sequences: Sequence[int],
    weights: Sequence[float] | None,
    max_steps: int | None,
    total_positions: int,
    *,
    group: int,
) -> Order:
    if weights is None and group > 1:
        return GroupedOrder(tuple(source_sequences), group)
    if weights is None:
        return EpochOrder(tuple(source_sequences))
    if max_steps is None:
        raise UserError("num_epochs: cannot be used with weights; set max_steps instead")
    quotas = block_quotas(weights, total_positions)
    if len(weights) != len(source_sequences) or not all(quotas):
        raise UserError(
            f"weights: {tuple(weights)} give {len(source_sequences)} sources {quotas} of "
            f"{sum(quotas)} sequences, wanted at least one per source"
        )
    return MixedOrder(tuple(source_sequences), quotas)
