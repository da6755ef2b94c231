"""Promise: the sample at a position is a pure function; a run needs one integer to resume."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.batches import (
    BatchPlan,
    StepBatch,
    evaluation_bytes,
    permuted_index,
    read_evaluation,
    read_steps,
    sequence_at,
)
from raytune_llama.data.manifest import SplitManifest
from raytune_llama.data.store import ShardWriter, TokenSplit
from raytune_llama.storage import Place

T = 4
KNOWN_ORDER = [1, 3, 5, 4, 2, 9, 8, 0, 11, 7, 6, 10, 5, 2]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    """A stream of 0, 1, 2, ... 45 in documents of 5 and more: 12 sequences, the last one short."""
    folder = tmp_path_factory.mktemp("split")
    with ShardWriter(folder / "train-00000.arrow", "uint16", source=0) as writer:
        for start in range(0, 40, 5):
            writer.write(list(range(start, start + 5)), 10, 0, 0)
        writer.write(list(range(40, 46)), 12, 0, 0)
    assert writer.shard
    return TokenSplit(Place.local(folder), SplitManifest.of([writer.shard]))


def make_plan(split: TokenSplit, **changes: object) -> BatchPlan:
    settings = {
        "sequence_tokens": T,
        "sequences_per_step": 5,
        "micro_batch_sequences": 2,
        "isolate_documents": True,
        "seed": 7,
        "num_epochs": 1,
    }
    return BatchPlan.for_split(split, **{**settings, **changes})  # pyright: ignore[reportArgumentType]


def steps_of_all(
    split: TokenSplit, plan: BatchPlan, world_size: int, start_step: int = 0
) -> list[list[StepBatch]]:
    return [
        list(read_steps(split, "f", plan, rank=rank, world_size=world_size, start_step=start_step))
        for rank in range(world_size)
    ]


def real_rows(batch: StepBatch) -> list[tuple[list[int], list[int]]]:
    ids = torch.cat([micro.ids_BT for micro in batch.micro_batches])
    labels = torch.cat([micro.labels_BT for micro in batch.micro_batches])
    rows = list(zip(ids.tolist(), labels.tolist(), strict=True))
    return rows[: len(batch.positions)]


@given(num_items=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permutation_any_size_is_a_bijection(num_items: int, key: int) -> None:
    images = {permuted_index(position, num_items, key) for position in range(num_items)}
    assert images == set(range(num_items))


@given(position=st.integers(0, 10**12 - 1), key=st.integers(0, 2**64 - 1))
def test_permutation_huge_range_stays_inside(position: int, key: int) -> None:
    assert 0 <= permuted_index(position, 10**12, key) < 10**12


@pytest.mark.parametrize("num_items", [2, 3, 10, 17])
def test_permutation_over_keys_puts_every_item_first_equally_often(num_items: int) -> None:
    num_keys = 4000
    firsts = Counter(permuted_index(0, num_items, key) for key in range(num_keys))
    expected = num_keys / num_items
    # Six standard deviations of a binomial count.
    allowed = 6 * (expected * (1 - 1 / num_items)) ** 0.5
    assert all(abs(firsts[item] - expected) < allowed for item in range(num_items))


def test_permutation_neighbours_are_not_kept_together() -> None:
    images = [permuted_index(position, 1000, 1) for position in range(1000)]
    near = sum(abs(left - right) <= 5 for left, right in pairwise(images))
    # By chance about 10 of 999 pairs are that near.
    assert near < 30


def test_permuted_index_outside_the_range_is_refused() -> None:
    with pytest.raises(IndexError, match="position 3 of 3"):
        permuted_index(3, 3, 0)


@pytest.mark.parametrize("change", ["seed", "fingerprint", "epoch"])
def test_sequence_at_other_key_gives_other_order(split: TokenSplit, change: str) -> None:
    plan = make_plan(split)
    first = [sequence_at(position, plan, "f") for position in range(12)]
    if change == "seed":
        other = [sequence_at(position, make_plan(split, seed=8), "f") for position in range(12)]
    elif change == "fingerprint":
        other = [sequence_at(position, plan, "g") for position in range(12)]
    else:
        other = [sequence_at(position, plan, "f") for position in range(12, 24)]
    assert sorted(first) == sorted(other) == list(range(12))
    assert first != other


def test_sequence_at_known_order_never_changes(split: TokenSplit) -> None:
    # A resumed run continues an order that an older version of this code began.
    plan = make_plan(split)
    order = [sequence_at(position, plan, "f") for position in range(14)]
    assert order == KNOWN_ORDER


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_epochs", [1, 2, 2.5])
def test_read_steps_any_world_size_covers_each_epoch_exactly(
    split: TokenSplit, world_size: int, num_epochs: float
) -> None:
    plan = make_plan(split, num_epochs=num_epochs)
    workers = steps_of_all(split, plan, world_size)
    positions = sorted(p for steps in workers for batch in steps for p in batch.positions)
    assert positions == list(range(round(12 * num_epochs)))

    rows = {
        position: row
        for steps in workers
        for batch in steps
        for position, row in zip(batch.positions, real_rows(batch), strict=True)
    }
    first_epoch = Counter(ids[0] for ids, _ in (rows[position] for position in range(12)))
    assert first_epoch == Counter(range(0, 48, T))


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_read_steps_other_world_size_trains_the_same_rows_in_each_step(
    split: TokenSplit, world_size: int
) -> None:
    plan = make_plan(split, num_epochs=2)
    (alone,) = steps_of_all(split, plan, 1)
    workers = steps_of_all(split, plan, world_size)
    for step, expected in enumerate(alone):
        together = [row for steps in workers for row in real_rows(steps[step])]
        assert sorted(together) == sorted(real_rows(expected))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_read_steps_filler_fills_the_shape_is_counted_and_has_no_target(
    split: TokenSplit, world_size: int
) -> None:
    plan = make_plan(split, num_epochs=1)  # 12 positions: the last of 3 steps has 2
    for steps in steps_of_all(split, plan, world_size):
        assert [batch.step for batch in steps] == [0, 1, 2]
        for batch in steps:
            assert len(batch.micro_batches) == plan.num_micro_batches(world_size)
            assert all(micro.ids_BT.shape == (2, T) for micro in batch.micro_batches)
            num_rows = 2 * len(batch.micro_batches)
            assert batch.num_filler_sequences == num_rows - len(batch.positions)
            labels = torch.cat([micro.labels_BT for micro in batch.micro_batches])
            assert (labels[len(batch.positions) :] == -100).all()


def test_read_steps_from_a_later_step_equals_the_rest_of_the_run(split: TokenSplit) -> None:
    plan = make_plan(split, num_epochs=3)
    whole = steps_of_all(split, plan, 2)
    resumed = steps_of_all(split, plan, 2, start_step=4)
    for rank in range(2):
        assert len(resumed[rank]) == plan.num_steps - 4
        for expected, got in zip(whole[rank][4:], resumed[rank], strict=True):
            assert got.step == expected.step
            assert got.positions == expected.positions
            assert real_rows(got) == real_rows(expected)


def test_read_steps_tensors_are_int64_with_shifted_labels(split: TokenSplit) -> None:
    plan = make_plan(split, isolate_documents=False)
    batch = next(read_steps(split, "f", plan, rank=0, world_size=1))
    micro = batch.micro_batches[0]
    assert {micro.ids_BT.dtype, micro.labels_BT.dtype, micro.positions_BT.dtype} == {torch.int64}
    assert torch.equal(micro.ids_BT[:, 1:], micro.labels_BT[:, :-1])
    assert torch.equal(micro.positions_BT, torch.arange(T).expand(2, T))


def test_plan_max_steps_bounds_the_run_with_full_steps(split: TokenSplit) -> None:
    plan = make_plan(split, num_epochs=None, max_steps=9)
    assert (plan.num_steps, plan.total_positions) == (9, 45)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 3}, "set exactly one"),
        ({"num_epochs": None}, "set exactly one"),
        ({"num_epochs": 0}, "num_epochs: got 0"),
        ({"sequences_per_step": 0}, "sequences_per_step: got 0"),
    ],
)
def test_plan_impossible_numbers_are_refused(
    split: TokenSplit, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(split, **changes)


def test_plan_split_without_a_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        make_plan(TokenSplit(Place.local(tmp_path), SplitManifest.of([])))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("max_sequences", [None, 1, 7, 100])
def test_read_evaluation_any_world_size_reads_the_first_sequences_once(
    split: TokenSplit, world_size: int, max_sequences: int | None
) -> None:
    workers = [
        list(
            read_evaluation(
                split,
                sequence_tokens=T,
                micro_batch_sequences=2,
                isolate_documents=False,
                rank=rank,
                world_size=world_size,
                max_sequences=max_sequences,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in workers}) == 1
    targets = [
        label
        for batches in workers
        for batch in batches
        for label in batch.labels_BT.flatten().tolist()
        if label != -100
    ]
    count = min(12, max_sequences or 12)
    assert sorted(targets) == list(range(1, min(count * T, 45) + 1))


def test_evaluation_bytes_all_sequences_are_all_bytes(split: TokenSplit) -> None:
    assert evaluation_bytes(split, T, None) == split.num_bytes
    # One sequence of 4 and its last target are the first document of 5 tokens.
    assert evaluation_bytes(split, T, 1) == 10
