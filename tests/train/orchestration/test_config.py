"""Promise: workers that Ray could not place as a run needs them are refused by field."""

from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.train.orchestration.config import ScaleConfig

ELASTIC = {"num_workers": {"min": 1, "max": 2}}
GPU = {"use_gpu": True}


@pytest.mark.parametrize(
    "fields",
    [
        {"label_selector": {"pool": "a"}, "placement": "strict_spread", "num_workers": 4},
        {**GPU, "accelerator_type": "H100", "gpus_per_worker": 0.25},
        {**GPU, "gpus_per_worker": 0.333},
        {**GPU, "gpus_per_worker": 0.01},
        {**ELASTIC, **GPU, "accelerator_type": "H100", "resources_per_worker": {"nvme": 2}},
        {**ELASTIC, "placement": "spread", "resources_per_worker": {"memory": 2**33}},
        {"resources_per_worker": {"nvme": 0.5}},
    ],
)
def test_placement_that_ray_can_meet_is_accepted(fields: dict[str, Any]) -> None:
    from_dict(ScaleConfig, fields)


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"accelerator_type": "H100"}, "accelerator_type: got H100"),
        ({"gpus_per_worker": 0.5}, "gpus_per_worker: got 0.5, but use_gpu"),
        ({**GPU, "gpus_per_worker": 0.5, "num_workers": 2}, "gpus_per_worker: got 0.5"),
        ({**GPU, **ELASTIC, "gpus_per_worker": 0.5}, "gpus_per_worker: got 0.5, but an elastic"),
        ({**GPU, "gpus_per_worker": 2}, "gpus_per_worker: got 2"),
        ({**GPU, "gpus_per_worker": 0.6}, "gpus_per_worker: got 0.6, but equal shares"),
        ({**GPU, "gpus_per_worker": 0.3}, "gpus_per_worker: got 0.3, but equal shares"),
        ({"resources_per_worker": {"CPU": 2}}, "resources_per_worker: got CPU; use cpus_per"),
        ({"resources_per_worker": {"GPU": 2}}, "resources_per_worker: got GPU; use use_gpu"),
        (
            {"resources_per_worker": {"accelerator_type:L4": 1}},
            "resources_per_worker: got accelerator_type:L4; use accelerator_type",
        ),
        ({"resources_per_worker": {"nvme": 0}}, "resources_per_worker.nvme: got 0"),
        ({**ELASTIC, "resources_per_worker": {"nvme": 0.5}}, "resources_per_worker.nvme: got 0.5"),
        ({**ELASTIC, "label_selector": {"pool": "a"}}, "label_selector: set, but Ray counts"),
        ({**ELASTIC, "placement": "strict_spread"}, "placement: got strict_spread"),
        ({"placement": "strict_pack"}, "placement: got 'strict_pack'"),
    ],
)
def test_placement_that_ray_cannot_meet_is_refused_by_field(
    fields: dict[str, Any], start: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(ScaleConfig, fields)
    assert [problem for problem in caught.value.problems if problem.startswith(start)]


def test_worker_resources_are_those_that_a_node_must_have() -> None:
    scale = ScaleConfig(
        use_gpu=True,
        gpus_per_worker=0.5,
        accelerator_type="L4",
        cpus_per_worker=2,
        resources_per_worker={"nvme": 1.0},
    )
    assert scale.worker_resources == {
        "CPU": 2.0,
        "GPU": 0.5,
        "accelerator_type:L4": 0.001,
        "nvme": 1.0,
    }
