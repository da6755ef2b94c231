"""Which sequence stands at which position of a run: pure functions in bounded memory.

    order = MixedOrder((9000, 400), block_quotas((0.7, 0.3), 8000))
    sample = order.sample(12, store.fingerprint, seed=1)

Without weights every sequence of every source is seen once an epoch. With weights the positions
come in blocks of equal length, in each of which every source has the same exact number of
sequences, and each source goes through epochs of its own at its own pace.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_BLOCK_SEQUENCES = 10_000
"""Positions of a block, at most; a shorter run is one block."""

_MASK_64 = (1 << 64) - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15
_BLOCK_POSITIONS = 1024
_NUM_ROUNDS = 8  # even, so that the halves of an odd number of bits end at their own widths


@dataclass(frozen=True)
class SampleIndex:
    """The sequence at a position."""

    source: int
    """Its source's place among the sources that have sequences."""
    index: int
    """Which of the source's sequences, from 0."""
    epoch: int
    """How often the source was gone through before, from 0."""


class Order(Protocol):
    """The order in which a run sees the sequences of its sources."""

    @property
    def source_sequences(self) -> tuple[int, ...]:
        """Sequences of an epoch of each source, all above 0."""
        ...

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the run's sequences that each source has."""
        ...

    def sample(self, position: int, fingerprint: str, seed: int) -> SampleIndex:
        """Return the sequence at a position.

        Args:
            position: From 0 on, across epochs.
            fingerprint: The token store's.
            seed: The run's.
        """
        ...


@dataclass(frozen=True)
class EpochOrder:
    """Every sequence of every source once an epoch, shuffled anew in each."""

    source_sequences: tuple[int, ...]
    """Sequences of each source."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the sequences that each source has, in an epoch."""
        total = sum(self.source_sequences)
        return tuple(count / total for count in self.source_sequences)

    def sample(self, position: int, fingerprint: str, seed: int) -> SampleIndex:
        """Return the sequence at a position."""
        total = sum(self.source_sequences)
        epoch, place = divmod(position, total)
        item = permuted_index(place, total, derive_key(fingerprint, seed, epoch))
        source, index = _locate(item, self.source_sequences)
        return SampleIndex(source, index, epoch)


@dataclass(frozen=True)
class GroupedOrder:
    """As `EpochOrder`, but neighbours stay together: whole groups of sequences are shuffled.

    Where sequences are numbered by length, those of a step are about as long. What the last group
    lacks makes later epochs begin inside a step.
    """

    source_sequences: tuple[int, ...]
    """Sequences of each source."""
    group_sequences: int
    """Neighbours that stay together."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the sequences that each source has, in an epoch."""
        return EpochOrder(self.source_sequences).shares

    def sample(self, position: int, fingerprint: str, seed: int) -> SampleIndex:
        """Return the sequence at a position."""
        total, size = sum(self.source_sequences), self.group_sequences
        epoch, place = divmod(position, total)
        group, inside = divmod(place, size)
        if group < total // size:
            group = permuted_index(group, total // size, derive_key(fingerprint, seed, epoch))
        source, index = _locate(group * size + inside, self.source_sequences)
        return SampleIndex(source, index, epoch)


@dataclass(frozen=True)
class MixedOrder:
    """Blocks in which each source has its quota; each goes through epochs of its own."""

    source_sequences: tuple[int, ...]
    """Sequences of an epoch of each source."""
    quotas: tuple[int, ...]
    """Sequences of each source in a block, all above 0."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the sequences that each source has, in a block."""
        total = sum(self.quotas)
        return tuple(quota / total for quota in self.quotas)

    def sample(self, position: int, fingerprint: str, seed: int) -> SampleIndex:
        """Return the sequence at a position.

        The places of a block are dealt to the sources by a permutation of its own. The n-th place
        of a source, over all blocks, has the n-th sequence of the source's own shuffled epochs.
        """
        block, place = divmod(position, sum(self.quotas))
        dealt = _deal(self.quotas, derive_key(fingerprint, seed, "block", block))
        source, turn = int(dealt.sources[place]), int(dealt.turns[place])
        count = self.source_sequences[source]
        epoch, place = divmod(block * self.quotas[source] + turn, count)
        key = derive_key(fingerprint, seed, "source", source, epoch)
        return SampleIndex(source, permuted_index(place, count, key), epoch)


@dataclass(frozen=True, eq=False)
class _Dealt:
    """The places of a block: the source of each, and its number among that source's places."""

    sources: NDArray[np.int64]
    turns: NDArray[np.int64]


# A function of its arguments; a run goes on to the next block after thousands of positions.
@lru_cache(maxsize=2)
def _deal(quotas: tuple[int, ...], key: int) -> _Dealt:
    slots = permuted_indices(sum(quotas), key)
    sources = np.searchsorted(np.cumsum(quotas), slots, side="right")
    turns = np.empty(len(slots), dtype=np.int64)
    for source, quota in enumerate(quotas):
        turns[sources == source] = np.arange(quota)
    return _Dealt(sources, turns)


def block_sequences(total_positions: int) -> int:
    """Return the length of a block: as many equal blocks as a run needs, the last almost full."""
    num_blocks = -(-total_positions // MAX_BLOCK_SEQUENCES)
    return -(-total_positions // num_blocks)


def block_quotas(weights: Sequence[float], total_positions: int) -> tuple[int, ...]:
    """Return how many sequences of a block each source has; 0 where its weight is too small.

    Args:
        weights: Of the sources, relative to each other, all above 0.
        total_positions: Sequences of the run, above 0.
    """
    return tuple(apportion(weights, block_sequences(total_positions)))


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Divide a number of things by weights exactly: the method of the largest remainder."""
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) * total for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda n: (counts[n] - shares[n], n))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


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
    block, place = divmod(position, _BLOCK_POSITIONS)
    return _permuted_block(block, num_items, key)[place]


def permuted_indices(num_items: int, key: int) -> NDArray[np.int64]:
    """Return `permuted_index` of all positions, in memory for that many numbers."""
    return _permuted(np.arange(num_items, dtype=np.uint64), num_items, key)


# Positions are asked for one behind the other, and numpy permutes them faster together.
@lru_cache(maxsize=64)
def _permuted_block(block: int, num_items: int, key: int) -> list[int]:
    start = block * _BLOCK_POSITIONS
    stop = min(start + _BLOCK_POSITIONS, num_items)
    return _permuted(np.arange(start, stop, dtype=np.uint64), num_items, key).tolist()


def _permuted(positions: NDArray[np.uint64], num_items: int, key: int) -> NDArray[np.int64]:
    bits = max(2, (num_items - 1).bit_length())
    indices = _feistel(positions, bits, key)
    while (outside := indices >= num_items).any():
        indices[outside] = _feistel(indices[outside], bits, key)
    return indices.astype(np.int64)


# An epoch's key is asked for at every position of it.
@lru_cache(maxsize=64)
def derive_key(*parts: str | int) -> int:
    """Hash what names a choice, such as (fingerprint, seed, epoch), to 64 bits."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _locate(item: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Return in which of some adjoining ranges an item lies, and where in it."""
    for number, size in enumerate(sizes):
        if item < size:
            return number, item
        item -= size
    raise IndexError(f"item {item} behind the last of {sum(sizes)}")


# Arrays of uint64, which numpy's stubs take for signed ones as soon as an int is involved.
def _feistel(value: Any, bits: int, key: int) -> Any:  # noqa: ANN401  # see above
    """Permute range(2 ** bits); an odd number of bits gives halves of two widths that swap."""
    right_bits = bits // 2
    left_bits = bits - right_bits
    left, right = value >> right_bits, value & ((1 << right_bits) - 1)
    for number in range(_NUM_ROUNDS):
        round_key = (key + number * _GOLDEN_64) & _MASK_64
        mixed = _splitmix64((right * 0xD1342543DE82EF95 + round_key) & _MASK_64)
        left, right = right, left ^ (mixed >> (64 - left_bits))
        left_bits, right_bits = right_bits, left_bits
    return left << right_bits | right


def _splitmix64(value: Any) -> Any:  # noqa: ANN401  # as above
    """Mix 64 bits: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + _GOLDEN_64) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
