"""Promise: workers are counted as Ray's scheduler places them, and what no node has is named."""

import logging
from typing import Any

import pytest

from raytune_llama.capacity import WorkerNeeds, limit_workers, matches_labels
from raytune_llama.config.node_selection import NodeSelection
from raytune_llama.config.settings import ConfigError


def node(*, alive: bool = True, labels: dict[str, str] | None = None, **resources: float) -> Any:  # noqa: ANN401
    return {
        "Alive": alive,
        "NodeManagerAddress": "10.0.0.1",
        "NodeID": "a",
        "Resources": {name.replace("__", ":"): amount for name, amount in resources.items()},
        "Labels": labels or {},
    }


@pytest.mark.parametrize(
    ("resources", "needs", "expected"),
    [
        ({"CPU": 8.0}, {"CPU": 3.0}, 2),
        ({"CPU": 8.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}, 4),
        ({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}, 0),
        ({"CPU": 9.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 0.5}, 4),
        # A share lies on one GPU: two GPUs have no room for three workers of 0.6.
        ({"CPU": 9.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 0.6}, 2),
        # In floating point, 0.3 // 0.1 is 2.
        ({"CPU": 9.0, "nvme": 0.3}, {"CPU": 1.0, "nvme": 0.1}, 3),
        ({"CPU": 64.0, "accelerator_type__H100": 1.0}, {"CPU": 1.0, "x": 1.0}, 0),
    ],
)
def test_count_on_counts_whole_workers(
    resources: dict[str, Any], needs: dict[str, float], expected: int
) -> None:
    assert WorkerNeeds(needs).count_on(node(**resources)) == expected


def test_count_on_a_type_of_gpu_counts_no_others() -> None:
    needs = WorkerNeeds.of(NodeSelection(accelerator_type="H100"), cpus=1, gpus=1)
    h100 = node(CPU=64.0, GPU=8.0, accelerator_type__H100=1.0)
    l4 = node(CPU=64.0, GPU=8.0, accelerator_type__L4=1.0)
    assert needs.count([h100, l4]) == 8
    assert needs.count([l4]) == 0


def test_count_on_free_resources_leaves_out_what_others_use() -> None:
    needs, own = WorkerNeeds({"CPU": 2.0}), node(CPU=8.0)
    assert needs.count_free([own], {"a": {"CPU": 5.0}}) == 2
    assert needs.count_free([own], {}) == 0


def test_count_groups_of_workers_that_are_alone_on_their_nodes() -> None:
    nodes = [node(CPU=4.0), node(CPU=2.0), node(CPU=1.0), node(CPU=8.0, alive=False)]
    alone = WorkerNeeds({"CPU": 1.0}, is_alone=True)
    assert alone.count(nodes) == 3
    # A second group of three would need another CPU on the third node.
    assert [alone.count_groups(nodes, size) for size in (1, 2, 3, 4)] == [7, 3, 1, 0]
    assert [alone.shared().count_groups(nodes, size) for size in (1, 2, 3, 8)] == [7, 3, 2, 0]


@pytest.mark.parametrize(
    ("condition", "value", "expected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "b", True),
        ("!a", "a", False),
        ("!a", None, True),
        ("in(a,b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a,b)", "c", True),
        ("!in(a,b)", "a", False),
        ("!in(a,b)", None, True),
        ("in", "in", True),
    ],
)
def test_matches_labels_follows_ray(condition: str, value: str | None, *, expected: bool) -> None:
    labels = {"other": "a"} | ({} if value is None else {"key": value})
    assert matches_labels(labels, {"key": condition}) is expected


def test_limit_workers_starts_fewer_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    needs = WorkerNeeds({"CPU": 2.0})
    assert limit_workers(2, needs, [node(CPU=5.0)]) == 2
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert limit_workers(9, needs, [node(CPU=5.0)]) == 2
    assert "can hold 2 workers" in caplog.text


@pytest.mark.parametrize(
    ("nodes", "selection", "gpus", "field"),
    [
        ([node(CPU=1.0)], NodeSelection(), 0, "cpus_per_worker"),
        ([node(CPU=1.0, alive=False)], NodeSelection(), 0, "cpus_per_worker"),
        ([node(CPU=4.0)], NodeSelection(), 1, "use_gpu"),
        (
            [node(CPU=4.0, GPU=1.0, accelerator_type__L4=1.0)],
            NodeSelection(accelerator_type="H100"),
            1,
            "accelerator_type",
        ),
        (
            [node(CPU=4.0, labels={"pool": "a"})],
            NodeSelection(label_selector={"pool": "b"}),
            0,
            "label_selector",
        ),
    ],
)
def test_limit_workers_without_any_names_what_no_node_has(
    nodes: list[Any], selection: NodeSelection, gpus: int, field: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^scale\.{field}: a worker needs 2 CPU"):
        limit_workers(1, WorkerNeeds.of(selection, cpus=2, gpus=gpus), nodes)
