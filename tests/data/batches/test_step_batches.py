"""Promise: a run needs one integer to resume, and its batches do not depend on the workers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from raytune_llama.data.batches.best_fit import cut_sequences
from raytune_llama.data.batches.config import SequenceForm
from raytune_llama.data.batches.packing import SourceSequences, find_source_spans
from raytune_llama.data.batches.step_batches import BatchPlan, StepBatch, read_steps
from tests.data.conftest import MakeSplit

T = 4
Row = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class Run:
    """Two sources in one form, with weights or without."""

    form: SequenceForm
    weights: tuple[float, ...] | None
    sources: Sequence[SourceSequences]

    def plan(self, **changes: object) -> BatchPlan:
        """Plan a run of 17 sequences, or of what the changes say."""
        bound = {"num_epochs": 17 / sum(source.num_sequences for source in self.sources)}
        settings: dict[str, object] = {
            "sequence_tokens": T,
            "sequences_per_step": 5,
            "micro_batch_sequences": 2,
            "seed": 7,
            "weights": self.weights,
            **({"max_steps": 4} if self.weights else bound),
        }
        counts = [source.num_sequences for source in self.sources]
        return BatchPlan.create(counts, **{**settings, **changes})  # pyright: ignore[reportArgumentType]

    def steps(self, plan: BatchPlan, world_size: int, start_step: int = 0) -> list[list[StepBatch]]:
        """Read the steps of all workers."""
        return [
            list(
                read_steps(
                    self.sources,
                    "f",
                    plan,
                    rank=rank,
                    world_size=world_size,
                    start_step=start_step,
                )
            )
            for rank in range(world_size)
        ]


FORMS: list[SequenceForm] = ["isolated", "joined", "crops", "seed_blocks"]


PLAIN = [(form, None) for form in FORMS]
WEIGHTED = [(form, (0.7, 0.3)) for form in FORMS]


@pytest.fixture(params=PLAIN + WEIGHTED)
def run(request: pytest.FixtureRequest, make_split: MakeSplit) -> Run:
    form, weights = request.param
    first = [list(range(start, start + 5 + start % 7)) for start in range(0, 90, 15)]
    second = [list(range(1000, 1023)), [1100, 1101]]
    stretches = find_source_spans(make_split([first], [second])).values()
    sources = [cut_sequences(one, form, T, fingerprint="f", seed=7) for one in stretches]
    return Run(form, weights, sources)


def real_rows(batch: StepBatch) -> list[Row]:
    parts = batch.micro_batches
    tensors = [
        torch.cat([getattr(part, name) for part in parts]).tolist()
        for name in ("ids_BT", "labels_BT", "positions_BT")
    ]
    return list(zip(*tensors, strict=True))[: len(batch.positions)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_read_steps_any_world_size_takes_each_position_once(run: Run, world_size: int) -> None:
    plan = run.plan()
    workers = run.steps(plan, world_size)
    positions = sorted(p for steps in workers for batch in steps for p in batch.positions)
    assert positions == list(range(plan.total_positions))


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_read_steps_other_world_size_trains_the_same_rows_in_each_step(
    run: Run, world_size: int
) -> None:
    plan = run.plan()
    (alone,) = run.steps(plan, 1)
    workers = run.steps(plan, world_size)
    for step, expected in enumerate(alone):
        together = [row for steps in workers for row in real_rows(steps[step])]
        assert sorted(together) == sorted(real_rows(expected))
        for name in ("source_sequences", "source_targets"):
            counts = zip(*(getattr(steps[step], name) for steps in workers), strict=True)
            assert tuple(map(sum, counts)) == getattr(expected, name)


@pytest.mark.parametrize("run", PLAIN, indirect=True)
def test_read_steps_epoch_without_weights_has_every_sequence(run: Run) -> None:
    (steps,) = run.steps(run.plan(num_epochs=1), 1)
    rows = Counter(str(row) for batch in steps for row in real_rows(batch))
    assert rows.total() == sum(source.num_sequences for source in run.sources)
    # All rows of these texts differ.
    assert set(rows.values()) == {1}


@pytest.mark.parametrize("run", WEIGHTED, indirect=True)
def test_read_steps_weights_decide_the_sequences_of_each_source(run: Run) -> None:
    (steps,) = run.steps(run.plan(max_steps=8), 1)
    assert [sum(batch.source_sequences[source] for batch in steps) for source in (0, 1)] == [28, 12]


def test_read_steps_counts_are_those_of_the_rows(run: Run) -> None:
    (steps,) = run.steps(run.plan(), 1)
    for batch in steps:
        sequences, targets = [0, 0], [0, 0]
        for ids, labels, _ in real_rows(batch):
            source = int(ids[0] >= 1000)
            sequences[source] += 1
            targets[source] += sum(label != -100 for label in labels)
        assert batch.source_sequences == tuple(sequences)
        assert batch.source_targets == tuple(targets)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_read_steps_filler_fills_the_shape_is_counted_and_has_no_target(
    run: Run, world_size: int
) -> None:
    plan = run.plan()
    for steps in run.steps(plan, world_size):
        assert [batch.step for batch in steps] == [0, 1, 2, 3]
        for batch in steps:
            assert len(batch.micro_batches) == plan.num_micro_batches(world_size)
            assert all(micro.ids_BT.shape == (2, T) for micro in batch.micro_batches)
            num_rows = 2 * len(batch.micro_batches)
            assert batch.num_filler_sequences == num_rows - len(batch.positions)
            labels = torch.cat([micro.labels_BT for micro in batch.micro_batches])
            assert (labels[len(batch.positions) :] == -100).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_read_steps_from_a_later_step_equals_the_rest_of_the_run(run: Run, world_size: int) -> None:
    plan = run.plan()
    whole = run.steps(plan, world_size)
    for start in range(plan.num_steps + 1):
        for before, after in zip(whole, run.steps(plan, world_size, start), strict=True):
            assert [batch.step for batch in after] == list(range(start, plan.num_steps))
            for expected, got in zip(before[start:], after, strict=True):
                assert got.positions == expected.positions
                assert real_rows(got) == real_rows(expected)


def test_read_steps_tensors_are_int64_with_shifted_labels(make_split: MakeSplit) -> None:
    (stretch,) = find_source_spans(make_split([[list(range(46))]])).values()
    joined = Run("joined", None, [cut_sequences(stretch, "joined", T, fingerprint="f", seed=7)])
    (steps,) = joined.steps(joined.plan(num_epochs=0.5), 1)
    micro = steps[0].micro_batches[0]
    assert {micro.ids_BT.dtype, micro.labels_BT.dtype, micro.positions_BT.dtype} == {torch.int64}
    assert torch.equal(micro.ids_BT[:, 1:], micro.labels_BT[:, :-1])
    assert torch.equal(micro.positions_BT, torch.arange(T).expand(2, T))


def make_plan(**changes: object) -> BatchPlan:
    settings = {
        "sequence_tokens": T,
        "sequences_per_step": 5,
        "micro_batch_sequences": 2,
        "seed": 7,
        "max_steps": 9,
    }
    return BatchPlan.create([12, 3], **{**settings, **changes})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("bound", "steps_and_positions"),
    [
        ({}, (9, 45)),
        ({"max_steps": None, "num_epochs": 1}, (3, 15)),
        ({"max_steps": None, "num_epochs": 2.25}, (7, 34)),
    ],
)
def test_plan_is_bounded_by_steps_or_epochs(
    bound: dict[str, object], steps_and_positions: tuple[int, int]
) -> None:
    plan = make_plan(**bound)
    assert (plan.num_steps, plan.total_positions) == steps_and_positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": 3}, "set exactly one"),
        ({"max_steps": None}, "set exactly one"),
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"sequences_per_step": 0}, "sequences_per_step: got 0"),
        ({"weights": [0.5, 0.0]}, "weights: got 0.0"),
        ({"weights": [1, 1], "max_steps": None, "num_epochs": 1}, "num_epochs: cannot be used"),
        ({"weights": [1, 1e-9]}, "wanted at least one per source"),
        ({"weights": [1]}, "wanted at least one per source"),
    ],
)
def test_plan_impossible_numbers_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(**changes)
