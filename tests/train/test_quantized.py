"""Promise: above a base in 8 or 4 bits an adapter is trained as above any other.

The base keeps every bit, and what comes out fits the base as it is.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_llama.config.settings import ConfigError
from raytune_llama.model.config import LLAMA_PROJECTIONS
from raytune_llama.model.llama import build_empty_model, causal_lm
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.engines.protocol import trained_parameters
from raytune_llama.train.estimate.plan import build_model, plan_memory
from raytune_llama.train.loop import Session, open_session, read_batches, train_step
from raytune_llama.train.monitoring.metrics import EVAL_LOSS
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import MakeConfig, curve, fields_of, problems_of, run_here
from tests.train.group import Group

KINDS = ("int8", "nf4")


def open_here(config: Any) -> Session:  # noqa: ANN401  # a config
    return open_session(config, ProcessGroup.single_process())


def packed_weights(session: Session) -> dict[str, str]:
    """Hash what is held of each quantised weight, with its scales."""
    hashes: dict[str, str] = {}
    weight: Any
    for name, weight in causal_lm(session.engine.module.model).named_parameters():
        if weight.dtype.is_floating_point:
            continue
        state = getattr(weight, "quant_state", None)
        held: Any = weight
        scales = held.SCB if state is None else state.absmax
        content = weight.detach().numpy().tobytes() + scales.numpy().tobytes()
        hashes[name] = hashlib.sha256(content).hexdigest()
    return hashes


@pytest.mark.parametrize("kind", KINDS)
def test_train_on_a_quantised_base_learns_and_leaves_its_bits(
    make_config: MakeConfig, kind: str
) -> None:
    config = make_config(model__quantization=kind, lora__dropout=0.0)
    session = open_here(config)
    assert isinstance(session.engine, DataParallelEngine)
    before = packed_weights(session)
    assert len(before) == 14
    (batch, *_) = read_batches(session, 0)
    micro_batch = batch.micro_batches[0]
    losses = [session.engine.loss_sum(micro_batch)]
    for _ in range(2):
        train_step(session, batch, sum(batch.source_targets))
        losses.append(session.engine.loss_sum(micro_batch))
    assert losses[2] < losses[1] < losses[0]
    assert packed_weights(session) == before


@pytest.mark.parametrize("kind", KINDS)
def test_train_on_a_quantised_base_saves_an_adapter_of_the_base_as_it_is(
    make_config: MakeConfig, model_dir: Path, kind: str
) -> None:
    config = make_config(model__quantization=kind, lora__dropout=0.0)
    run_here(config)
    result = Path(config.run_dir, "pt_lora_model")
    manifest = json.loads((result / "manifest.json").read_text())
    assert manifest["base_quantization"] == kind
    tensors = load_file(result / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        plain = base(ids, labels=ids).loss
        adapted = PeftModel.from_pretrained(base, str(result))(ids, labels=ids).loss
    assert torch.isfinite(adapted)
    assert not torch.isclose(adapted, plain, rtol=1e-3)
    # On the whole base the adapter does what it was trained for.
    unquantised = make_config("plain", lora__dropout=0.0)
    run_here(unquantised)
    assert curve(config, EVAL_LOSS)[-1] == pytest.approx(curve(unquantised, EVAL_LOSS)[-1], rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_train_on_a_quantised_base_two_workers_resumed_equal_one(
    make_config: MakeConfig, two: Group, kind: str
) -> None:
    fields = {"model__quantization": kind, "lora__dropout": 0.0}
    reference, config = make_config("one", **fields), make_config("two", **fields)
    run_here(reference)
    two.run(config, stop_after=3)
    two.run(config)
    assert curve(config) == pytest.approx(curve(reference), rel=1e-5)
    recomputed = make_config("recomputed", **fields, engine__gradient_checkpointing=True)
    run_here(recomputed)
    assert curve(recomputed) == pytest.approx(curve(reference), rel=1e-5)


def test_train_on_from_an_adapter_keeps_its_saved_modules_whole(make_config: MakeConfig) -> None:
    lora = {"rank": 4, "dropout": 0.0, "modules_to_save": ["up_proj"], "targets": ["q_proj"]}
    first = make_config("first", model__quantization="nf4", lora=lora)
    run_here(first)
    adapter = str(Path(first.run_dir, "pt_lora_model"))
    config = make_config("second", model__quantization="nf4", lora=None, adapter=adapter)
    session = open_here(config)
    packed = packed_weights(session)
    assert len(packed) == 12
    assert not any("up_proj" in name for name in packed)
    names = [name for name, _ in trained_parameters(session.engine.module)]
    assert len([name for name in names if "up_proj" in name]) == 2
    run_here(config)
    assert curve(config)[0] < curve(first)[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_train_on_a_quantised_base_with_dora_in_half_precision_learns(
    make_config: MakeConfig, kind: str, precision: str
) -> None:
    config = make_config(
        model__quantization=kind, engine__precision=precision, lora__dora=True, max_steps=12
    )
    run_here(config)
    assert curve(config, EVAL_LOSS)[-1] < curve(config, EVAL_LOSS)[0]


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"engine__strategy": "deepspeed"}, ("got nf4", "strategy is deepspeed", "strategy=ddp")),
        ({"engine__strategy": "fsdp"}, ("got nf4", "strategy is fsdp", "strategy=ddp")),
        ({"train": "full", "lora": None}, ("got nf4", "train is full", "train=lora")),
        ({"train": "embeddings", "lora": None}, ("got nf4", "train is embeddings", "train=lora")),
    ],
)
def test_config_quantised_base_elsewhere_is_refused(
    make_config: MakeConfig, fields: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(model__quantization="nf4", **fields)
    (problem,) = caught.value.problems
    assert problem.startswith("model.quantization: ")
    assert all(part in problem for part in parts)


def test_check_run_quantised_without_a_layer_to_quantise_is_refused(make: MakeConfig) -> None:
    lora = {"rank": 4, "modules_to_save": list(LLAMA_PROJECTIONS)}
    assert "model.quantization" in fields_of(
        problems_of(make(model__quantization="nf4", lora=lora))
    )
    lora["modules_to_save"] = list(LLAMA_PROJECTIONS[1:])
    fields = {"targets": ["q_proj"], **lora}
    assert problems_of(make(model__quantization="nf4", lora=fields)) == []


def test_plan_memory_of_a_quantised_base_is_that_of_ddp_with_fewer_bytes(
    make_config: MakeConfig,
) -> None:
    found: dict[str | None, int] = {}
    for kind in (None, "int8", "nf4"):
        config = make_config(model__quantization=kind, lora__modules_to_save=[])
        model = build_model(config, build_empty_model(Path(config.model.path)))
        memory = plan_memory(config, model, 1)
        assert memory[0].layout == "ddp"
        assert (len(memory) == 1) == (kind is not None)
        found[kind] = memory[0].weights
    # Of both layers q, o; k, v; gate, up, down, in float32.
    numel = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    assert found[None] is not None
    assert found[None] - found["int8"] == 3 * numel - 4 * rows
    # Half a byte a weight, and a table of codes for each of the 14 layers.
    assert found["nf4"] < found["int8"] - numel // 2 + 14 * 4 * 273 + numel // 32
