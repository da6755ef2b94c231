"""Promise: a run with noise on its embeddings resumes bit for bit, and evaluates without it."""

import pytest

from raytune_llama.train.monitoring.metrics import EVAL_LOSS
from tests.train.conftest import MakeConfig, curve, run_here, stage_fields
from tests.train.group import Group

NOISY = {"optim__neftune_alpha": 15.0}


def test_train_with_noise_stopped_and_started_again_equals_the_whole(
    make_config: MakeConfig,
) -> None:
    whole, parts, plain = (
        make_config("whole", **NOISY),
        make_config("parts", **NOISY),
        make_config(),
    )
    run_here(whole)
    run_here(parts, stop_after=3)
    run_here(parts)
    run_here(plain)
    assert curve(parts) == curve(whole)
    assert curve(whole) != curve(plain)
    # Before the first step nothing has been trained, and evaluation has no noise.
    assert curve(whole, EVAL_LOSS)[0] == curve(plain, EVAL_LOSS)[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_train_with_noise_gives_the_same_losses_on_every_stage(
    make_config: MakeConfig, two: Group, stage: int
) -> None:
    fields = {**NOISY, "lora__dropout": 0.0}
    reference = make_config("reference", **fields)
    config = make_config("zero", **fields, **stage_fields(stage))
    two.run(reference)
    two.run(config)
    assert curve(config) == pytest.approx(curve(reference), rel=1e-5)
