"""Sequences of whole conversations: several in one, or one each; and the choice of every form.

    sequences = cut_stretch(stretch, "fitted", 512, fingerprint=store.fingerprint, seed=1)

- `fitted`: conversations are put together by best fit, the longest first, each where it leaves the
  least room. None is cut, and none sees another.
- `padded`: one conversation a sequence, numbered by their lengths, so that neighbours are about as
  long; a batch is as long as its longest.

A label is trained where the store says that its token is learned. Shapes: T = tokens of a sequence.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from raytune_llama.data.batches.order import SampleIndex
from raytune_llama.data.batches.packing import (
    Crops,
    EvaluationForm,
    GroupTextsBlocks,
    IsolatedSequences,
    JoinedSequences,
    PackedSequence,
    SequenceForm,
    SourceSequences,
    SourceSpan,
    check_index,
)


@dataclass(frozen=True, eq=False)
class WholeDocuments:
    """Sequences of whole documents, none of which sees another."""

    source_span: SourceSpan
    """The documents."""
    sequence_tokens: int
    """T; no document is longer."""
    order: NDArray[np.int64]
    """All documents of the stretch by their numbers in the split, sequence after sequence."""
    bounds: NDArray[np.int64]
    """Where each sequence begins among them, and the end of the last."""

    @classmethod
    def fitted(cls, stretch: SourceSpan, sequence_tokens: int) -> Self:
        """Put as many documents as fit into each sequence."""
        sequence_of = best_fit(_lengths(stretch, sequence_tokens), sequence_tokens)
        # Documents of one sequence in their own order.
        order = np.argsort(sequence_of, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(sequence_of))])
        return cls(stretch, sequence_tokens, order + stretch.documents.start, bounds)

    @classmethod
    def padded(cls, stretch: SourceSpan, sequence_tokens: int) -> Self:
        """Give each document a sequence, the shortest first."""
        order = np.argsort(_lengths(stretch, sequence_tokens), kind="stable")
        bounds = np.arange(len(order) + 1)
        return cls(stretch, sequence_tokens, order + stretch.documents.start, bounds)

    @property
    def num_sequences(self) -> int:
        """Sequences of the stretch."""
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.source_span.tokens)

    @property
    def num_read_tokens(self) -> int:
        """All tokens."""
        return self.num_tokens

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Put the documents of a sequence together."""
        return _concatenate_documents(self.source_span, self._members(sample.index))

    def documents(self, sample: SampleIndex) -> list[int]:
        """Return the documents of a sequence, in its order."""
        return self._members(sample.index).tolist()

    def _members(self, index: int) -> NDArray[np.int64]:
        check_index(index, self.num_sequences)
        start, stop = (int(bound) for bound in self.bounds[index : index + 2])
        return self.order[start:stop]


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Put items into bins by best fit decreasing: the longest first, where it leaves least room.

    Uses at most 11/9 of the least number of bins, and one more (Johnson 1974, SIAM J. Comput. 3).

    Args:
        lengths: Of each item, from 1 to `capacity`.
        capacity: Of a bin.

    Returns:
        The bin of each item, from 0.
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


def _lengths(stretch: SourceSpan, sequence_tokens: int) -> NDArray[np.int64]:
    documents = np.arange(stretch.documents.start, stretch.documents.stop + 1)
    lengths = np.diff(stretch.split.token_starts(documents))
    assert lengths.max(initial=0) <= sequence_tokens, "conversations are cut when they are encoded"
    return lengths


def _concatenate_documents(stretch: SourceSpan, documents: NDArray[np.int64]) -> PackedSequence:
    """Return documents as one sequence, none of which sees another."""
    split = stretch.split
    spans = split.token_starts(np.stack([documents, documents + 1], axis=1).ravel()).reshape(-1, 2)
    ids = [split.tokens(start, stop) for start, stop in spans.tolist()]
    starts = np.cumsum([len(some) for some in ids])[:-1]
    flat = ids[0] if len(ids) == 1 else np.concatenate(ids)
    if not split.has_targets:
        return PackedSequence(flat, flat[1:], starts)
    masks = [split.targets(start, stop) for start, stop in spans.tolist()]
    targets = np.concatenate(masks)[1:]
    targets[starts - 1] = False  # a document's first token follows from nothing
    return PackedSequence(flat, flat[1:], starts, targets)


def cut_evaluation_sequences(
    stretch: SourceSpan, form: EvaluationForm, sequence_tokens: int
) -> SourceSequences:
    """Cut a stretch into the sequences that it is evaluated by."""
    match form:
        case "isolated":
            return IsolatedSequences(stretch, sequence_tokens)
        case "joined":
            return JoinedSequences(stretch, sequence_tokens)
        case "fitted":
            return WholeDocuments.fitted(stretch, sequence_tokens)


def cut_sequences(
    stretch: SourceSpan, form: SequenceForm, sequence_tokens: int, *, fingerprint: str, seed: int
) -> SourceSequences:
    """Cut a stretch into sequences.

    Args:
        stretch: What a source has in a split.
        form: How it is cut.
        sequence_tokens: T.
        fingerprint: The token store's; with `seed` it decides where crops start.
        seed: The run's.
    """
    match form:
        case "crops":
            return Crops(stretch, sequence_tokens, fingerprint, seed)
        case "seed_blocks":
            return GroupTextsBlocks.from_span(stretch, sequence_tokens)
        case "padded":
            return WholeDocuments.padded(stretch, sequence_tokens)
        case packed:
            return cut_evaluation_sequences(stretch, packed, sequence_tokens)
