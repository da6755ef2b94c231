"""Fixed-length training sequences, cut from a source's span of a split's flat token stream.

    span = find_source_spans(split)[0]
    sequences = cut_sequences(span, "isolated", 512, fingerprint=store.fingerprint, seed=1)
    first = sequences.read(SampleIndex(source=0, index=0, epoch=0))

A sequence holds tokens of one source only. It has one of six forms:

- `isolated` and `joined` (packing): the span is cut every T tokens. The labels of a sequence are
  its T tokens shifted by one, so that neighbors overlap by one token and every token but the
  span's first is a target exactly once.
- `crops` (Finetune_LLAMA's dataloader): one window of T tokens per document, a new one each epoch.
- `seed_blocks` (Chinese-LLaMA-Alpaca's `group_texts`): documents are concatenated 1000 at a time
  and cut, the remainder is dropped.
- `fitted` and `padded` (`best_fit.py`): complete conversations, several per sequence or one.

A window of `crops` and `seed_blocks` is T ids, as in the original programs, which shift labels
inside the model: it has T - 1 targets, its first id is not one.

Shapes: T = sequence length in tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from raytune_llama.data.batches.order import SampleIndex, derive_key
from raytune_llama.data.store.token_store import TokenSplit

IGNORED_LABEL = -100
"""Label of positions without a target: the `ignore_index` of PyTorch's cross entropy."""

PAD_ID = 0
"""Id at padded positions. Any id of the vocabulary would do: no real position attends to it."""

GROUP_DOCUMENTS = 1000
"""Number of documents that `seed_blocks` concatenates: the default batch size of `datasets.map`."""


_NO_IDS = np.empty(0, dtype=np.uint16)
_NO_STARTS = np.empty(0, dtype=np.int64)
_CHUNK_DOCUMENTS = 1 << 16  # bounds the memory of a pass over the document lengths


@dataclass(frozen=True, slots=True, eq=False)
class PackedSequence:
    """One training sequence as views of the token stream; nothing is copied before `write`."""

    ids: NDArray[np.unsignedinteger]
    """Input ids without padding, at most T."""
    labels: NDArray[np.unsignedinteger]
    """Next id of each input id, from the first on."""
    starts: NDArray[np.int64] = field(default_factory=lambda: _NO_STARTS)
    """Indices from 1 to `len(labels)` at which a document begins that must not attend to the one
    before it; the label just before such an index is ignored."""
    targets: NDArray[np.bool_] | None = None
    """Loss mask over `labels`, false just before a start; None: all other labels are targets."""

    @property
    def num_targets(self) -> int:
        """Number of labels that are loss targets."""
        if self.targets is not None:
            return int(np.count_nonzero(self.targets))
        return len(self.labels) - len(self.starts)

    def write(
        self, ids_T: NDArray[np.int64], labels_T: NDArray[np.int64], positions_T: NDArray[np.int64]
    ) -> None:
        """Write the sequence into a row of each tensor.

        Args:
            ids_T: Input ids, followed by `PAD_ID`.
            labels_T: Next id of each input, or `IGNORED_LABEL`.
            positions_T: Position ids; they restart at 0 at each document in `starts` and at the
                padding, which is a segment of its own.
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
"""Empty sequence without targets, which fills a micro-batch to its shape."""


@dataclass(frozen=True)
class SourceSpan:
    """One source's part of a split."""

    split: TokenSplit
    """Split that holds the tokens."""
    tokens: range
    """Range of the split's flat token stream."""
    documents: range
    """Range of document numbers in the split."""


class SourceSequences(Protocol):
    """Sequences of one source in one form."""

    @property
    def sequence_tokens(self) -> int:
        """Sequence length T in tokens."""
        ...

    @property
    def num_sequences(self) -> int:
        """Number of sequences per epoch."""
        ...

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the source."""
        ...

    @property
    def num_read_tokens(self) -> int:
        """Number of tokens read per epoch; the other tokens are in none of its sequences."""
        ...

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Read one sequence.

        Raises:
            IndexError: `sample.index` is out of range.
        """
        ...

    def documents(self, sample: SampleIndex) -> Iterable[int]:
        """Return the numbers, in the split, of the documents with tokens in a sequence."""
        ...


@dataclass(frozen=True)
class JoinedSequences:
    """A source span cut every T tokens; documents attend to each other across boundaries."""

    source_span: SourceSpan
    """Source span to cut."""
    sequence_tokens: int
    """Sequence length T in tokens."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences; the last one may be short."""
        return num_sequences(len(self.source_span.tokens), self.sequence_tokens)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the span."""
        return len(self.source_span.tokens)

    @property
    def num_read_tokens(self) -> int:
        """Number of tokens read per epoch: all of them."""
        return self.num_tokens

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Read one sequence; the padding of a short one is a segment of its own."""
        span = self._span(sample.index)
        tokens = self.source_span.split.tokens(span.start, span.stop)
        return PackedSequence(tokens[:-1], tokens[1:])

    def documents(self, sample: SampleIndex) -> range:
        """Return the document numbers of a sequence, including that of its last target."""
        span = self._span(sample.index)
        return self.source_span.split.documents_between(span.start, span.stop)

    def covered_range(self, index: int) -> range:
        """Return the range of the flat stream that a sequence covers: its targets.

        The first sequence also covers the span's first token, so that the sequences together cover
        each token of the span exactly once.
        """
        span = self._span(index)
        return range(span.start + (index > 0), span.stop)

    def _span(self, index: int) -> range:
        """Return the flat positions of a sequence's ids and of the last target after them."""
        check_index(index, self.num_sequences)
        start = self.source_span.tokens.start + index * self.sequence_tokens
        return range(start, min(start + self.sequence_tokens + 1, self.source_span.tokens.stop))


@dataclass(frozen=True)
class IsolatedSequences(JoinedSequences):
    """`JoinedSequences` with isolated documents: positions restart, first tokens are no targets."""

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Read one sequence; the padding of a short one is a segment of its own."""
        span = self._span(sample.index)
        split = self.source_span.split
        tokens = split.tokens(span.start, span.stop)
        starts = split.document_starts(span.start + 1, span.stop) - span.start
        return PackedSequence(tokens[:-1], tokens[1:], starts)


@dataclass(frozen=True)
class Crops:
    """One window of T tokens per document and epoch; shorter documents are padded.

    The start of a window is a pure function of (fingerprint, seed, epoch, document), uniform over
    all starts at which T tokens remain.
    """

    source_span: SourceSpan
    """Source documents."""
    sequence_tokens: int
    """Sequence length T in tokens."""
    fingerprint: str
    """Fingerprint of the token store."""
    seed: int
    """Seed of the run."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences per epoch, one per document."""
        return len(self.source_span.documents)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents."""
        return len(self.source_span.tokens)

    @property
    def num_read_tokens(self) -> int:
        """Number of tokens in an epoch's windows; computing it reads every document's length."""
        documents, total = self.source_span.documents, 0
        for first in range(documents.start, documents.stop, _CHUNK_DOCUMENTS):
            stop = min(first + _CHUNK_DOCUMENTS, documents.stop)
            starts = self.source_span.split.token_starts(np.arange(first, stop + 1))
            total += int(np.minimum(np.diff(starts), self.sequence_tokens).sum())
        return total

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Read the window of a document in an epoch."""
        check_index(sample.index, self.num_sequences)
        document = self.source_span.documents[sample.index]
        starts = self.source_span.split.token_starts(np.array([document, document + 1]))
        start, stop = (int(bound) for bound in starts)
        num_starts = stop - start - self.sequence_tokens + 1
        if num_starts > 1:
            key = derive_key(self.fingerprint, self.seed, "crop", sample.epoch, document)
            # The high half of a 128-bit product: uniform up to one part in 2**64 / num_starts.
            start += key * num_starts >> 64
        ids = self.source_span.split.tokens(start, min(start + self.sequence_tokens, stop))
        return PackedSequence(ids, ids[1:])

    def documents(self, sample: SampleIndex) -> range:
        """Return the number of the window's document, as a range of length 1."""
        check_index(sample.index, self.num_sequences)
        return self.source_span.documents[sample.index : sample.index + 1]


@dataclass(frozen=True, eq=False)
class GroupTextsBlocks:
    """Blocks of Chinese-LLaMA-Alpaca's `group_texts`, including the tokens it drops.

    The documents of a source file are concatenated `GROUP_DOCUMENTS` at a time. A group of at least
    T tokens is cut into full blocks and its remainder is dropped; a smaller one gives one short
    block. Nothing is masked inside a block and positions are not reset. Two deviations: the
    original counts blank lines, each a lone BOS, while a store has no blank documents; and it
    holds out validation blocks after grouping, while a store holds out documents before.
    """

    source_span: SourceSpan
    """Source documents."""
    sequence_tokens: int
    """Sequence length T in tokens."""
    group_bounds: NDArray[np.int64]
    """Flat positions at which the groups start, and the end of the last one."""
    block_ends: NDArray[np.int64]
    """Cumulative number of blocks up to the end of each group."""

    @classmethod
    def from_span(cls, source_span: SourceSpan, sequence_tokens: int) -> Self:
        """Group the documents of a source span."""
        documents, split = source_span.documents, source_span.split
        files = [*split.file_starts(documents).tolist(), documents.stop]
        first_documents = [
            np.arange(start, stop, GROUP_DOCUMENTS) for start, stop in pairwise(files)
        ]
        bounds = split.token_starts(np.concatenate([*first_documents, [documents.stop]]))
        # Every document has at least one token, so no group is empty.
        num_blocks = np.maximum(np.diff(bounds) // sequence_tokens, 1)
        return cls(source_span, sequence_tokens, bounds, np.cumsum(num_blocks))

    @property
    def num_sequences(self) -> int:
        """Number of blocks in all groups."""
        return int(self.block_ends[-1])

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents, including dropped ones."""
        return len(self.source_span.tokens)

    @property
    def num_read_tokens(self) -> int:
        """Number of tokens read per epoch: those in a block."""
        sizes = np.diff(self.group_bounds)
        num_blocks = np.diff(self.block_ends, prepend=0)
        return int(np.minimum(sizes, num_blocks * self.sequence_tokens).sum())

    def read(self, sample: SampleIndex) -> PackedSequence:
        """Read one block."""
        span = self._span(sample.index)
        ids = self.source_span.split.tokens(span.start, span.stop)
        return PackedSequence(ids, ids[1:])

    def documents(self, sample: SampleIndex) -> range:
        """Return the document numbers of a block."""
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
    """Return the number of packed sequences in a span; a span of one token has none.

    Args:
        num_tokens: Length of the span in tokens.
        sequence_tokens: Sequence length T in tokens.
    """
    return max(0, -(-(num_tokens - 1) // sequence_tokens))


def find_source_spans(split: TokenSplit) -> dict[int, SourceSpan]:
    """Return the span of each source in a split, by source index; empty ones are omitted."""
    documents = split.source_documents()
    return {
        source: SourceSpan(split, tokens, documents[source])
        for source, tokens in split.source_ranges().items()
    }


def check_index(index: int, count: int) -> None:
    """Raise IndexError unless `index` is in range(count)."""
    if not 0 <= index < count:
        raise IndexError(f"sequence {index} of a source with {count} sequences")


@lru_cache(maxsize=4)
def _counting(length: int) -> NDArray[np.int64]:
    return np.arange(length, dtype=np.int64)
