"""Promise: a strategy is a matter of speed and memory: losses and checkpoints are the same.

Workers here are processes with gloo between them, as under Ray Train, without Ray.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_llama.train.monitoring.metrics import EVAL_LOSS, GRAD_NORM, LOSS
from tests.train.conftest import MakeConfig, curve, run_here, stage_fields
from tests.train.group import Group

SAME = 1e-5
"""Relative difference allowed between strategies in fp32."""

FSDP = {"engine__strategy": "fsdp"}
DDP = stage_fields(0)
STRATEGIES = {
    "zero_1": stage_fields(1),
    "zero_2": stage_fields(2),
    "zero_3": stage_fields(3),
    "fsdp": FSDP,
    "ddp": DDP,
}
ADAPTER = "pt_lora_model/adapter_model.safetensors"
MODEL = "pt_model/model.safetensors"

TRAINED: dict[str, dict[str, Any]] = {
    # A tied table that is trained, and all that is frozen.
    "lora": {"lora__dropout": 0.0},
    "untied": {"lora__dropout": 0.0, "lora__modules_to_save": ["embed_tokens", "lm_head"]},
    # Its steps are of a size that does not multiply rounding.
    "full": {"train": "full", "lora": None, "optim__learning_rate": 1e-3},
}


def assert_same(ours: list[float], wanted: list[float], tolerance: float) -> None:
    assert len(ours) == len(wanted) > 0
    assert ours == pytest.approx(wanted, rel=tolerance)


def assert_same_curves(ours: Any, wanted: Any) -> None:  # noqa: ANN401  # configs
    assert_same(curve(ours), curve(wanted), SAME)
    assert_same(curve(ours, EVAL_LOSS), curve(wanted, EVAL_LOSS), SAME)
    # The gradient's norm shows wrong sums that AdamW, which is blind to scale, would hide.
    assert_same(curve(ours, GRAD_NORM), curve(wanted, GRAD_NORM), 1e-4)


@pytest.mark.parametrize(
    ("trained", "strategy"),
    [
        *(("lora", strategy) for strategy in STRATEGIES),
        *(("full", strategy) for strategy in STRATEGIES if strategy != "zero_1"),
        # The optimizer of ZeRO 2, which tries it with all weights too.
        pytest.param("full", "zero_1", marks=pytest.mark.slow),
    ],
)
def test_train_strategies_on_two_workers_equal_one_worker(
    make_config: MakeConfig, two: Group, trained: str, strategy: str
) -> None:
    fields = TRAINED[trained]
    reference = make_config("reference", **{**fields, **DDP})
    run_here(reference)
    config = make_config("two", **{**fields, **STRATEGIES[strategy]})
    two.run(config)
    assert_same_curves(config, reference)


def test_train_fsdp_of_untied_tables_equals_ddp_and_saves_them_whole(
    make_config: MakeConfig, two: Group, untied_model_dir: Path
) -> None:
    fields = {**TRAINED["untied"], "model__path": str(untied_model_dir)}
    reference, config = make_config("ddp", **fields), make_config("fsdp", **fields, **FSDP)
    run_here(reference)
    two.run(config)
    assert_same_curves(config, reference)
    ours, wanted = (load_file(Path(each.run_dir, ADAPTER)) for each in (config, reference))
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)


def test_train_fsdp_full_saves_the_model_that_ddp_saves(
    make_config: MakeConfig, two: Group
) -> None:
    reference = make_config("ddp", **TRAINED["full"])
    config = make_config("fsdp", **TRAINED["full"], **FSDP)
    run_here(reference)
    two.run(config)
    ours, wanted = (load_file(Path(each.run_dir, MODEL)) for each in (config, reference))
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("new_rows_only", [False, True])
def test_train_fsdp_of_embeddings_equals_ddp(
    make_config: MakeConfig,
    two: Group,
    grown_tokenizer: Path,
    grown_store: Path,
    new_rows_only: bool,  # noqa: FBT001
) -> None:
    fields = {
        "train": "embeddings",
        "lora": None,
        "embeddings": {"new_rows_only": new_rows_only},
        "model__tokenizer": str(grown_tokenizer),
        "data__store_dir": str(grown_store),
    }
    reference, config = make_config("ddp", **fields), make_config("fsdp", **fields, **FSDP)
    run_here(reference)
    two.run(config)
    assert_same_curves(config, reference)


def test_train_fsdp_alone_and_on_two_workers_is_the_same(
    make_config: MakeConfig, two: Group
) -> None:
    alone = make_config("alone", lora__dropout=0.0, **FSDP)
    shared = make_config("shared", lora__dropout=0.0, **FSDP)
    run_here(alone)
    two.run(shared)
    assert_same_curves(shared, alone)


def test_train_fsdp_resumed_on_the_same_workers_is_bit_equal(
    make_config: MakeConfig, two: Group
) -> None:
    whole, parts = make_config("whole", **FSDP), make_config("parts", **FSDP)
    two.run(whole)
    two.run(parts, stop_after=3)
    two.run(parts)
    assert curve(parts) == curve(whole)
    ours, wanted = (load_file(Path(each.run_dir, ADAPTER)) for each in (parts, whole))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fsdp", "zero_3"),
        ("zero_2", "fsdp"),
        # That ddp loads and saves every number of fsdp, test_restore.py says.
        pytest.param("fsdp", "ddp", marks=pytest.mark.slow),
        pytest.param("ddp", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_train_resumed_under_another_strategy_keeps_the_losses(
    make_config: MakeConfig, two: Group, first: str, second: str
) -> None:
    fields = TRAINED["lora"]
    reference = make_config("reference", **fields)
    run_here(reference)
    two.run(make_config("parts", **{**fields, **STRATEGIES[first]}), stop_after=3)
    config = make_config("parts", **{**fields, **STRATEGIES[second]})
    two.run(config)
    assert_same_curves(config, reference)


@pytest.mark.parametrize(
    ("trained", "strategy"),
    [
        ("lora", "zero_3"),
        ("lora", "fsdp"),
        ("lora", "ddp"),
        ("full", "fsdp"),
        # Computes with whole weights, as ddp does.
        pytest.param("lora", "zero_2", marks=pytest.mark.slow),
    ],
)
def test_train_gradient_checkpointing_changes_no_loss_under_any_strategy(
    make_config: MakeConfig, two: Group, trained: str, strategy: str
) -> None:
    # Dropout is on: what is computed again has to drop the same.
    fields = {**TRAINED[trained], **STRATEGIES[strategy]}
    fields |= {"lora__dropout": 0.1} if trained == "lora" else {}
    plain = make_config("plain", **fields)
    recomputed = make_config("recomputed", **fields, engine__gradient_checkpointing=True)
    two.run(plain)
    two.run(recomputed)
    assert_same_curves(recomputed, plain)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_train_half_precision_reaches_the_losses_of_fp32(
    make_config: MakeConfig, two: Group, strategy: str, precision: str
) -> None:
    fields = {"lora__dropout": 0.0, "optim__learning_rate": 1e-3}
    reference = make_config("reference", **fields)
    run_here(reference)
    config = make_config(
        "half", **{**fields, **STRATEGIES[strategy], "engine__precision": precision}
    )
    two.run(config)
    # The scale that fp16 starts with overflows: the first steps change nothing.
    first = len([norm for norm in curve(config, GRAD_NORM) if norm == float("inf")])
    assert_same(curve(config)[: first + 1], curve(reference)[:1] * (first + 1), 0.1)
    assert curve(config)[-1] < curve(config)[0]
    if precision == "bf16":
        assert_same(curve(config), curve(reference), 1e-2)


def test_train_fsdp_fp16_overflow_skips_the_step_on_all_workers_and_resumes_exactly(
    make_config: MakeConfig, two: Group
) -> None:
    fields = {**FSDP, "engine__precision": "fp16"}
    whole, parts = make_config("whole", **fields), make_config("parts", **fields)
    two.run(whole)
    two.run(parts, stop_after=3)
    two.run(parts)
    assert curve(parts) == curve(whole)
    assert curve(parts, LOSS)


def test_train_fsdp_with_offloaded_parameters_changes_no_loss(
    make_config: MakeConfig, two: Group
) -> None:
    plain = make_config("plain", **FSDP)
    offloaded = make_config("offloaded", **FSDP, engine__offload_parameters=True)
    two.run(plain)
    two.run(offloaded)
    assert curve(offloaded) == curve(plain)
