"""Promise: packing loses no token and invents none; what the other forms lose is counted."""

from collections import Counter
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raytune_llama.data.batches import packing
from raytune_llama.data.batches.best_fit import cut_evaluation_sequences, cut_sequences
from raytune_llama.data.batches.config import EvaluationForm, SequenceForm
from raytune_llama.data.batches.order import SampleIndex
from raytune_llama.data.batches.packing import (
    IGNORED_LABEL,
    JoinedSequences,
    SourceSequences,
    find_source_spans,
    num_sequences,
)
from raytune_llama.data.store.token_store import TokenSplit
from tests.data.conftest import Documents, MakeSplit

DOCUMENT = st.lists(st.integers(1, 60_000), min_size=1, max_size=12)
FILE = st.lists(DOCUMENT, min_size=1, max_size=8)
SOURCES = st.lists(st.lists(FILE, min_size=1, max_size=3), min_size=1, max_size=3)
LENGTH = st.integers(2, 20)


def cut(split: TokenSplit, form: SequenceForm, length: int, seed: int = 1) -> list[SourceSequences]:
    return [
        cut_sequences(stretch, form, length, fingerprint="f", seed=seed)
        for stretch in find_source_spans(split).values()
    ]


class Row(NamedTuple):
    ids_T: NDArray[np.int64]
    labels_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]


def read_row(sequences: SourceSequences, index: int, epoch: int = 0) -> Row:
    row = Row(*np.full((3, sequences.sequence_tokens), -7))
    sequence = sequences.read(SampleIndex(0, index, epoch))
    sequence.write(*row)
    assert sequence.num_targets == np.count_nonzero(row.labels_T != IGNORED_LABEL)
    return row


def read_all(sequences: SourceSequences, epoch: int = 0) -> list[Row]:
    return [read_row(sequences, index, epoch) for index in range(sequences.num_sequences)]


def trained_pairs(rows: list[Row]) -> Counter[tuple[int, int]]:
    pairs: Counter[tuple[int, int]] = Counter()
    for row in rows:
        trained = row.labels_T != IGNORED_LABEL
        ids, labels = row.ids_T[trained], row.labels_T[trained]
        pairs.update(zip(ids.tolist(), labels.tolist(), strict=True))
    return pairs


def documents_of(source: list[Documents]) -> Documents:
    return list(chain.from_iterable(source))


@settings(max_examples=50)
@given(sources=SOURCES, length=LENGTH)
def test_isolated_trains_exactly_the_bigrams_within_documents(
    make_split: MakeSplit, sources: list[list[Documents]], length: int
) -> None:
    for source, sequences in zip(
        sources, cut(make_split(*sources), "isolated", length), strict=True
    ):
        expected = Counter(pair for ids in documents_of(source) for pair in pairwise(ids))
        assert trained_pairs(read_all(sequences)) == expected


@settings(max_examples=50)
@given(sources=SOURCES, length=LENGTH)
def test_joined_trains_exactly_the_bigrams_of_each_source(
    make_split: MakeSplit, sources: list[list[Documents]], length: int
) -> None:
    for source, sequences in zip(sources, cut(make_split(*sources), "joined", length), strict=True):
        stream = list(chain.from_iterable(documents_of(source)))
        rows = read_all(sequences)
        assert trained_pairs(rows) == Counter(pairwise(stream))
        # One short sequence at most.
        assert all((row.labels_T != IGNORED_LABEL).all() for row in rows[:-1])
        assert sequences.num_read_tokens == sequences.num_tokens == len(stream)


@settings(max_examples=50)
@given(documents=FILE, length=LENGTH)
def test_isolated_positions_count_from_each_document_start(
    make_split: MakeSplit, documents: Documents, length: int
) -> None:
    (sequences,) = cut(make_split([[[7]]], [documents]), "isolated", length)[1:]
    first_of_document = [place == 0 for ids in documents for place in range(len(ids))]
    for index, row in enumerate(read_all(sequences)):
        num_real = min(length, len(first_of_document) - 1 - index * length)
        expected = []
        for place in range(length):
            restarts = place in {0, num_real}
            if place < num_real:
                restarts = restarts or first_of_document[index * length + place]
            expected.append(0 if restarts else expected[-1] + 1)
        assert row.positions_T.tolist() == expected


@pytest.mark.parametrize("form", ["isolated", "joined"])
@settings(max_examples=50)
@given(sources=SOURCES, length=LENGTH)
def test_packed_sequences_account_for_each_token_once(
    make_split: MakeSplit, form: EvaluationForm, sources: list[list[Documents]], length: int
) -> None:
    stretches = find_source_spans(make_split(*sources)).values()
    for stretch in stretches:
        sequences = cut_evaluation_sequences(stretch, form, length)
        assert isinstance(sequences, JoinedSequences)
        if sequences.num_sequences:
            covered = chain.from_iterable(
                map(sequences.covered_range, range(sequences.num_sequences))
            )
            assert list(covered) == list(stretch.tokens)


def test_packed_known_stream_gives_known_sequences(make_split: MakeSplit) -> None:
    split = make_split([[[9, 9, 9]]], [[[1, 2, 3]], [[4, 5], [6]]])
    sequences = cut(split, "isolated", 4)[1]
    first, last = read_all(sequences)
    assert first.ids_T.tolist() == [1, 2, 3, 4]
    assert first.labels_T.tolist() == [2, 3, -100, 5]
    assert first.positions_T.tolist() == [0, 1, 2, 0]
    assert last.ids_T.tolist() == [5, 0, 0, 0]
    assert last.labels_T.tolist() == [-100, -100, -100, -100]
    assert last.positions_T.tolist() == [0, 0, 1, 2]
    joined, joined_last = read_all(cut(split, "joined", 4)[1])
    assert joined.labels_T.tolist() == [2, 3, 4, 5]
    assert joined.positions_T.tolist() == [0, 1, 2, 3]
    assert joined_last.labels_T.tolist() == [6, -100, -100, -100]
    assert joined_last.positions_T.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2)])
def test_num_sequences_edges_are_counted_exactly(num_tokens: int, expected: int) -> None:
    assert num_sequences(num_tokens, 4) == expected


@pytest.mark.parametrize("form", ["isolated", "joined", "crops", "seed_blocks"])
@pytest.mark.parametrize("index", [-1, 2])
def test_read_outside_the_source_is_refused(
    make_split: MakeSplit, form: SequenceForm, index: int
) -> None:
    (sequences,) = cut(make_split([[[1] * 5, [2] * 4]]), form, 4)
    assert sequences.num_sequences == 2
    with pytest.raises(IndexError, match=f"sequence {index} "):
        sequences.read(SampleIndex(0, index, 0))


def window_start(row: Row, ids: list[int]) -> int:
    """Return where a row of distinct ids starts in its document, after checking all of the row."""
    length = len(row.ids_T)
    real = min(length, len(ids))
    start = ids.index(int(row.ids_T[0]))
    window = ids[start : start + real]
    assert row.ids_T.tolist() == window + [0] * (length - real)
    assert row.labels_T.tolist() == window[1:] + [IGNORED_LABEL] * (length - real + 1)
    assert row.positions_T.tolist() == [*range(real), *range(length - real)]
    return start


@settings(max_examples=50)
@given(
    sizes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3),
    length=LENGTH,
    epoch=st.integers(0, 10**6),
)
def test_crops_epoch_has_one_window_of_each_document(
    make_split: MakeSplit, sizes: list[list[int]], length: int, epoch: int
) -> None:
    sources = [[[list(range(1, size + 1)) for size in documents]] for documents in sizes]
    for source, sequences in zip(sources, cut(make_split(*sources), "crops", length), strict=True):
        documents = documents_of(source)
        rows = read_all(sequences, epoch)
        for row, ids in zip(rows, documents, strict=True):
            assert 0 <= window_start(row, ids) <= max(0, len(ids) - length)
        assert sequences.num_read_tokens == sum(min(length, len(ids)) for ids in documents)
        assert sequences.num_tokens == sum(map(len, documents))


def test_crops_starts_over_epochs_are_uniform(make_split: MakeSplit) -> None:
    length, num_epochs = 8, 6000
    documents = [list(range(100, 100 + size)) for size in (20, length, length + 1)]
    (sequences,) = cut(make_split([documents]), "crops", length)
    for index, ids in enumerate(documents):
        rows = (read_row(sequences, index, epoch) for epoch in range(num_epochs))
        starts = Counter(window_start(row, ids) for row in rows)
        num_starts = len(ids) - length + 1
        expected = num_epochs / num_starts
        # Six standard deviations of a binomial count.
        allowed = 6 * (expected * (1 - 1 / num_starts)) ** 0.5
        assert all(abs(starts[start] - expected) <= allowed for start in range(num_starts))


def test_crops_are_decided_by_fingerprint_seed_epoch_and_document(make_split: MakeSplit) -> None:
    ids = list(range(1, 5000))
    (stretch,) = find_source_spans(make_split([[ids, ids]])).values()

    def starts(fingerprint: str = "f", seed: int = 1, epoch: int = 0) -> list[int]:
        sequences = cut_sequences(stretch, "crops", 8, fingerprint=fingerprint, seed=seed)
        return [window_start(row, ids) for row in read_all(sequences, epoch)]

    first, second = starts()
    assert first != second
    assert starts() == [first, second]
    assert [first, second] not in (starts("g"), starts(seed=2), starts(epoch=1))


def group_texts(documents: Documents, length: int, group: int) -> list[list[int]]:
    """Cut the blocks of one file as the Chinese-LLaMA scripts do: see `GroupTextsBlocks`."""
    blocks = []
    for start in range(0, len(documents), group):
        ids = [one for document in documents[start : start + group] for one in document]
        total = len(ids) // length * length if len(ids) >= length else len(ids)
        blocks += [ids[i : i + length] for i in range(0, total, length)]
    return blocks


def assert_blocks(sequences: SourceSequences, blocks: list[list[int]]) -> None:
    rows = read_all(sequences)
    assert len(rows) == len(blocks)
    for row, block in zip(rows, blocks, strict=True):
        padding = len(row.ids_T) - len(block)
        assert row.ids_T.tolist() == block + [0] * padding
        assert row.labels_T.tolist() == block[1:] + [IGNORED_LABEL] * (padding + 1)
        assert row.positions_T.tolist() == [*range(len(block)), *range(padding)]
    assert sequences.num_read_tokens == sum(map(len, blocks))


@settings(max_examples=50)
@given(sources=SOURCES, length=LENGTH, group=st.integers(1, 5))
def test_seed_blocks_equal_the_reference_for_each_file(
    make_split: MakeSplit, sources: list[list[Documents]], length: int, group: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "GROUP_DOCUMENTS", group)
        found = cut(make_split(*sources), "seed_blocks", length)
    for source, sequences in zip(sources, found, strict=True):
        assert_blocks(sequences, [b for file in source for b in group_texts(file, length, group)])
        assert sequences.num_tokens == sum(map(len, documents_of(source)))


@pytest.mark.parametrize(("num_tokens", "sizes"), [(2500, [512] * 4), (300, [300]), (512, [512])])
def test_seed_blocks_of_512_are_those_of_the_scripts(
    make_split: MakeSplit, num_tokens: int, sizes: list[int]
) -> None:
    ids = [place % 60_000 for place in range(num_tokens)]
    (sequences,) = cut(make_split([[ids[:100], ids[100:]]]), "seed_blocks", 512)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    blocks = [ids[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    assert_blocks(sequences, blocks)


def test_seed_blocks_group_a_thousand_documents_of_a_file(make_split: MakeSplit) -> None:
    files = [[[n % 60_000] * (n % 3 + 1) for n in range(count)] for count in (2300, 999, 1001)]
    (sequences,) = cut(make_split(files), "seed_blocks", 64)
    assert_blocks(sequences, [block for file in files for block in group_texts(file, 64, 1000)])
    assert sequences.num_read_tokens < sequences.num_tokens
