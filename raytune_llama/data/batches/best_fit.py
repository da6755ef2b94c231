"""Sequences of complete conversations, packed or padded, and the dispatch over all sequence forms.

    sequences = cut_sequences(span, "fitted", 512, fingerprint=store.fingerprint, seed=1)

- `fitted`: conversations are packed by best-fit decreasing: the longest first, each where it leaves
  the least room. No conversation is cut, and none attends to another.
- `padded`: one conversation per sequence, sorted by length, so that neighbors have similar lengths;
  a batch is as long as its longest sequence.

Labels follow the store's loss mask. Shapes: T = sequence length in tokens.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from raytune_llama.data.batches.config import EvaluationForm, SequenceForm
from raytune_llama.data.batches.order import SampleIndex
from raytune_llama.data.batches.packing import (
    Crops,
    GroupTextsBlocks,
    IsolatedSequences,
    JoinedSequences,
    PackedSequence,
    SourceSequences,
    SourceSpan,
    check_index,
)


@dataclass(frozen=True, eq=False)
class WholeDocuments:
    """Sequences of complete documents that do not attend to each other."""

    source_span: SourceSpan
    """Source documents to cut into sequences."""
    sequence_tokens: int
    """Sequence length T in tokens; no document is longer."""
    order: NDArray[np.int64]
    """Document numbers in the split, grouped by sequence."""
    bounds: NDArray[np.int64]
    """Start of each sequence in `order`, and the end of the last one."""

    @classmethod
    def fitted(cls, source_span: SourceSpan, sequence_tokens: int) -> Self:
        """Pack several documents into each sequence by best fit."""
        sequence_of = best_fit(_lengths(source_span, sequence_tokens), sequence_tokens)
        # A stable sort keeps the documents of a sequence in store order.
        order = np.argsort(sequence_of, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(sequence_of))])
        return cls(source_span, sequence_tokens, order + source_span.documents.start, bounds)

    @classmethod
    def padded(cls, source_span: SourceSpan, sequence_tokens: int) -> Self:
        """Put each document into a sequence of its own, the shortest first."""
        order = np.argsort(_lengths(source_span, sequence_tokens), kind="stable")
        bounds = np.arange(len(order) + 1)
        return cls(source_span, sequence_tokens, order + source_span.documents.start, bounds)

    @property
    def num_sequences(self) -> int:
        """Number of sequences per epoch."""
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents."""
        return len(self.source_span.tokens)

    @property
    def num_read_tokens(self) -> int:
        """Number of tokens read per epoch: all of them."""
        return self.num_tokens

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Read one sequence by concatenating its documents."""
        return _concatenate_documents(self.source_span, self._members(sample.index))

    def documents(self, sample: SampleIndex) -> list[int]:
        """Return the document numbers of a sequence, in its order."""
        return self._members(sample.index).tolist()

    def _members(self, index: int) -> NDArray[np.int64]:
        check_index(index, self.num_sequences)
        start, stop = (int(bound) for bound in self.bounds[index : index + 2])
        return self.order[start:stop]


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Pack items into bins by best-fit decreasing: longest first, where it leaves the least room.

    Uses at most 11/9 of the optimal number of bins, plus one (Johnson 1974, SIAM J. Comput. 3).

    Args:
        lengths: Length of each item, from 1 to `capacity`.
        capacity: Capacity of a bin.

    Returns:
        Bin index of each item, from 0.
    """
    bin_of = np.empty(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = num_bins = 0  # bit n of `rooms`: some bin has room for n
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen, num_bins = capacity, num_bins, num_bins + 1
        bin_of[item] = chosen
        if room > length:
            by_room[room - length].append(chosen)
            rooms |= 1 << (room - length)
    return bin_of


def _lengths(source_span: SourceSpan, sequence_tokens: int) -> NDArray[np.int64]:
    documents = np.arange(source_span.documents.start, source_span.documents.stop + 1)
    lengths = np.diff(source_span.split.token_starts(documents))
    assert lengths.max(initial=0) <= sequence_tokens, "conversations are cut when they are encoded"
    return lengths


def _concatenate_documents(source_span: SourceSpan, documents: NDArray[np.int64]) -> PackedSequence:
    """Concatenate documents to one sequence in which they do not attend to each other."""
    split = source_span.split
    spans = split.token_starts(np.stack([documents, documents + 1], axis=1).ravel()).reshape(-1, 2)
    ids = [split.tokens(start, stop) for start, stop in spans.tolist()]
    starts = np.cumsum([len(some) for some in ids])[:-1]
    flat = ids[0] if len(ids) == 1 else np.concatenate(ids)
    if not split.has_targets:
        return PackedSequence(flat, flat[1:], starts)
    masks = [split.targets(start, stop) for start, stop in spans.tolist()]
    targets = np.concatenate(masks)[1:]
    targets[starts - 1] = False  # a document's first token cannot be predicted
    return PackedSequence(flat, flat[1:], starts, targets)


def cut_evaluation_sequences(
    source_span: SourceSpan, form: EvaluationForm, sequence_tokens: int
) -> SourceSequences:
    """Cut a source span into its evaluation sequences."""
    match form:
        case "isolated":
            return IsolatedSequences(source_span, sequence_tokens)
        case "joined":
            return JoinedSequences(source_span, sequence_tokens)
        case "fitted":
            return WholeDocuments.fitted(source_span, sequence_tokens)


def cut_sequences(
    source_span: SourceSpan,
    form: SequenceForm,
    sequence_tokens: int,
    *,
    fingerprint: str,
    seed: int,
) -> SourceSequences:
    """Cut a source span into sequences.

    Args:
        source_span: Part of a split that belongs to one source.
        form: Sequence form; see `packing.py`.
        sequence_tokens: Sequence length T in tokens.
        fingerprint: Fingerprint of the token store; decides the crops together with `seed`.
        seed: Seed of the run.
    """
    match form:
        case "crops":
            return Crops(source_span, sequence_tokens, fingerprint, seed)
        case "seed_blocks":
            return GroupTextsBlocks.from_span(source_span, sequence_tokens)
        case "padded":
            return WholeDocuments.padded(source_span, sequence_tokens)
        case packed:
            return cut_evaluation_sequences(source_span, packed, sequence_tokens)
