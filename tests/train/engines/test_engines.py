"""Promise: results do not depend on workers, micro-batches or the ZeRO stage.

Workers here are processes with gloo between them, as under Ray Train, without Ray.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.model.llama import SummedLoss, load_model
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import list_checkpoints
from raytune_llama.train.engines.build import build_engine
from raytune_llama.train.engines.config import EngineConfig, OptimConfig
from raytune_llama.train.engines.deepspeed_zero import deepspeed_config
from raytune_llama.train.export import read_result
from raytune_llama.train.inputs import build_batch_plan, build_sources
from raytune_llama.train.monitoring.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    LOSS,
)
from raytune_llama.train.process_group import ProcessGroup
from tests.faulty_s3 import FaultyServer
from tests.train.conftest import MakeConfig, curve, run_here, stage_fields
from tests.train.group import Group
from tests.train.saved import hashes_of

SAME = 1e-5
"""Relative difference allowed between worker counts and stages in fp32."""


def assert_close(ours: list[float], reference: list[float], tolerance: float) -> None:
    assert len(ours) == len(reference)
    assert ours == pytest.approx(reference, rel=tolerance)


def test_train_mixture_on_two_workers_equals_one_worker(
    make_config: MakeConfig, two: Group, two_sources_dir: Path
) -> None:
    fields = {
        "data__store_dir": str(two_sources_dir),
        "data__sources": [{"path": "/a", "weight": 1}, {"path": "/b", "weight": 2}],
        "batch__packing": "crops",
        # One source has a single evaluated sequence: the other worker has only filler for it.
        "eval__max_sequences": 3,
        "lora__dropout": 0.0,
    }
    reference, config = make_config("reference", **fields), make_config("two", **fields)
    run_here(reference)
    two.run(config)
    for name in (LOSS, EVAL_LOSS, f"{EVAL_LOSS}/a", f"{EVAL_LOSS}/b", f"{EVAL_BITS_PER_BYTE}/b"):
        assert curve(reference, name)
        assert_close(curve(config, name), curve(reference, name), SAME)
    mixtures = [(read_result(one) or {})["mixture"] for one in (config, reference)]
    assert mixtures[0] == mixtures[1]


# Without a stage, test_strategies.py tries it beside fp16.
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, 3])
def test_train_bf16_stages_reach_the_losses_of_fp32(
    make_config: MakeConfig, two: Group, stage: int
) -> None:
    reference = make_config("reference", lora__dropout=0.0, optim__learning_rate=1e-3)
    run_here(reference)
    fields = {"engine__precision": "bf16", "optim__learning_rate": 1e-3, **stage_fields(stage)}
    config = make_config("bf16", lora__dropout=0.0, **fields)
    two.run(config)
    assert_close(curve(config), curve(reference), 1e-2)


def test_train_three_workers_with_filler_equal_one(make_config: MakeConfig, three: Group) -> None:
    fields = {"lora__dropout": 0.0, "batch__micro_batch_sequences": 1}
    reference = make_config("reference", **fields)
    run_here(reference)
    config = make_config("three", **fields)
    three.run(config)
    assert_close(curve(config), curve(reference), SAME)


def test_train_micro_batches_of_any_size_give_the_same_losses(make_config: MakeConfig) -> None:
    curves: list[list[float]] = []
    for size in (1, 2, 4):
        config = make_config(f"micro{size}", lora__dropout=0.0, batch__micro_batch_sequences=size)
        run_here(config)
        curves.append(curve(config))
    assert_close(curves[1], curves[0], SAME)
    assert_close(curves[2], curves[0], SAME)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_train_resumed_on_the_same_workers_is_bit_equal(
    make_config: MakeConfig, two: Group, stage: int
) -> None:
    whole = make_config("whole", **stage_fields(stage))
    parts = make_config("parts", **stage_fields(stage))
    two.run(whole)
    two.run(parts, stop_after=3)
    two.run(parts)
    assert curve(parts) == curve(whole)
    final = [list_checkpoints(config.run_place)[-1] for config in (whole, parts)]
    assert hashes_of(final[0]) == hashes_of(final[1])


def test_train_resumed_in_object_storage_is_bit_equal_and_fetches_once_for_both_workers(
    make_config: MakeConfig, two: Group, s3_path: Place, faulty_s3: FaultyServer
) -> None:
    whole = make_config("whole")
    parts = make_config(run_dir=str(faulty_s3.front_of(s3_path)))
    two.run(whole)
    two.run(parts, stop_after=3)
    faulty_s3.requests.clear()
    two.run(parts)
    assert curve(parts) == curve(whole)
    name = "pt_lora_model/adapter_model.safetensors"
    assert (parts.run_place / name).read_bytes() == (whole.run_place / name).read_bytes()
    fetched = [r for r in faulty_s3.requests if r.startswith("GET") and r.endswith(".safetensors")]
    of_newest = [request for request in fetched if "step-00000003" in request]
    # Each worker has written a file, and both read both.
    assert len(of_newest) == len(set(of_newest)) == 2


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 1), (0, 2)])
def test_train_resumed_on_other_workers_and_stage_keeps_the_losses(
    make_config: MakeConfig, two: Group, three: Group, first: int, second: int
) -> None:
    fields: dict[str, Any] = {"lora__dropout": 0.0, "batch__micro_batch_sequences": 1}
    reference = make_config("reference", **fields)
    run_here(reference)
    two.run(make_config("parts", **fields, **stage_fields(first)), stop_after=3)
    config = make_config("parts", **fields, **stage_fields(second))
    three.run(config)
    assert_close(curve(config), curve(reference), SAME)


@pytest.mark.parametrize(
    ("fields", "file"),
    [
        ({"lora__dropout": 0.0}, "pt_lora_model/adapter_model.safetensors"),
        ({"train": "full", "lora": None}, "pt_model/model.safetensors"),
    ],
)
def test_train_zero_3_saves_whole_tensors(
    make_config: MakeConfig, two: Group, fields: dict[str, Any], file: str
) -> None:
    plain = make_config("plain", **fields, optim__learning_rate=1e-3)
    partitioned = make_config("zero3", **fields, optim__learning_rate=1e-3, **stage_fields(3))
    run_here(plain)
    two.run(partitioned)
    ours, wanted = load_file(Path(partitioned.run_dir, file)), load_file(Path(plain.run_dir, file))
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fields", [stage_fields(0), stage_fields(2), {"engine__strategy": "fsdp"}])
def test_engine_bf16_keeps_positions_precise(
    make_config: MakeConfig, fields: dict[str, Any]
) -> None:
    config = make_config(engine__precision="bf16", lora__dropout=0.0, **fields)
    model = load_model(config.model, "bf16", torch.device("cpu"))
    ids_BT = torch.randint(400, (1, 121), generator=torch.Generator().manual_seed(3))
    positions_BT = torch.arange(120)[None]
    batch = MicroBatch(ids_BT[:, :-1], ids_BT[:, 1:], positions_BT)
    with torch.no_grad():
        wanted = SummedLoss(model)(batch.ids_BT, positions_BT, batch.labels_BT).item()
    store = TokenStore.open(Path(config.data.store_dir))
    engine = build_engine(
        config,
        build_batch_plan(config, build_sources(config, store)),
        ProcessGroup.single_process(),
    )
    assert engine.loss_sum(batch) == pytest.approx(wanted, rel=1e-6)


def test_train_fp16_overflow_skips_the_step_and_resumes_exactly(make_config: MakeConfig) -> None:
    fields = {"engine__precision": "fp16", "lora__modules_to_save": []}
    whole, parts = make_config("whole", **fields), make_config("parts", **fields)
    run_here(whole)
    run_here(parts, stop_after=3)
    run_here(parts)
    assert curve(parts) == curve(whole)


def test_deepspeed_config_contradicting_key_is_refused_by_name() -> None:
    engine = EngineConfig(zero_stage=2, deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match=r"engine\.deepspeed\.zero_optimization\.stage: 3"):
        deepspeed_config(engine, OptimConfig(), micro_batch_sequences=1, num_micro_batches=1)


def test_deepspeed_config_without_offload_fields_offloads_nothing() -> None:
    for stage in (1, 2, 3):
        engine = EngineConfig(zero_stage=stage, deepspeed={"wall_clock_breakdown": True})
        json = deepspeed_config(engine, OptimConfig(), micro_batch_sequences=1, num_micro_batches=1)
        assert "offload" not in str(json)
        assert json["wall_clock_breakdown"] is True
