"""Promise: factors B and embedding tables learn at their own rates, on every engine alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.model.llama import causal_lm
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.build import build_engine
from raytune_llama.train.engines.protocol import TrainEngine
from raytune_llama.train.inputs import build_batch_plan, build_sources
from raytune_llama.train.monitoring.metrics import GRAD_NORM
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import (
    MakeConfig,
    curve,
    fields_of,
    problems_of,
    run_here,
    stage_fields,
)
from tests.train.group import Group

APART = {"optim__lora_plus_ratio": 16.0, "optim__embedding_learning_rate": 3e-3}
PLAIN: dict[str, Any] = {"lora__dropout": 0.0, "optim__weight_decay": 0.0}


def engine_of(config: PretrainConfig) -> TrainEngine:
    plan = build_batch_plan(
        config, build_sources(config, TokenStore.open(Path(config.data.store_dir)))
    )
    return build_engine(config, plan, ProcessGroup.single_process())


def batch_of(seed: int) -> MicroBatch:
    ids_BT = torch.randint(400, (2, 25), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(ids_BT[:, :-1], ids_BT[:, 1:], torch.arange(24).expand(2, 24))


def weights_of(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in engine.full_weights()}


def moves(config: PretrainConfig) -> dict[str, Tensor]:
    """Return by how much one step moves each trained weight."""
    engine = engine_of(config)
    before = weights_of(engine)
    engine.train_step([batch_of(0)], [0], 48.0, config.optim.learning_rate)
    return {name: weight - before[name] for name, weight in weights_of(engine).items()}


def test_train_step_with_a_ratio_moves_b_by_it_and_nothing_else(make_config: MakeConfig) -> None:
    plain = moves(make_config(**PLAIN))
    ratio = moves(make_config(**PLAIN, optim__lora_plus_ratio=16.0))
    assert plain.keys() == ratio.keys()
    of_b = {name for name in plain if "lora_B" in name}
    assert len(of_b) == 14
    for name, move in plain.items():
        factor = 16 if name in of_b else 1
        torch.testing.assert_close(ratio[name], factor * move, rtol=1e-4, atol=1e-6)
    assert all(plain[name].any() for name in of_b)


@pytest.mark.parametrize(
    ("fields", "table"),
    [
        ({}, "embed_tokens.modules_to_save.default.weight"),
        ({"train": "full", "lora": None}, "embed_tokens.weight"),
    ],
)
def test_train_step_with_an_embedding_rate_moves_the_table_by_it(
    make_config: MakeConfig, fields: dict[str, Any], table: str
) -> None:
    common = {**PLAIN, **fields} if "lora" not in fields else {"optim__weight_decay": 0.0, **fields}
    plain = moves(make_config(**common))
    slow = moves(make_config(**common, optim__embedding_learning_rate=0.002))
    found = [name for name in plain if name.endswith(table)]
    assert len(found) == 1
    for name, move in plain.items():
        factor = 0.2 if name in found else 1
        torch.testing.assert_close(slow[name], factor * move, rtol=1e-3, atol=1e-6)


def independent_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: MicroBatch) -> None:
    """Take a step as a reader of the papers would, with the model's own logits."""
    logits = causal_lm(model)(input_ids=batch.ids_BT, position_ids=batch.positions_BT).logits
    functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_train_step_with_rates_apart_equals_an_independent_adamw(
    make_config: MakeConfig, stage: int
) -> None:
    config = make_config(lora__dropout=0.0, optim__weight_decay=0.1, **APART, **stage_fields(stage))
    # A step of four sequences in two micro-batches of two.
    engine = engine_of(config)
    model = engine_of(make_config(lora__dropout=0.0)).module.model
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = [16.0 if "lora_B" in n else 0.3 if "embed_tokens" in n else 1.0 for n, _ in named]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": 0.01 * rate} for (_, p), rate in zip(named, rates, strict=True)],
        weight_decay=0.1,
    )
    for step in range(3):
        first, second = batch_of(2 * step), batch_of(2 * step + 1)
        engine.train_step([first, second], [0, 0], 96.0, 0.01)
        tensors = zip(
            (first.ids_BT, first.labels_BT, first.positions_BT),
            (second.ids_BT, second.labels_BT, second.positions_BT),
            strict=True,
        )
        independent_step(model, optimizer, MicroBatch(*map(torch.cat, tensors)))
    ours = weights_of(engine)
    assert ours.keys() == dict(named).keys()
    for name, weight in named:
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("stage", [1, 3])
def test_train_with_rates_apart_gives_the_same_losses_on_every_stage(
    make_config: MakeConfig, two: Group, stage: int
) -> None:
    fields = {"lora__dropout": 0.0, "optim__learning_rate": 1e-3}
    reference = make_config("reference", **fields, **APART)
    plain = make_config("plain", **fields)
    run_here(reference)
    run_here(plain)
    config = make_config("zero", **fields, **APART, **stage_fields(stage))
    two.run(config)
    assert curve(config) == pytest.approx(curve(reference), rel=1e-5)
    assert curve(config, GRAD_NORM) == pytest.approx(curve(reference, GRAD_NORM), rel=1e-3)
    assert curve(plain)[-1] != pytest.approx(curve(reference)[-1], rel=1e-3)


def test_train_with_rates_apart_resumed_is_bit_equal(make_config: MakeConfig) -> None:
    whole, parts = make_config("whole", **APART), make_config("parts", **APART)
    run_here(whole)
    run_here(parts, stop_after=3)
    run_here(parts)
    assert curve(parts) == curve(whole)
    name = "pt_lora_model/adapter_model.safetensors"
    ours, wanted = (load_file(Path(config.run_dir, name)) for config in (parts, whole))
    assert all(torch.equal(ours[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("train", ["full", "embeddings"])
def test_lora_plus_ratio_without_an_adapter_is_refused(make_config: MakeConfig, train: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(train=train, lora=None, optim__lora_plus_ratio=4.0)
    assert fields_of(caught.value.problems) == ["optim.lora_plus_ratio"]


def test_embedding_learning_rate_without_a_trained_table_is_refused(make: MakeConfig) -> None:
    rate = {"optim__embedding_learning_rate": 1e-4}
    [problem] = problems_of(make(lora__modules_to_save=[], **rate))
    assert problem.startswith("optim.embedding_learning_rate: got 0.0001, ")
    assert "embed_tokens nor lm_head" in problem
    assert problems_of(make(lora__modules_to_save=["lm_head"], **rate)) == []
    assert problems_of(make(lora=None, train="embeddings", **rate)) == []


def test_optim_bound_of_bad_steps_of_a_run_that_stops_is_refused(
    make_config: MakeConfig,
) -> None:
    with pytest.raises(ConfigError, match=r"optim\.max_bad_steps: got 3"):
        make_config(optim__max_bad_steps=3)
