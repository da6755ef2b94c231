"""Promise: a cluster that cannot hold the workers is refused by field, with what it has."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from ray.core.generated.autoscaler_pb2 import (
    GetClusterStatusReply,  # pyright: ignore[reportAttributeAccessIssue]  # made by protobuf
)

from raytune_llama.train.orchestration.config import ScaleConfig, WorkerRange
from raytune_llama.train.orchestration.resources import (
    find_shortage,
    has_autoscaler,
    refuses_for_good,
)
from tests.pipeline.conftest import ROOT, own_cluster

H100 = {"accelerator_type:H100": 1.0}


def node(
    cpus: float,
    gpus: float = 0,
    *,
    alive: bool = True,
    address: str = "10.0.0.1",
    labels: dict[str, str] | None = None,
    others: dict[str, float] | None = None,
) -> Any:  # noqa: ANN401
    resources = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {}) | (others or {})
    return {
        "Alive": alive,
        "Resources": resources,
        "NodeManagerAddress": address,
        "Labels": labels or {},
    }


@pytest.mark.parametrize(
    ("types", "start", "expected"),
    [
        ([""], None, False),
        (["head", "l4-spot"], None, True),
        # KubeRay names the types of all nodes, with and without the autoscaler beside the head.
        (["headgroup", "gpu"], "ray start --head --num-cpus=0 ", False),
        (["headgroup", "gpu"], "ray start --head --no-monitor --num-cpus=0 ", True),
        (["headgroup", "gpu"], "ray start --address=shared-head-svc:6379 ", True),
    ],
)
def test_autoscaler_is_one_that_adds_nodes(
    types: list[str], start: str | None, *, expected: bool
) -> None:
    environment = {} if start is None else {"KUBERAY_GEN_RAY_START_CMD": start}
    assert has_autoscaler(types, environment) is expected


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
    assert find_shortage(nodes, scale) is None


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
        (
            [node(64, 4, others=H100), node(64, 8, others={"accelerator_type:L4": 1.0})],
            ScaleConfig(num_workers=8, use_gpu=True, accelerator_type="H100"),
            "scale.num_workers",
            ["8 workers with 1 CPU and 1 GPU (H100) each", "hold 4", "64 CPUs, 8 GPUs, L4"],
        ),
        (
            [node(64, 8, others={"accelerator_type:L4": 1.0}), node(8)],
            ScaleConfig(use_gpu=True, accelerator_type="H100"),
            "scale.accelerator_type",
            ["hold 0", "8 CPUs, 0 GPUs, no accelerator type", "use one of L4"],
        ),
        (
            [node(8, labels={"pool": "b"}), node(8)],
            ScaleConfig(label_selector={"pool": "a"}),
            "scale.label_selector",
            ["1 CPU (pool: a)", "hold 0", "pool: b", "pool: no label"],
        ),
        (
            [node(8, labels={"pool": "a"}), node(8)],
            ScaleConfig(num_workers=9, label_selector={"pool": "a"}),
            "scale.num_workers",
            ["hold 8"],
        ),
        (
            [node(8, others={"nvme": 2.0}), node(8)],
            ScaleConfig(num_workers=2, resources_per_worker={"nvme": 4.0}),
            "scale.resources_per_worker.nvme",
            ["1 CPU and 4 nvme", "hold 0", "2 nvme", "0 nvme"],
        ),
        (
            [node(8), node(8)],
            ScaleConfig(num_workers=3, placement="strict_spread"),
            "scale.placement",
            ["each on a node of its own", "hold 2"],
        ),
        (
            [node(1), node(1)],
            ScaleConfig(num_workers=3, placement="strict_spread"),
            "scale.num_workers",
            ["hold 2"],
        ),
        # Each requirement is met, but not all on one node.
        (
            [
                node(8, 1, others=H100, labels={"market": "spot"}),
                node(8, 1, others={"accelerator_type:L4": 1.0}, labels={"market": "on-demand"}),
            ],
            ScaleConfig(
                use_gpu=True, accelerator_type="H100", label_selector={"market": "on-demand"}
            ),
            "scale.label_selector",
            ["H100, market: spot", "L4, market: on-demand"],
        ),
        (
            [node(8, 1)],
            ScaleConfig(use_gpu=True, accelerator_type="L4"),
            "scale.accelerator_type",
            ["no node has a type of GPU"],
        ),
        (
            [node(8, others={"memory": 4 * 2.0**30})],
            ScaleConfig(resources_per_worker={"memory": 64 * 2.0**30}),
            "scale.resources_per_worker.memory",
            ["64 GiB memory", "8 CPUs, 0 GPUs, 4 GiB memory"],
        ),
        (
            [node(8, 1)],
            ScaleConfig(num_workers=2, use_gpu=True, cpus_per_worker=2),
            "scale.num_workers",
            ["hold 1"],
        ),
    ],
)
def test_find_shortage_names_the_field_and_what_there_is(
    nodes: list[dict[str, Any]], scale: ScaleConfig, field: str, facts: list[str]
) -> None:
    problem = find_shortage(nodes, scale)
    assert problem is not None
    assert problem.startswith(f"{field}: ")
    assert all(fact in problem for fact in facts)
    assert "10.0.0.9" not in problem
    assert "set scale.wait_seconds" in problem
    waited = find_shortage(nodes, replace(scale, wait_seconds=60))
    assert waited is not None
    assert "set scale.wait_seconds" not in waited


def status(refused: str, waiting: Sequence[str], *, is_adding: bool = False) -> Any:  # noqa: ANN401
    reply: Any = GetClusterStatusReply()
    report, requests = reply.autoscaling_state, reply.cluster_resource_state
    report.infeasible_gang_resource_requests.add(details=f"{refused}:PACK|PENDING")
    for group in waiting:
        requests.pending_gang_resource_requests.add(details=f"{group}:PACK|PENDING")
    if is_adding:
        report.pending_instance_requests.add(ray_node_type_name="gpu")
    return reply


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (status("ab", ["ab"]), True),
        (status("cd", ["ab", "cd"]), False),
        # Another run waits for the nodes that this one would get.
        (status("ab", ["ab", "cd"]), False),
        (status("ab", ["ab"], is_adding=True), False),
    ],
)
def test_refusal_is_final_only_if_nobody_else_waits_for_nodes(
    reply: Any,  # noqa: ANN401
    *,
    expected: bool,
) -> None:
    assert refuses_for_good(reply, "ab") is expected


@pytest.mark.ray
def test_resources_on_labelled_nodes_are_counted_waited_for_and_used() -> None:
    """A cluster of its own, since the tests' shared one has a single node without labels."""
    command = [sys.executable, "-m", "tests.train.orchestration.labelled_nodes"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=own_cluster(), check=False
    )
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("checked ")]
    assert shown == ["checked counts", "checked busy", "checked stop", "checked shortage"]
