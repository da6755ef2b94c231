"""Promise: a cluster that cannot hold the workers is refused by field, with what it has."""

from typing import Any

import pytest

from raytune_llama.train.cluster import find_shortage, worker_resources
from raytune_llama.train.config import ScaleConfig


def node(cpus: float, gpus: float = 0, *, alive: bool = True, address: str = "10.0.0.1") -> Any:  # noqa: ANN401
    resources = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})
    return {"Alive": alive, "Resources": resources, "NodeManagerAddress": address}


def shortage(nodes: list[dict[str, Any]], scale: ScaleConfig) -> str | None:
    return find_shortage(nodes, worker_resources(scale), scale)


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
