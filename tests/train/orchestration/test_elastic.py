"""Promise: the number of workers may change at any step, and nothing else does.

Same samples, each once an epoch; same losses; and more workers only where there is room to stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.batches.order import SampleIndex
from raytune_llama.data.batches.packing import PackedSequence
from raytune_llama.data.batches.step_batches import BatchPlan, read_steps
from raytune_llama.model.loss import IGNORE_INDEX
from raytune_llama.storage.place import Place
from raytune_llama.train.export import read_result
from raytune_llama.train.monitoring.metrics import FILLER_SEQUENCES, LEARNING_RATE, TARGET_TOKENS
from raytune_llama.train.orchestration.config import ScaleConfig, WorkerRange
from raytune_llama.train.orchestration.elastic import (
    AutoscalerReservation,
    ScaleUpPolicy,
    count_reserved,
    watch_nodes,
)
from tests.train.conftest import MakeConfig, curve, run_here, stage_fields
from tests.train.group import Group

SAME = 1e-5
"""Relative difference allowed between numbers of workers in fp32."""


@dataclass(frozen=True)
class Numbered:
    """A source whose every sequence is one id, its own number."""

    num_sequences: int
    first: int
    sequence_tokens: int = 2

    @property
    def num_tokens(self) -> int:
        return self.num_sequences

    @property
    def num_read_tokens(self) -> int:
        return self.num_sequences

    def read(self, sample: SampleIndex) -> PackedSequence:
        number = np.array([self.first + sample.index], dtype=np.uint16)
        return PackedSequence(ids=number, labels=number)

    def documents(self, sample: SampleIndex) -> list[int]:
        return [sample.index]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    per_step=st.integers(1, 7),
    micro_batch=st.integers(1, 3),
    num_epochs=st.integers(1, 3),
    starts=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), max_size=6),
    is_padded=st.booleans(),
)
def test_read_steps_of_any_workers_in_turn_takes_each_epoch_once(
    *,
    sizes: list[int],
    per_step: int,
    micro_batch: int,
    num_epochs: int,
    starts: list[tuple[int, int]],
    is_padded: bool,
) -> None:
    """A start has a number of workers, and takes some steps before the next one."""
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    sources = [Numbered(size, first) for size, first in zip(sizes, firsts, strict=True)]
    plan = BatchPlan.create(
        sizes,
        sequence_tokens=2,
        sequences_per_step=per_step,
        micro_batch_sequences=micro_batch,
        seed=3,
        num_epochs=num_epochs,
        is_padded=is_padded,
    )
    taken: dict[int, int] = {}
    step = 0
    for world_size, num_steps in [*starts, (2, plan.num_steps)]:
        stop = min(step + num_steps, plan.num_steps)
        for rank in range(world_size):
            batches = read_steps(
                sources, "f", plan, rank=rank, world_size=world_size, start_step=step
            )
            for _, batch in zip(range(step, stop), batches, strict=False):
                labels = [part.labels_BT[:, 0].tolist() for part in batch.micro_batches]
                seen = [label for row in labels for label in row if label != IGNORE_INDEX]
                for position, number in zip(batch.positions, seen, strict=True):
                    assert position not in taken
                    taken[position] = number
        step = stop
    epoch = list(range(sum(sizes)))
    in_order = [taken[position] for position in range(len(taken))]
    parts = [in_order[start : start + len(epoch)] for start in range(0, len(taken), len(epoch))]
    assert [sorted(part) for part in parts] == [epoch] * num_epochs


# Half a minute each; what stage 2 cuts up differently, test_engines.py resumes on other workers.
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_train_on_one_two_three_and_one_workers_equals_one(
    make_config: MakeConfig, two: Group, three: Group, stage: int
) -> None:
    fields = {
        "lora__dropout": 0.0,
        "max_steps": None,
        # Over the end of an epoch.
        "num_epochs": 1.4,
        "batch__sequences_per_step": 11,
        "batch__micro_batch_sequences": 1,
        "eval__every_steps": None,
        "checkpoint__keep_best": False,
        **stage_fields(stage),
    }
    whole, parts = make_config("whole", **fields), make_config("parts", **fields)
    run_here(whole) if stage == 0 else two.run(whole)
    if stage == 0:
        run_here(parts, stop_after=2)
    two.run(parts, stop_after=3)
    three.run(parts, stop_after=9)
    two.run(parts)
    assert curve(parts) == pytest.approx(curve(whole), rel=SAME)
    assert len(curve(whole)) > 15
    for name in (LEARNING_RATE, TARGET_TOKENS):
        assert curve(parts, name) == curve(whole, name)
    # Three workers have four sequences each of eleven, two have six each.
    assert set(curve(parts, FILLER_SEQUENCES)) >= {1.0}
    mixtures = [(read_result(config) or {})["mixture"] for config in (parts, whole)]
    assert mixtures[0] == mixtures[1]


@pytest.mark.slow
def test_train_on_four_workers_with_filler_equals_one(
    make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fields = {
        "lora__dropout": 0.0,
        "batch__sequences_per_step": 7,
        "batch__micro_batch_sequences": 1,
    }
    reference, config = make_config("reference", **fields), make_config("four", **fields)
    run_here(reference)
    group = Group(4, tmp_path_factory.mktemp("four"))
    try:
        group.run(config)
    finally:
        group.close()
    assert curve(config) == pytest.approx(curve(reference), rel=SAME)
    assert set(curve(config, FILLER_SEQUENCES)) == {1.0}


def growth(**fields: Any) -> ScaleUpPolicy:  # noqa: ANN401
    return ScaleUpPolicy(WorkerRange(**{"min": 1, "max": 4, "grow_seconds": 10.0, **fields}))


def times_due(growing: ScaleUpPolicy, seen: Mapping[float, tuple[int, int]]) -> list[float]:
    """Return when it is due, of times with the workers that train and those there is room for."""
    return [now for now, (running, room) in seen.items() if growing.is_due(running, room, now)]


def test_growth_is_due_once_there_was_room_for_long_enough() -> None:
    assert times_due(growth(), {0: (2, 2), 5: (2, 3), 14: (2, 3), 15: (2, 3)}) == [15]


@pytest.mark.parametrize(
    "seen",
    [
        # A node that comes and goes again starts the time anew.
        {0: (2, 3), 9: (2, 2), 10: (2, 3), 19: (2, 3)},
        # More than the run ever has is no room.
        {0: (4, 9), 100: (4, 9)},
        # Lost nodes are the failure's to handle.
        {0: (3, 2), 100: (3, 2)},
        # While no worker trains, Ray starts as many as there is room for by itself.
        {0: (0, 3), 100: (0, 3)},
    ],
)
def test_growth_is_not_due_without_lasting_room(seen: Mapping[float, tuple[int, int]]) -> None:
    assert times_due(growth(), seen) == []


def test_growth_without_delay_is_due_at_once() -> None:
    assert times_due(growth(grow_seconds=0.0), {3: (1, 2)}) == [3]


def test_count_reserved_counts_whole_workers_on_each_node() -> None:
    reserved = {"a": {"CPU": 5.0, "GPU": 1.0}, "b": {"CPU": 3.0, "GPU": 4.0}, "c": {"CPU": 8.0}}
    assert count_reserved(reserved, {"CPU": 2.0}) == 2 + 1 + 4
    assert count_reserved(reserved, {"CPU": 2.0, "GPU": 1.0}) == 1 + 1
    assert count_reserved({}, {"CPU": 1.0}) == 0


def start_coordinator() -> Any:  # noqa: ANN401  # an actor
    """Start Ray's coordinator anew, without what the drivers that other tests killed reserved."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    before: Any = get_or_create_autoscaling_coordinator()
    ray.kill(before)
    return get_or_create_autoscaling_coordinator()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_reservation_of_a_killed_driver_is_given_back_to_the_next(run_dir: Place) -> None:
    import ray

    needs = {"CPU": 1.0}
    coordinator = start_coordinator()

    def reserve(requester: str) -> None:
        # As Ray Train's controller does, which a killed driver takes with it.
        call = coordinator.request_resources
        ray.get(call.remote(requester_id=requester, resources=[needs] * 2, expire_after_s=180))

    first = AutoscalerReservation.take_over(run_dir, "train-first", needs)
    reserve("train-first")
    assert first.count_workers() == 2
    reserve("train-second")
    other = AutoscalerReservation("train-second", needs)
    assert other.count_workers() == 0
    second = AutoscalerReservation.take_over(run_dir, "train-second", needs)
    assert second.count_workers() == 2
    assert first.count_workers() == 0
    second.cancel()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "scale", [ScaleConfig(), ScaleConfig(num_workers=WorkerRange(min=1, max=2))]
)
def test_watch_nodes_of_any_scale_releases_what_a_killed_driver_reserved(
    run_dir: Place, scale: ScaleConfig
) -> None:
    """Ray reserves for a fixed number of workers as well."""
    import ray

    coordinator = start_coordinator()
    killed = AutoscalerReservation.take_over(run_dir, "train-killed", {"CPU": 1.0})
    ray.get(
        coordinator.request_resources.remote(
            requester_id="train-killed", resources=[{"CPU": 1.0}], expire_after_s=180
        )
    )
    assert killed.count_workers() == 1
    trainer: Any = SimpleNamespace(train_run_context=SimpleNamespace(run_id="next"))
    channel: Any = SimpleNamespace(num_workers=lambda: 1)
    with watch_nodes(scale, run_dir, trainer, channel, on_waiting=lambda: None):
        assert killed.count_workers() == 0
