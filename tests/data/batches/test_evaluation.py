"""Promise: what is evaluated is a fair part of each source, and bits per byte know its bytes."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.evaluation import (
    EvaluationSource,
    read_evaluation_batches,
    select_evaluation_sources,
)
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.store.token_store import TokenSplit
from tests.data.conftest import BYTES_PER_TOKEN, MakeSplit

T = 4
NAMES = "abc"
CONFIGS = [SourceConfig(path=f"/{name}") for name in NAMES]


def split_of(make_split: MakeSplit, sizes: list[int]) -> TokenSplit:
    """Make a split of one stream 1, 2, 3 ...; each source has documents of 5 tokens and a rest."""
    sources, start = [], 1
    for size in sizes:
        stop = start + size
        sources.append([[list(range(n, min(n + 5, stop))) for n in range(start, stop, 5)]])
        start = stop
    return make_split(*sources)


def choose(split: TokenSplit, max_sequences: int | None) -> tuple[EvaluationSource, ...]:
    return select_evaluation_sources(CONFIGS, split, "joined", T, max_sequences)


def targets_of(source: EvaluationSource, world_size: int = 1) -> list[int]:
    """Return all targets, which in these splits are flat positions + 1; check the workers."""
    workers = [
        list(
            read_evaluation_batches(
                source, micro_batch_sequences=2, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in workers}) == 1
    labels = [batch.labels_BT.flatten().tolist() for batches in workers for batch in batches]
    return sorted(label for label in chain.from_iterable(labels) if label != -100)


@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=3),
    max_sequences=st.none() | st.integers(3, 40),
)
@settings(max_examples=50)
def test_evaluation_bytes_are_those_of_the_targets(
    make_split: MakeSplit, sizes: list[int], max_sequences: int | None
) -> None:
    split, start = split_of(make_split, sizes), 1
    for source, size in zip(choose(split, max_sequences), sizes, strict=True):
        # The first token of a source is the target of no sequence; the first one accounts for it.
        num_tokens = len(targets_of(source)) + 1
        assert source.sequence_index(0) == 0
        assert source.num_bytes == pytest.approx(BYTES_PER_TOKEN * num_tokens)
        if source.num_evaluated == source.sequences.num_sequences:
            assert targets_of(source) == list(range(start + 1, start + size))
        start += size


@given(
    sizes=st.lists(st.integers(2, 200), min_size=1, max_size=3), max_sequences=st.integers(3, 150)
)
@settings(max_examples=50)
def test_choose_evaluated_gives_each_source_its_share(
    make_split: MakeSplit, sizes: list[int], max_sequences: int
) -> None:
    chosen = choose(split_of(make_split, sizes), max_sequences)
    counts = [source.sequences.num_sequences for source in chosen]
    evaluated = [source.num_evaluated for source in chosen]
    assert sum(evaluated) == min(max_sequences, sum(counts))
    for count, number in zip(counts, evaluated, strict=True):
        assert 1 <= number <= count
        # One each comes first, which shifts a share by less than the number of sources.
        assert abs(number - sum(evaluated) * count / sum(counts)) < len(counts)


def test_choose_evaluated_sequences_are_spread_over_the_source(make_split: MakeSplit) -> None:
    (source,) = choose(split_of(make_split, [401]), 10)
    assert [source.sequence_index(number) for number in range(10)] == list(range(0, 100, 10))


def test_choose_evaluated_names_sources_that_have_text(make_split: MakeSplit) -> None:
    chosen = choose(make_split([], [[[1, 2, 3]]], [[[4]]]), None)
    assert [source.name for source in chosen] == ["b"]
    assert choose(make_split(), None) == ()


def test_choose_evaluated_fewer_sequences_than_sources_are_refused(make_split: MakeSplit) -> None:
    split = split_of(make_split, [30, 30, 30])
    assert [source.num_evaluated for source in choose(split, 3)] == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"eval\.max_sequences: got 2"):
        choose(split, 2)


@pytest.mark.parametrize("world_size", [2, 3, 5, 20])
@pytest.mark.parametrize("max_sequences", [None, 3, 7])
def test_read_evaluation_any_world_size_reads_the_same_once(
    make_split: MakeSplit, world_size: int, max_sequences: int | None
) -> None:
    for source in choose(split_of(make_split, [46, 9]), max_sequences):
        assert targets_of(source, world_size) == targets_of(source)


def test_evaluated_bytes_of_cut_documents_are_their_share(make_split: MakeSplit) -> None:
    # Sequences 0 and 2 of three: tokens 0 to 4 and 9 to 12, with documents of 5 tokens.
    (source,) = choose(split_of(make_split, [13]), 2)
    assert [source.sequence_index(number) for number in range(2)] == [0, 1]
    assert source.num_bytes == pytest.approx(9 * BYTES_PER_TOKEN)
