"""What workers reserve comes free when the controller that reserved it is gone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytune_llama.storage.place import Place
from raytune_llama.storage.process import ProcessIdentity
from raytune_llama.train.orchestration import placement_group as reserved
from raytune_llama.train.orchestration.placement_group import (
    WorkerPlacement,
    write_worker_placement,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0)
class Controller:
    """Reserves for one worker, as Ray Train's controller does, and lets it write that down."""

    def start(self, run_dir: Place) -> tuple[ProcessIdentity, PlacementGroup]:
        group = placement_group([{"CPU": 0.5}])
        ray.get(group.ready())
        there = PlacementGroupSchedulingStrategy(placement_group=group)
        worker: Any = ray.remote(write_worker_placement)
        here = ProcessIdentity.current()
        call = worker.options(num_cpus=0.5, scheduling_strategy=there)
        ray.get(call.remote(run_dir, here))
        return here, group


@pytest.fixture
def run_dir(tmp_path: Path) -> Place:
    return Place.local(tmp_path)


@pytest.fixture
def controller() -> Iterator[Any]:
    actor: Any = Controller.remote()
    yield actor
    ray.kill(actor)


def state_of(group: PlacementGroup) -> str:
    return placement_group_table(group)["state"]


def test_group_of_a_killed_controller_is_removed(
    controller: Any,  # noqa: ANN401  # an actor handle has no type
    run_dir: Place,
) -> None:
    process, group = ray.get(controller.start.remote(run_dir))
    found = WorkerPlacement.read(run_dir)
    assert found is not None
    assert found.controller == process
    process.kill()
    assert state_of(group) == "CREATED"
    assert found.release()
    assert state_of(group) == "REMOVED"
    # Once more, as after a restart: nothing is there to free.
    assert not found.release()


def test_group_of_a_controller_that_runs_stays(
    controller: Any,  # noqa: ANN401  # an actor handle has no type
    run_dir: Place,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(reserved, "END_SECONDS", 0.5)
    process, group = ray.get(controller.start.remote(run_dir))
    found = WorkerPlacement.read(run_dir)
    assert found is not None
    assert not found.release()
    assert state_of(group) == "CREATED"
    assert f"not removed: Ray's controller still runs: {process}" in caplog.text


def test_run_without_workers_or_with_those_of_another_cluster_frees_nothing(
    run_dir: Place, caplog: pytest.LogCaptureFixture
) -> None:
    assert WorkerPlacement.read(run_dir) is None
    gone = {"placement_group": "ab" * 18, "controller": None}
    (run_dir / reserved.WORKER_PLACEMENT_FILE).write_json(gone)
    found = WorkerPlacement.read(run_dir)
    assert found is not None
    assert not found.release()
    (run_dir / reserved.WORKER_PLACEMENT_FILE).write_bytes(b"{")
    assert WorkerPlacement.read(run_dir) is None
    assert "cannot read the workers' placement group" in caplog.text


def test_worker_that_cannot_write_down_what_it_reserves_goes_on(
    controller: Any,  # noqa: ANN401  # an actor handle has no type
    tmp_path: Path,
) -> None:
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    _, group = ray.get(controller.start.remote(Place.local(no_folder)))
    assert state_of(group) == "CREATED"
    assert WorkerPlacement.read(Place.local(no_folder)) is None
