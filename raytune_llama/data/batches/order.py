"""Order of a run's training sequences: pure functions of the position, in bounded memory.

    order = MixedOrder((9000, 400), block_quotas((0.7, 0.3), 8000))
    sample = order.sample(12, store.fingerprint, seed=1)

Without weights, every sequence of every source is seen once per epoch. With weights, the positions
are divided into blocks of equal length; every block holds the same exact number of sequences of a
source, and each source runs through its own epochs at its own pace.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_MASK_64 = (1 << 64) - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15
_BLOCK_POSITIONS = 1024
_NUM_ROUNDS = 8  # even, so that halves of unequal widths end up with their original widths


@dataclass(frozen=True)
class SampleIndex:
    """Identifies the sequence at one position of a run."""

    source: int
    """Index of the source among those with sequences."""
    index: int
    """Index of the sequence in its source, from 0."""
    epoch: int
    """Epoch of the source, from 0."""


class Order(Protocol):
    """Order in which a run sees the sequences of its sources."""

    @property
    def source_sequences(self) -> tuple[int, ...]:
        """Number of sequences per epoch of each source, all above 0."""
        ...

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the run's sequences per source."""
        ...

    def sample(self, position: int, fingerprint: str, seed: int) -> SampleIndex:
        """Return the sequence at a position.

        Args:
            position: Position in the run, from 0, counted across epochs.
            fingerprint: Fingerprint of the token store.
            seed: Seed of the run.
        """
        ...


@dataclass(frozen=True)
class EpochOrder:
    """Every sequence of every source once per epoch, reshuffled in each epoch."""

    source_sequences: tuple[int, ...]
    """Number of sequences of each source."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the sequences per source."""
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
    """Like `EpochOrder`, but shuffles groups of neighboring sequences instead of single ones.

    If sequences are sorted by length, those of a step have similar lengths. A partial last group
    makes later epochs begin within a step.
    """

    source_sequences: tuple[int, ...]
    """Number of sequences of each source."""
    group_sequences: int
    """Number of sequences per group."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the sequences per source."""
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
    """Blocks with a fixed quota per source; each source runs through its own epochs."""

    source_sequences: tuple[int, ...]
    """Number of sequences per epoch of each source."""
    quotas: tuple[int, ...]
    """Number of sequences per block of each source, all above 0."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the sequences per source."""
        total = sum(self.quotas)
        return tuple(quota / total for quota in self.quotas)

    def sample(self, position: int, fingerprint: str, seed: int) -> SampleIndex:
        """Return the sequence at a position.

        Each block assigns its positions to the sources by its own permutation. The n-th position of
        a source, over all blocks, holds the n-th sequence of the source's own shuffled epochs.
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
    """Assignment of a block's positions: source of each, and its rank among that source's."""

    sources: NDArray[np.int64]
    turns: NDArray[np.int64]


# A run moves on to the next block only after thousands of positions.
@lru_cache(maxsize=2)
def _deal(quotas: tuple[int, ...], key: int) -> _Dealt:
    slots = permuted_indices(sum(quotas), key)
    sources = np.searchsorted(np.cumsum(quotas), slots, side="right")
    turns = np.empty(len(slots), dtype=np.int64)
    for source, quota in enumerate(quotas):
        turns[sources == source] = np.arange(quota)
    return _Dealt(sources, turns)


def permuted_index(position: int, num_items: int, key: int) -> int:
    """Map a position to an item by a keyed permutation of range(num_items) in constant memory.

    A Feistel network over the next power of two; a result outside the range is fed in again
    (cycle walking), which keeps the bijection and takes less than two passes on average.

    Args:
        position: Position from 0 to `num_items - 1`.
        num_items: Number of items.
        key: 64-bit key that selects the permutation.

    Raises:
        IndexError: `position` is out of range.
    """
    if not 0 <= position < num_items:
        raise IndexError(f"position {position} of {num_items} items")
    block, place = divmod(position, _BLOCK_POSITIONS)
    return _permuted_block(block, num_items, key)[place]


def permuted_indices(num_items: int, key: int) -> NDArray[np.int64]:
    """Return `permuted_index` of all positions as one array, shape (num_items,)."""
    return _permuted(np.arange(num_items, dtype=np.uint64), num_items, key)


# Positions are requested in order, and numpy permutes a batch of them faster.
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


# The key of an epoch is needed at each of its positions.
@lru_cache(maxsize=64)
def derive_key(*parts: str | int) -> int:
    """Hash the parts, such as (fingerprint, seed, epoch), to a 64-bit key."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _locate(item: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Return which of the consecutive ranges holds an item, and its offset in that range."""
    for number, size in enumerate(sizes):
        if item < size:
            return number, item
        item -= size
    raise IndexError(f"item out of range: {item} past the end of {sum(sizes)} items")


# Takes uint64 arrays, which numpy's stubs type as signed as soon as an int is involved.
def _feistel(value: Any, bits: int, key: int) -> Any:  # noqa: ANN401  # see above
    """Permute range(2 ** bits); with odd `bits` the halves have unequal widths, which swap."""
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
    """Mix 64 bits with the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + _GOLDEN_64) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
