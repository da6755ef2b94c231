"""Promise: a cluster that cannot hold the workers is refused by field, with what it has."""

from pathlib import Path
from typing import Any

import pytest

from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.config import ScaleConfig, WorkerRange
from raytune_llama.train.orchestration.nodes import find_shortage, probe_node
from tests.faulty_s3 import FaultyServer
from tests.train.conftest import MakeConfig


def node(cpus: float, gpus: float = 0, *, alive: bool = True, address: str = "10.0.0.1") -> Any:  # noqa: ANN401
    resources = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})
    return {"Alive": alive, "Resources": resources, "NodeManagerAddress": address}


def shortage(nodes: list[dict[str, Any]], scale: ScaleConfig) -> str | None:
    return find_shortage(nodes, scale.worker_resources, scale)


@pytest.mark.parametrize(
    ("nodes", "scale"),
    [
        ([node(1)], ScaleConfig()),
        ([node(2), node(1)], ScaleConfig(num_workers=3)),
        ([node(4), node(5)], ScaleConfig(num_workers=4, cpus_per_worker=2)),
        ([node(8, 2)], ScaleConfig(num_workers=2, use_gpu=True)),
        ([node(1, 8), node(64, 0), node(3, 4)], ScaleConfig(num_workers=4, use_gpu=True)),
        # Ray gives a head node no CPUs where the cluster is set up so.
        ([node(0), node(2)], ScaleConfig(num_workers=2)),
        # The fewest workers of an elastic run are enough to start.
        ([node(1)], ScaleConfig(num_workers=WorkerRange(min=1, max=8))),
    ],
)
def test_find_shortage_nodes_that_hold_the_workers_give_none(
    nodes: list[dict[str, Any]], scale: ScaleConfig
) -> None:
    assert shortage(nodes, scale) is None


@pytest.mark.parametrize(
    ("nodes", "scale", "field", "facts"),
    [
        ([node(2)], ScaleConfig(num_workers=3), "scale.num_workers", ["3", "hold 2", "2 CPUs"]),
        # Three CPUs a node hold one worker of two, not one and a half.
        (
            [node(3), node(3)],
            ScaleConfig(num_workers=3, cpus_per_worker=2),
            "scale.num_workers",
            ["hold 2"],
        ),
        # A worker is on one node: CPUs of two don't add up.
        (
            [node(1), node(1)],
            ScaleConfig(cpus_per_worker=2),
            "scale.cpus_per_worker",
            ["2 CPU", "hold 0", "1 CPUs"],
        ),
        ([node(4)], ScaleConfig(use_gpu=True), "scale.use_gpu", ["1 GPU", "0 GPUs"]),
        (
            [node(4, 1), node(4)],
            ScaleConfig(num_workers=2, use_gpu=True),
            "scale.num_workers",
            ["hold 1"],
        ),
        # The GPUs are there, and no CPU beside them.
        ([node(0, 1), node(4)], ScaleConfig(use_gpu=True), "scale.cpus_per_worker", ["hold 0"]),
        ([node(8, alive=False)], ScaleConfig(), "scale.cpus_per_worker", ["no node"]),
        (
            [node(8, alive=False, address="10.0.0.9"), node(1)],
            ScaleConfig(num_workers=2),
            "scale.num_workers",
            ["hold 1", "10.0.0.1: 1 CPUs"],
        ),
        (
            [node(1), node(1)],
            ScaleConfig(num_workers=WorkerRange(min=3, max=8)),
            "scale.num_workers.min",
            ["3 workers", "hold 2"],
        ),
    ],
)
def test_find_shortage_names_the_field_and_what_there_is(
    nodes: list[dict[str, Any]], scale: ScaleConfig, field: str, facts: list[str]
) -> None:
    problem = shortage(nodes, scale)
    assert problem is not None
    assert problem.startswith(f"{field}: ")
    assert all(fact in problem for fact in facts)
    assert "10.0.0.9" not in problem


def test_probe_node_that_can_do_all_answers_with_a_file(
    make_config: MakeConfig, run_dir: Place
) -> None:
    config = make_config(run_dir=str(run_dir))
    probes = run_dir / ".probe-0"
    (probes / "driver").write_bytes(b"driver")
    assert probe_node(config, probes, "node") == ("node", [])
    assert (probes / "node").exists()


def test_probe_node_names_what_it_cannot_read_or_write(
    make_config: MakeConfig,
    s3_path: Place,
    faulty_s3: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(run_dir=str(s3_path), data__store_dir=str(s3_path / "store"))
    # The driver writes elsewhere, as where a disk is not shared.
    _, problems = probe_node(config, s3_path / ".probe-0", "node")
    assert [problem.partition(":")[0] for problem in problems] == ["run_dir", "data.store_dir"]
    assert "every node mounts" in problems[0]
    assert "no manifest.json" in problems[1]
    # A node without the credentials that the driver has.
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    place = faulty_s3.front_of(s3_path)
    config = make_config(run_dir=str(place), data__store_dir=str(place / "store"))
    _, problems = probe_node(config, place / ".probe-0", "node")
    assert [problem.partition(":")[0] for problem in problems] == ["run_dir", "data.store_dir"]
    assert all("ACCESS_DENIED" in problem for problem in problems)
