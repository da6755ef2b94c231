"""Promise: packing loses no token and invents none, and documents don't see each other."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.manifest import SplitManifest
from raytune_llama.data.packing import IGNORED_LABEL, num_sequences, read_sequence
from raytune_llama.data.store import ShardWriter, TokenSplit
from raytune_llama.storage import Place

Documents = list[list[int]]

DOCUMENTS = st.lists(
    st.lists(st.integers(1, 60_000), min_size=1, max_size=12), min_size=1, max_size=12
)


@pytest.fixture(scope="module")
def make_split(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Documents], TokenSplit]:
    root = tmp_path_factory.mktemp("splits")

    def make(documents: Documents) -> TokenSplit:
        # Two shards, so that ranges cross them; a folder per call, so that none is overwritten.
        folder = root / str(len(list(root.iterdir())))
        folder.mkdir()
        shards = []
        half = len(documents) // 2
        for number, part in enumerate((documents[:half], documents[half:])):
            with ShardWriter(folder / f"train-{number:05d}.arrow", "uint16", source=0) as writer:
                for ids in part:
                    writer.write(ids, 3 * len(ids), number, 0)
            shards.append(writer.shard)
        return TokenSplit(Place.local(folder), SplitManifest.of(shard for shard in shards if shard))

    return make


def _trained_pairs(split: TokenSplit, length: int, *, isolate: bool) -> Counter[tuple[int, int]]:
    pairs: Counter[tuple[int, int]] = Counter()
    for index in range(num_sequences(split.num_tokens, length)):
        sequence = read_sequence(split, index, length, isolate_documents=isolate)
        trained = sequence.labels_T != IGNORED_LABEL
        ids, labels = sequence.ids_T[trained], sequence.labels_T[trained]
        pairs.update(zip(ids.tolist(), labels.tolist(), strict=True))
    return pairs


@given(documents=DOCUMENTS, length=st.integers(1, 20))
def test_packing_isolated_trains_exactly_the_bigrams_within_documents(
    make_split: Callable[[Documents], TokenSplit], documents: Documents, length: int
) -> None:
    expected = Counter(pair for ids in documents for pair in pairwise(ids))
    assert _trained_pairs(make_split(documents), length, isolate=True) == expected


@given(documents=DOCUMENTS, length=st.integers(1, 20))
def test_packing_concatenated_trains_exactly_the_bigrams_of_the_stream(
    make_split: Callable[[Documents], TokenSplit], documents: Documents, length: int
) -> None:
    stream = [token for ids in documents for token in ids]
    expected = Counter(pairwise(stream))
    assert _trained_pairs(make_split(documents), length, isolate=False) == expected


@given(documents=DOCUMENTS, length=st.integers(1, 20))
def test_packing_isolated_positions_count_from_each_document_start(
    make_split: Callable[[Documents], TokenSplit], documents: Documents, length: int
) -> None:
    split = make_split(documents)
    first_of_document = [place == 0 for ids in documents for place in range(len(ids))]
    for index in range(num_sequences(split.num_tokens, length)):
        sequence = read_sequence(split, index, length, isolate_documents=True)
        num_real = min(length, split.num_tokens - 1 - index * length)
        expected = []
        for place in range(length):
            restarts = place in {0, num_real}
            if place < num_real:
                restarts = restarts or first_of_document[index * length + place]
            expected.append(0 if restarts else expected[-1] + 1)
        assert sequence.positions_T.tolist() == expected


def test_packing_known_stream_gives_known_sequences(
    make_split: Callable[[Documents], TokenSplit],
) -> None:
    split = make_split([[1, 2, 3], [4, 5], [6]])
    assert num_sequences(split.num_tokens, 4) == 2
    first, last = (read_sequence(split, index, 4, isolate_documents=True) for index in (0, 1))
    assert first.ids_T.tolist() == [1, 2, 3, 4]
    assert first.labels_T.tolist() == [2, 3, -100, 5]
    assert first.positions_T.tolist() == [0, 1, 2, 0]
    assert last.ids_T.tolist() == [5, 0, 0, 0]
    assert last.labels_T.tolist() == [-100, -100, -100, -100]
    assert last.positions_T.tolist() == [0, 0, 1, 2]
    joined = read_sequence(split, 0, 4, isolate_documents=False)
    assert joined.labels_T.tolist() == [2, 3, 4, 5]
    assert joined.positions_T.tolist() == [0, 1, 2, 3]
    joined_last = read_sequence(split, 1, 4, isolate_documents=False)
    assert joined_last.labels_T.tolist() == [6, -100, -100, -100]
    assert joined_last.positions_T.tolist() == [0, 0, 1, 2]
    assert {array.dtype for array in vars(first).values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2)])
def test_num_sequences_edges_are_counted_exactly(num_tokens: int, expected: int) -> None:
    assert num_sequences(num_tokens, 4) == expected


@pytest.mark.parametrize("index", [-1, 2])
def test_read_sequence_outside_the_split_is_refused(
    make_split: Callable[[Documents], TokenSplit], index: int
) -> None:
    with pytest.raises(IndexError, match=f"sequence {index} "):
        read_sequence(make_split([[1] * 6]), index, 4, isolate_documents=True)
