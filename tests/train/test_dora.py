"""Promise: DoRA and rsLoRA train what they say, on every engine alike."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from raytune_llama.config.settings import ConfigError
from raytune_llama.train.monitoring.metrics import GRAD_NORM
from tests.train.conftest import (
    MakeConfig,
    curve,
    fields_of,
    problems_of,
    run_here,
    stage_fields,
)
from tests.train.group import Group

DORA = {"lora__dora": True, "lora__dropout": 0.0, "optim__learning_rate": 2e-3}


# Stage 1 has the optimizer of stage 2.
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_dora_gives_the_same_losses_and_resumes_on_every_stage(
    make_config: MakeConfig, two: Group, stage: int
) -> None:
    reference = make_config("reference", **DORA)
    run_here(reference)
    config = make_config("zero", **DORA, **stage_fields(stage))
    two.run(config, stop_after=3)
    two.run(config)
    assert curve(config) == pytest.approx(curve(reference), rel=1e-5)
    weights = [
        load_file(Path(each.run_dir, "pt_lora_model", "adapter_model.safetensors"))
        for each in (config, reference)
    ]
    magnitudes = [key for key in weights[1] if "magnitude" in key]
    assert len(magnitudes) == 14
    for key in magnitudes:
        assert weights[0][key].tolist() == pytest.approx(weights[1][key].tolist(), rel=1e-3)


def test_dora_with_partitioned_weights_is_refused(make: MakeConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**DORA, **stage_fields(3))
    assert fields_of(caught.value.problems) == ["engine.zero_stage"]
    first = make("first", **DORA)
    run_here(first)
    fields = {"lora": None, "adapter": str(Path(first.run_dir, "pt_lora_model"))}
    assert problems_of(make("two", **fields, **stage_fields(2))) == []
    assert fields_of(problems_of(make("three", **fields, **stage_fields(3)))) == [
        "engine.zero_stage"
    ]


def test_rslora_scales_the_first_gradient_by_the_root_of_the_rank(make_config: MakeConfig) -> None:
    # At the start B is zero: only B has a gradient, in proportion to the scale.
    fields = {"lora__modules_to_save": [], "lora__dropout": 0.0, "lora__rank": 9, "max_steps": 1}
    norms: list[float] = []
    for name, rslora in (("plain", False), ("root", True)):
        config = make_config(name, **fields, lora__rslora=rslora)
        run_here(config)
        norms += curve(config, GRAD_NORM)
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-5)
