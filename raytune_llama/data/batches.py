"""Which sequences a worker sees at which step, and their tensors.

The sample at a position is a pure function of (store fingerprint, seed, epoch, position): there is
no iterator to save, and a run resumes from its step number alone, on any number of workers.

Shapes: B = sequences of a micro-batch, T = tokens of a sequence.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from raytune_llama.data.packing import (
    IGNORED_LABEL,
    PAD_ID,
    Sequence,
    num_sequences,
    read_sequence,
)
from raytune_llama.data.store import TokenSplit

_MASK_64 = (1 << 64) - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15
_NUM_ROUNDS = 8  # even, so that the halves of an odd number of bits end at their own widths


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The order of a whole run as numbers; independent of the number of workers."""

    sequence_tokens: int
    """T."""
    sequences_per_step: int
    """Sequences of one optimizer step, over all workers."""
    micro_batch_sequences: int
    """Sequences of one forward pass of one worker."""
    isolate_documents: bool
    """Whether documents in one sequence don't see each other."""
    seed: int
    """Decides the order together with the store's fingerprint and the epoch."""
    num_sequences: int
    """Sequences of one epoch."""
    total_positions: int
    """Sequences of the whole run; positions run on across epochs."""

    @classmethod
    def for_split(
        cls,
        split: TokenSplit,
        *,
        sequence_tokens: int,
        sequences_per_step: int,
        micro_batch_sequences: int,
        isolate_documents: bool,
        seed: int,
        max_steps: int | None = None,
        num_epochs: float | None = None,
    ) -> Self:
        """Plan a run over a split, bounded by steps or by epochs (part of one is allowed).

        Raises:
            ValueError: Not exactly one of the two bounds is given, a number is not positive, or
                the split has no sequence.
        """
        if (max_steps is None) == (num_epochs is None):
            raise ValueError(
                f"max_steps is {max_steps} and num_epochs is {num_epochs}; set exactly one of them"
            )
        numbers = {
            "sequence_tokens": sequence_tokens,
            "sequences_per_step": sequences_per_step,
            "micro_batch_sequences": micro_batch_sequences,
            "max_steps": 1 if max_steps is None else max_steps,
            "num_epochs": 1 if num_epochs is None else num_epochs,
        }
        for name, number in numbers.items():
            if number <= 0:
                raise ValueError(f"{name}: got {number}, wanted a number above 0")
        count = num_sequences(split.num_tokens, sequence_tokens)
        if count == 0:
            raise ValueError(
                f"the split has {split.num_tokens} tokens, wanted at least 2; add text to the "
                "sources of the token store"
            )
        if max_steps is None:
            total = math.ceil((num_epochs or 0) * count)
        else:
            total = max_steps * sequences_per_step
        return cls(
            sequence_tokens=sequence_tokens,
            sequences_per_step=sequences_per_step,
            micro_batch_sequences=micro_batch_sequences,
            isolate_documents=isolate_documents,
            seed=seed,
            num_sequences=count,
            total_positions=total,
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

    def num_micro_batches(self, world_size: int) -> int:
        """Forward passes of every worker in every step, also in a partial last one."""
        return _num_micro_batches(self.sequences_per_step, self.micro_batch_sequences, world_size)


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


def permuted_index(position: int, num_items: int, key: int) -> int:
    """Map a position to an item: a keyed bijection of range(num_items) in constant memory.

    A Feistel network over the next power of two; a result outside the range is fed in again
    (cycle walking), which keeps the bijection and takes less than two turns on average.

    Args:
        position: From 0 to `num_items - 1`.
        num_items: Size of the range.
        key: 64 bits that choose the permutation.

    Raises:
        IndexError: The position is outside the range.
    """
    if not 0 <= position < num_items:
        raise IndexError(f"position {position} of {num_items} items")
    bits = max(2, (num_items - 1).bit_length())
    index = _feistel(position, bits, key)
    while index >= num_items:
        index = _feistel(index, bits, key)
    return index


def sequence_at(position: int, plan: BatchPlan, fingerprint: str) -> int:
    """The index of the sequence that a run sees at a position.

    Args:
        position: From 0 on, across epochs.
        plan: The run's plan.
        fingerprint: The token store's.
    """
    epoch, place = divmod(position, plan.num_sequences)
    return permuted_index(place, plan.num_sequences, _order_key(fingerprint, plan.seed, epoch))


def read_steps(
    split: TokenSplit,
    fingerprint: str,
    plan: BatchPlan,
    *,
    rank: int,
    world_size: int,
    start_step: int = 0,
) -> Iterator[StepBatch]:
    """Stream one worker's batches from a step to the end of the run."""
    num_micro_batches = plan.num_micro_batches(world_size)
    num_rows = num_micro_batches * plan.micro_batch_sequences
    for step in range(start_step, plan.num_steps):
        positions = tuple(plan.positions(step, rank, world_size))
        sequences = [
            read_sequence(
                split,
                sequence_at(position, plan, fingerprint),
                plan.sequence_tokens,
                isolate_documents=plan.isolate_documents,
            )
            for position in positions
        ]
        num_filler = num_rows - len(sequences)
        sequences.extend([_filler(plan.sequence_tokens)] * num_filler)
        micro_batches = tuple(
            _stack(sequences[row : row + plan.micro_batch_sequences])
            for row in range(0, num_rows, plan.micro_batch_sequences)
        )
        yield StepBatch(step, micro_batches, positions, num_filler)


def num_evaluation_sequences(
    split: TokenSplit, sequence_tokens: int, max_sequences: int | None
) -> int:
    """Count the sequences of an evaluation; null `max_sequences` means all of the split."""
    count = num_sequences(split.num_tokens, sequence_tokens)
    return count if max_sequences is None else min(count, max_sequences)


def evaluation_bytes(split: TokenSplit, sequence_tokens: int, max_sequences: int | None) -> float:
    """Bytes of text that the sequences of an evaluation cover, for bits per byte."""
    count = num_evaluation_sequences(split, sequence_tokens, max_sequences)
    return split.bytes_between(0, min(count * sequence_tokens + 1, split.num_tokens))


def read_evaluation(
    split: TokenSplit,
    *,
    sequence_tokens: int,
    micro_batch_sequences: int,
    isolate_documents: bool,
    rank: int,
    world_size: int,
    max_sequences: int | None = None,
) -> Iterator[MicroBatch]:
    """Stream one worker's share of the first sequences of a split, in store order.

    Every worker gets the same number of micro-batches, with filler where sequences are missing:
    a forward pass of a partitioned model is collective.
    """
    count = num_evaluation_sequences(split, sequence_tokens, max_sequences)
    mine = range(rank, count, world_size)
    for number in range(_num_micro_batches(count, micro_batch_sequences, world_size)):
        first = number * micro_batch_sequences
        sequences = [
            read_sequence(split, index, sequence_tokens, isolate_documents=isolate_documents)
            for index in mine[first : first + micro_batch_sequences]
        ]
        missing = micro_batch_sequences - len(sequences)
        yield _stack(sequences + [_filler(sequence_tokens)] * missing)


def _num_micro_batches(sequences: int, micro_batch_sequences: int, world_size: int) -> int:
    largest_share = -(-sequences // world_size)
    return -(-largest_share // micro_batch_sequences)


def _filler(sequence_tokens: int) -> Sequence:
    return Sequence(
        np.full(sequence_tokens, PAD_ID, dtype=np.int64),
        np.full(sequence_tokens, IGNORED_LABEL, dtype=np.int64),
        np.arange(sequence_tokens, dtype=np.int64),
    )


def _stack(sequences: list[Sequence]) -> MicroBatch:
    return MicroBatch(
        torch.from_numpy(np.stack([sequence.ids_T for sequence in sequences])),
        torch.from_numpy(np.stack([sequence.labels_T for sequence in sequences])),
        torch.from_numpy(np.stack([sequence.positions_T for sequence in sequences])),
    )


def _order_key(fingerprint: str, seed: int, epoch: int) -> int:
    text = f"{fingerprint}/{seed}/{epoch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _feistel(value: int, bits: int, key: int) -> int:
    """Permute range(2 ** bits); an odd number of bits gives halves of two widths that swap."""
    right_bits = bits // 2
    left_bits = bits - right_bits
    left, right = value >> right_bits, value & ((1 << right_bits) - 1)
    for number in range(_NUM_ROUNDS):
        mixed = _splitmix64((key + number * _GOLDEN_64 + right * 0xD1342543DE82EF95) & _MASK_64)
        left, right = right, left ^ (mixed >> (64 - left_bits))
        left_bits, right_bits = right_bits, left_bits
    return left << right_bits | right


def _splitmix64(value: int) -> int:
    """Mix 64 bits: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + _GOLDEN_64) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
