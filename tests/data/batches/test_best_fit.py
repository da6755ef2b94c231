"""Promise: every conversation is in one sequence, whole, and only its answers are learned."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from raytune_llama.data.batches.best_fit import best_fit, cut_sequences
from raytune_llama.data.batches.config import SequenceForm
from raytune_llama.data.batches.order import GroupedOrder, SampleIndex
from raytune_llama.data.batches.packing import IGNORED_LABEL, SourceSequences, find_source_spans
from raytune_llama.data.batches.step_batches import BatchPlan, read_steps
from raytune_llama.data.store.manifest import SplitManifest
from raytune_llama.data.store.shards import EncodedDocuments, ShardWriter
from raytune_llama.data.store.token_store import TokenSplit
from raytune_llama.storage.place import Place

T = 12
Masked = list[tuple[int, bool]]
CONVERSATIONS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=T),
    min_size=1,
    max_size=30,
)


def write_split(folder: Path, conversations: list[Masked]) -> TokenSplit:
    path = folder / "train-00000.arrow"
    path.unlink(missing_ok=True)
    with ShardWriter(path, "uint16", source=0, has_targets=True) as writer:
        for number, one in enumerate(conversations):
            writer.write_documents(
                EncodedDocuments(
                    file=0,
                    ids=np.array([id_ for id_, _ in one]),
                    lengths=np.array([len(one)]),
                    num_bytes=np.array([len(one)]),
                    offsets=np.array([number]),
                    is_validation=np.zeros(1, dtype=bool),
                    targets=np.array([is_target for _, is_target in one]),
                )
            )
    assert writer.shard is not None
    return TokenSplit(Place.local(folder), SplitManifest.from_shards([writer.shard]))


def cut(split: TokenSplit, form: SequenceForm) -> SourceSequences:
    (stretch,) = find_source_spans(split).values()
    return cut_sequences(stretch, form, T, fingerprint="f", seed=1)


def read_all(sequences: SourceSequences) -> list[NDArray[np.int64]]:
    rows: list[NDArray[np.int64]] = []
    for index in range(sequences.num_sequences):
        row = np.full((3, T), -7)
        sequence = sequences.read(SampleIndex(0, index, 0))
        sequence.write(*row)
        assert sequence.num_targets == np.count_nonzero(row[1] != IGNORED_LABEL)
        rows.append(row)
    return rows


def examples(rows: list[NDArray[np.int64]]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return what a model learns of each document: its ids and its labels."""
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for ids_T, labels_T, positions_T in rows:
        starts = [*np.flatnonzero(positions_T == 0).tolist(), T]
        for start, stop in pairwise(starts):
            if ids_T[start]:  # padding is a segment of id 0
                ids, labels = ids_T[start:stop], labels_T[start:stop]
                found[tuple(ids.tolist()), tuple(labels.tolist())] += 1
            else:
                assert (labels_T[start:stop] == IGNORED_LABEL).all()
    return found


def wanted(conversations: list[Masked]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for one in conversations:
        labels = [id_ if is_target else IGNORED_LABEL for id_, is_target in one[1:]]
        found[tuple(id_ for id_, _ in one), (*labels, IGNORED_LABEL)] += 1
    return found


@pytest.mark.parametrize("form", ["fitted", "padded"])
@given(conversations=CONVERSATIONS)
def test_every_conversation_is_learned_once_and_whole(
    form: SequenceForm, conversations: list[Masked], tmp_path_factory: pytest.TempPathFactory
) -> None:
    split = write_split(tmp_path_factory.mktemp("split"), conversations)
    sequences = cut(split, form)
    assert examples(read_all(sequences)) == wanted(conversations)
    assert sequences.num_tokens == sum(map(len, conversations))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300), extra=st.integers(0, 30))
def test_best_fit_overfills_no_bin_and_leaves_none_that_two_could_share(
    lengths: list[int], extra: int
) -> None:
    capacity = max(lengths) + extra
    bins = best_fit(np.array(lengths), capacity)
    filled = np.bincount(bins, weights=lengths)
    assert filled.max() <= capacity
    assert filled.min() > 0
    # No two bins fit into one: the second would not have been begun.
    if len(filled) > 1:
        assert sum(sorted(filled)[:2]) > capacity


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    # 7 and 6 begin bins of 10; 3 has room in both and goes where nothing is left.
    assert best_fit(np.array([7, 6, 3]), 10).tolist() == [0, 1, 0]


def test_padded_steps_have_conversations_of_one_length_and_no_longer_batches(
    tmp_path: Path,
) -> None:
    generator = np.random.default_rng(1)
    conversations: list[Masked] = [
        [(1, True)] * length for length in generator.integers(2, T + 1, size=40).tolist()
    ]
    sequences = cut(write_split(tmp_path, conversations), "padded")
    plan = BatchPlan.create(
        [sequences.num_sequences],
        sequence_tokens=T,
        sequences_per_step=4,
        micro_batch_sequences=2,
        seed=1,
        num_epochs=1,
        is_padded=True,
    )
    steps = list(read_steps([sequences], "f", plan, rank=0, world_size=1))
    batches = [batch for step in steps for batch in step.micro_batches]
    seen = Counter(int((row != 0).sum()) for batch in batches for row in batch.ids_BT)
    assert seen == Counter(map(len, conversations))
    assert {batch.ids_BT.shape[1] for batch in batches} == {8, T}
    for step in steps:
        lengths = [int((row != 0).sum()) for batch in step.micro_batches for row in batch.ids_BT]
        assert max(lengths) - min(lengths) <= 3
    # Not from the shortest to the longest.
    means = [float((step.micro_batches[0].ids_BT != 0).sum()) for step in steps]
    assert means != sorted(means)


@given(sources=st.lists(st.integers(1, 20), min_size=1, max_size=3), size=st.integers(2, 7))
def test_grouped_order_sees_each_sequence_once_an_epoch(sources: list[int], size: int) -> None:
    order, total = GroupedOrder(tuple(sources), size), sum(sources)
    for epoch in (0, 1):
        seen = [order.sample(epoch * total + place, "f", 1) for place in range(total)]
        assert {sample.epoch for sample in seen} == {epoch}
        assert sorted((sample.source, sample.index) for sample in seen) == [
            (source, index) for source, count in enumerate(sources) for index in range(count)
        ]
