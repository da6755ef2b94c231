"""Which sequences a worker sees at which step, and their tensors.

The sample at a position is a pure function of (store fingerprint, seed, position): there is no
iterator to save, and a run resumes from its step number alone, on any number of workers.

Shapes: B = sequences of a micro-batch, T = tokens of a sequence.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from raytune_llama.config.errors import UserError
from raytune_llama.data.batches import packing
from raytune_llama.data.batches.order import (
    EpochOrder,
    GroupedOrder,
    MixedOrder,
    Order,
    SampleIndex,
    block_quotas,
)
from raytune_llama.data.batches.packing import SourceSequences

_PADDED_MULTIPLE = 8
"""Padded lengths are a multiple of it, which suits matrix units."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The order of a whole run as numbers; independent of the number of workers."""

    sequence_tokens: int
    """T."""
    sequences_per_step: int
    """Sequences of one optimizer step, over all workers."""
    micro_batch_sequences: int
    """Sequences of one forward pass of one worker."""
    seed: int
    """Decides the order together with the store's fingerprint."""
    order: Order
    """Which sequence of which source stands at a position."""
    total_positions: int
    """Sequences of the whole run; positions run on across epochs."""
    is_padded: bool = False
    """Whether a micro-batch is only as long as its longest sequence."""

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
            source_sequences: Sequences of an epoch of each source.
            sequence_tokens: T.
            sequences_per_step: Of an optimizer step, over all workers.
            micro_batch_sequences: Of one forward pass of one worker.
            seed: Decides the order.
            weights: Shares of the sources, relative to each other; None sees every sequence once
                an epoch.
            max_steps: Steps of the run.
            num_epochs: Passes over all sequences.
            is_padded: Sequences have lengths of their own, and are numbered by them.

        Raises:
            ValueError: Not exactly one of the two bounds is given, weights are given with epochs,
                a number is not positive, there is no source, or a weight is too small.
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
        """Optimizer steps of the run; the last one may have fewer sequences."""
        return -(-self.total_positions // self.sequences_per_step)

    def positions(self, step: int, rank: int, world_size: int) -> range:
        """The positions that a worker takes in a step."""
        start = step * self.sequences_per_step
        stop = min(start + self.sequences_per_step, self.total_positions)
        return range(start + rank, stop, world_size)

    def sample(self, position: int, fingerprint: str) -> SampleIndex:
        """The sequence at a position, in a store with this fingerprint."""
        return self.order.sample(position, fingerprint, self.seed)

    def num_micro_batches(self, world_size: int) -> int:
        """Forward passes of every worker in every step, also in a partial last one."""
        return num_micro_batches(self.sequences_per_step, self.micro_batch_sequences, world_size)


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass; int64 on the CPU."""

    ids_BT: torch.Tensor
    """Input ids."""
    labels_BT: torch.Tensor
    """The id that follows each input (already shifted), or -100."""
    positions_BT: torch.Tensor
    """Position ids."""


@dataclass(frozen=True)
class StepBatch:
    """One worker's share of an optimizer step."""

    step: int
    """Which step, from 0."""
    micro_batches: tuple[MicroBatch, ...]
    """The same number on every worker."""
    positions: tuple[int, ...]
    """The positions of the real sequences, in the order of the rows."""
    num_filler_sequences: int
    """Rows without target tokens that only fill the shape."""
    source_sequences: tuple[int, ...]
    """Real sequences of each source, this worker's."""
    source_targets: tuple[int, ...]
    """Target tokens of each source, this worker's."""
    num_tokens: int
    """Real input tokens, this worker's: targets, and what is read but not learned."""


@dataclass(frozen=True)
class StepTotal:
    """What all workers together take in an optimizer step."""

    source_sequences: tuple[int, ...]
    """Real sequences of each source."""
    source_targets: tuple[int, ...]
    """Target tokens of each source."""
    num_tokens: int
    """Real input tokens."""

    @property
    def num_targets(self) -> int:
        """Target tokens of the step."""
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
        sources: The sequences of each source that the plan counts.
        fingerprint: The token store's.
        plan: The run's order.
        rank: This worker's number.
        world_size: Number of workers.
        start_step: First step read.
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
    """Count the forward passes that every worker makes so that all sequences are seen."""
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
    """Make a micro-batch of at most its number of sequences, with filler where some are missing."""
    rows = [*sequences, *[packing.FILLER] * (micro_batch_sequences - len(sequences))]
    arrays = np.empty((3, micro_batch_sequences, sequence_tokens), dtype=np.int64)
    for number, row in enumerate(rows):
        row.write(*arrays[:, number])
    return MicroBatch(*map(torch.from_numpy, arrays))


def _check_positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and number <= 0:
            raise UserError(f"{name}: got {number}, wanted numbers above 0")


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
        raise UserError("num_epochs: has no meaning with weights; use max_steps")
    quotas = block_quotas(weights, total_positions)
    if len(weights) != len(source_sequences) or not all(quotas):
        raise UserError(
            f"weights: {tuple(weights)} give {len(source_sequences)} sources {quotas} of "
            f"{sum(quotas)} sequences, wanted at least one each"
        )
    return MixedOrder(tuple(source_sequences), quotas)
