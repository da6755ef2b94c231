"""Promise: conditions that Ray would refuse, or take for something else, are refused by field."""

import pytest

from raytune_llama.config.node_selection import NodeSelection, check_node_selection


@pytest.mark.parametrize(
    "labels",
    [
        {"market-type": "spot"},
        {"ray.io/accelerator-type": "in(H100,H200)"},
        {"pool": "!a", "zone": "!in(a,b)", "a_b.c": "1"},
    ],
)
def test_labels_of_ray_are_accepted(labels: dict[str, str]) -> None:
    from ray._private.label_utils import validate_label_selector

    assert validate_label_selector(labels) is None
    assert check_node_selection(NodeSelection(label_selector=labels), use_gpu=False) == []


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"pool": "a b"}, "label_selector.pool: got 'a b'"),
        ({"pool": "in()"}, "label_selector.pool: "),
        ({"pool": "!!a"}, "label_selector.pool: "),
        ({"pool": "a*"}, "label_selector.pool: "),
        ({"-pool": "a"}, "label_selector: '-pool'"),
        ({"a b/pool": "a"}, "label_selector: 'a b/pool'"),
    ],
)
def test_labels_that_ray_refuses_are_refused_by_field(labels: dict[str, str], field: str) -> None:
    from ray._private.label_utils import validate_label_selector

    assert validate_label_selector(labels) is not None
    (problem,) = check_node_selection(NodeSelection(label_selector=labels), use_gpu=False)
    assert problem.startswith(field)


def test_space_in_a_list_of_labels_which_ray_takes_for_a_part_of_the_value_is_refused() -> None:
    nodes = NodeSelection(label_selector={"pool": "in(a, b)"})
    (problem,) = check_node_selection(nodes, use_gpu=False)
    assert problem.startswith("label_selector.pool: got 'in(a, b)'")
    assert "without spaces" in problem


def test_type_of_gpu_without_gpus_is_refused() -> None:
    nodes = NodeSelection(accelerator_type="H100")
    (problem,) = check_node_selection(nodes, use_gpu=False)
    assert problem.startswith("accelerator_type: got H100")
    assert check_node_selection(nodes, use_gpu=True) == []
