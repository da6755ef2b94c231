"""Fixed-length training sequences, cut from what one source has in a split's flat token stream.

    stretch = find_stretches(split)[0]
    sequences = cut_stretch(stretch, "isolated", 512, fingerprint=store.fingerprint, seed=1)
    first = sequences.read(Sample(source=0, index=0, epoch=0))

There are six forms, one class each. A sequence holds tokens of one source only.

- `isolated` and `joined` (packing): the stretch is cut every T tokens. A sequence predicts the T
  tokens that follow its own, so that neighbours overlap by one token and every token but the
  stretch's first is a target exactly once.
- `crops` (Finetune_LLAMA's loader): one window of T tokens of each document, a new one each epoch.
- `seed_blocks` (Chinese-LLaMA-Alpaca's `group_texts`): documents by the thousand, joined and cut,
  the remainder dropped.

- `fitted` and `padded` (`best_fit.py`): whole conversations, several in a sequence or one.

A window of `crops` and `seed_blocks` is T ids, as with the programs they follow, which shift labels
inside the model: it has T - 1 targets, and its first id is none.

Shapes: T = tokens of a sequence.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from raytune_llama.data.batches.order import SampleIndex, derive_key
from raytune_llama.data.store.token_store import TokenSplit

IGNORED_LABEL = -100
"""The label of a position that is not trained; PyTorch's cross entropy skips it."""

PAD_ID = 0
"""The id at padded positions. Any id of the vocabulary would do: nothing attends to it."""

GROUP_DOCUMENTS = 1000
"""Documents that `seed_blocks` joins: what the datasets library hands to a mapped function."""

SequenceForm = Literal["isolated", "joined", "crops", "seed_blocks", "fitted", "padded"]
"""How a source is cut into sequences; see the head of this file."""

EvaluationForm = Literal["isolated", "joined", "fitted"]
"""How validation text is cut: so that all of it is seen once."""

_NO_IDS = np.empty(0, dtype=np.uint16)
_NO_STARTS = np.empty(0, dtype=np.int64)
_CHUNK_DOCUMENTS = 1 << 16  # bounds the memory of a pass over the documents' lengths


@dataclass(frozen=True, slots=True, eq=False)
class PackedSequence:
    """One training sequence, as views of the token stream; nothing is copied before `write`."""

    ids: NDArray[np.unsignedinteger]
    """Its real ids, at most T."""
    labels: NDArray[np.unsignedinteger]
    """The id that follows each of the first of them."""
    starts: NDArray[np.int64] = field(default_factory=lambda: _NO_STARTS)
    """Where a document begins that must not see the one before it, above 0, up to `len(labels)`;
    the label before such a place is none."""
    targets: NDArray[np.bool_] | None = None
    """Which labels are trained, none before a start; None: all others."""

    @property
    def num_targets(self) -> int:
        """Labels that are trained."""
        if self.targets is not None:
            return int(np.count_nonzero(self.targets))
        return len(self.labels) - len(self.starts)

    def write(
        self, ids_T: NDArray[np.int64], labels_T: NDArray[np.int64], positions_T: NDArray[np.int64]
    ) -> None:
        """Write the sequence into a row of each tensor.

        Args:
            ids_T: Input ids, `PAD_ID` behind the last real one.
            labels_T: The id that follows each input, or `IGNORED_LABEL`.
            positions_T: Position ids; they restart at 0 where a document begins, and where the
                padding does, a segment of its own.
        """
        length, num_ids = len(ids_T), len(self.ids)
        ids_T[:num_ids] = self.ids
        ids_T[num_ids:] = PAD_ID
        labels_T[: len(self.labels)] = self.labels
        labels_T[len(self.labels) :] = IGNORED_LABEL
        labels_T[self.starts - 1] = IGNORED_LABEL
        if self.targets is not None:
            labels_T[: len(self.labels)][~self.targets] = IGNORED_LABEL
        bounds = np.empty(len(self.starts) + 3, dtype=np.int64)
        bounds[0], bounds[1:-2], bounds[-2:] = 0, self.starts, (num_ids, length)
        origins = np.repeat(bounds[:-1], bounds[1:] - bounds[:-1])
        np.subtract(_counting(length), origins, out=positions_T)


FILLER = PackedSequence(_NO_IDS, _NO_IDS)
"""A sequence without targets, to fill a shape."""


@dataclass(frozen=True)
class SourceSpan:
    """What one source has in a split."""

    split: TokenSplit
    """Where the tokens are."""
    tokens: range
    """Its part of the flat stream."""
    documents: range
    """Its documents by their numbers in the split."""


class SourceSequences(Protocol):
    """The sequences of one source in one form."""

    @property
    def sequence_tokens(self) -> int:
        """T."""
        ...

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the source."""
        ...

    @property
    def num_read_tokens(self) -> int:
        """Tokens of the source that an epoch reads; the rest is in none of its sequences."""
        ...

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Cut one sequence out.

        Raises:
            IndexError: There is no such sequence.
        """
        ...

    def documents(self, sample: SampleIndex) -> Iterable[int]:
        """Return the numbers, in the split, of the documents that a sequence has tokens of."""
        ...


@dataclass(frozen=True)
class JoinedSequences:
    """A stretch cut every T tokens, as one text."""

    source_span: SourceSpan
    """What is cut."""
    sequence_tokens: int
    """T."""

    @property
    def num_sequences(self) -> int:
        """Sequences of the stretch; the last one may be short."""
        return num_sequences(len(self.source_span.tokens), self.sequence_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens of the stretch."""
        return len(self.source_span.tokens)

    @property
    def num_read_tokens(self) -> int:
        """All tokens of the stretch."""
        return self.num_tokens

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Cut one sequence out; the padding of a short one is a segment of its own."""
        span = self._span(sample.index)
        tokens = self.source_span.split.tokens(span.start, span.stop)
        return PackedSequence(tokens[:-1], tokens[1:])

    def documents(self, sample: SampleIndex) -> range:
        """Return the documents of a sequence, that of its last target too."""
        span = self._span(sample.index)
        return self.source_span.split.documents_between(span.start, span.stop)

    def covered_range(self, index: int) -> range:
        """Return the part of the flat stream that one sequence accounts for: its targets.

        The first sequence accounts for the stretch's first token too, so that all together
        account for each token of the stretch once.
        """
        span = self._span(index)
        return range(span.start + (index > 0), span.stop)

    def _span(self, index: int) -> range:
        """Return the flat positions of a sequence's ids and of the target behind them."""
        check_index(index, self.num_sequences)
        start = self.source_span.tokens.start + index * self.sequence_tokens
        return range(start, min(start + self.sequence_tokens + 1, self.source_span.tokens.stop))


@dataclass(frozen=True)
class IsolatedSequences(JoinedSequences):
    """The same cut; positions restart at each document, and none predicts the next one's start."""

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Cut one sequence out; the padding of a short one is a segment of its own."""
        span = self._span(sample.index)
        split = self.source_span.split
        tokens = split.tokens(span.start, span.stop)
        starts = split.document_starts(span.start + 1, span.stop) - span.start
        return PackedSequence(tokens[:-1], tokens[1:], starts)


@dataclass(frozen=True)
class Crops:
    """One window of T tokens of each document and epoch; a shorter document is padded.

    Where a window starts is a pure function of (fingerprint, seed, epoch, document), uniform over
    all starts that leave it whole.
    """

    source_span: SourceSpan
    """The documents."""
    sequence_tokens: int
    """T."""
    fingerprint: str
    """The token store's."""
    seed: int
    """The run's."""

    @property
    def num_sequences(self) -> int:
        """One for each document."""
        return len(self.source_span.documents)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.source_span.tokens)

    @property
    def num_read_tokens(self) -> int:
        """Tokens of an epoch's windows; reads the length of every document once."""
        documents, total = self.source_span.documents, 0
        for first in range(documents.start, documents.stop, _CHUNK_DOCUMENTS):
            stop = min(first + _CHUNK_DOCUMENTS, documents.stop)
            starts = self.source_span.split.token_starts(np.arange(first, stop + 1))
            total += int(np.minimum(np.diff(starts), self.sequence_tokens).sum())
        return total

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Cut an epoch's window out of a document."""
        check_index(sample.index, self.num_sequences)
        document = self.source_span.documents[sample.index]
        starts = self.source_span.split.token_starts(np.array([document, document + 1]))
        start, stop = (int(bound) for bound in starts)
        num_starts = stop - start - self.sequence_tokens + 1
        if num_starts > 1:
            key = derive_key(self.fingerprint, self.seed, "crop", sample.epoch, document)
            # The high half of a 128-bit product: uniform but for one part in 2**64 / num_starts.
            start += key * num_starts >> 64
        ids = self.source_span.split.tokens(start, min(start + self.sequence_tokens, stop))
        return PackedSequence(ids, ids[1:])

    def documents(self, sample: SampleIndex) -> range:
        """Return the one document that a window is of."""
        check_index(sample.index, self.num_sequences)
        return self.source_span.documents[sample.index : sample.index + 1]


@dataclass(frozen=True, eq=False)
class GroupTextsBlocks:
    """The blocks of Chinese-LLaMA-Alpaca's `group_texts`, with what it loses.

    The documents of a source file are taken `GROUP_DOCUMENTS` at a time and joined. A group of at
    least T tokens gives whole blocks, and its remainder is dropped; a smaller one gives one short
    block. Nothing is masked inside a block and positions are not reset. Two deviations: the
    original counts blank lines, each a lone BOS, while a store has no blank documents; and it
    takes validation blocks out afterwards, while a store takes documents out before.
    """

    source_span: SourceSpan
    """The documents."""
    sequence_tokens: int
    """T."""
    group_bounds: NDArray[np.int64]
    """Flat positions at which the groups start, and the end of the last one."""
    block_ends: NDArray[np.int64]
    """Blocks up to the end of each group."""

    @classmethod
    def from_span(cls, stretch: SourceSpan, sequence_tokens: int) -> Self:
        """Group a stretch's documents."""
        documents, split = stretch.documents, stretch.split
        files = [*split.file_starts(documents).tolist(), documents.stop]
        first_documents = [
            np.arange(start, stop, GROUP_DOCUMENTS) for start, stop in pairwise(files)
        ]
        bounds = split.token_starts(np.concatenate([*first_documents, [documents.stop]]))
        # A document has at least one token, so that no group is empty.
        num_blocks = np.maximum(np.diff(bounds) // sequence_tokens, 1)
        return cls(stretch, sequence_tokens, bounds, np.cumsum(num_blocks))

    @property
    def num_sequences(self) -> int:
        """Blocks of all groups."""
        return int(self.block_ends[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, the dropped ones too."""
        return len(self.source_span.tokens)

    @property
    def num_read_tokens(self) -> int:
        """Tokens that are in a block."""
        sizes = np.diff(self.group_bounds)
        num_blocks = np.diff(self.block_ends, prepend=0)
        return int(np.minimum(sizes, num_blocks * self.sequence_tokens).sum())

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Cut one block out."""
        span = self._span(sample.index)
        ids = self.source_span.split.tokens(span.start, span.stop)
        return PackedSequence(ids, ids[1:])

    def documents(self, sample: SampleIndex) -> range:
        """Return the documents of a block."""
        span = self._span(sample.index)
        return self.source_span.split.documents_between(span.start, span.stop)

    def _span(self, index: int) -> range:
        """Return the flat positions of a block."""
        check_index(index, self.num_sequences)
        group = int(np.searchsorted(self.block_ends, index, side="right"))
        blocks_before = int(self.block_ends[group - 1]) if group else 0
        group_start, group_stop = (int(bound) for bound in self.group_bounds[group : group + 2])
        start = group_start + (index - blocks_before) * self.sequence_tokens
        return range(start, min(start + self.sequence_tokens, group_stop))


def num_sequences(num_tokens: int, sequence_tokens: int) -> int:
    """Count the packed sequences of a stretch; one of a single token has none.

    Args:
        num_tokens: Tokens of the stretch.
        sequence_tokens: T.
    """
    return max(0, -(-(num_tokens - 1) // sequence_tokens))


def find_source_spans(split: TokenSplit) -> dict[int, SourceSpan]:
    """Return what each configured source has in a split; one without documents is left out."""
    documents = split.source_documents()
    return {
        source: SourceSpan(split, tokens, documents[source])
        for source, tokens in split.source_ranges().items()
    }


def check_index(index: int, count: int) -> None:
    """Raise IndexError where a source has no such sequence."""
    if not 0 <= index < count:
        raise IndexError(f"sequence {index} of a source with {count} sequences")


@lru_cache(maxsize=4)
def _counting(length: int) -> NDArray[np.int64]:
    return np.arange(length, dtype=np.int64)
