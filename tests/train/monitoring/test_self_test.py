"""Promise: a run whose loss or isolation of documents is broken stops before its first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from raytune_llama.model.config import Precision
from raytune_llama.model.llama import DTYPES, SummedLoss
from raytune_llama.train.engines.config import OptimConfig
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.monitoring.self_test import run_self_tests
from raytune_llama.train.process_group import ProcessGroup


class ScaledLogits(LlamaForCausalLM):
    """Multiplies its logits, as Granite and Cohere do."""

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:  # noqa: ANN401
        output = super().forward(*args, **kwargs)
        assert isinstance(output, CausalLMOutputWithPast)
        assert output.logits is not None
        output.logits = output.logits * 0.5  # pyright: ignore[reportAttributeAccessIssue]
        return output


class PositionlessDecoder(LlamaModel):
    """Counts positions by itself, and so lets documents see each other."""

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:  # noqa: ANN401
        kwargs.pop("position_ids")
        return super().forward(*args, **kwargs)


class Positionless(LlamaForCausalLM):
    """Ignores the positions that it is given."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = PositionlessDecoder(config)
        self.post_init()


def engine_of(model: LlamaForCausalLM, precision: Precision) -> DataParallelEngine:
    model.config.use_cache = False
    return DataParallelEngine(
        SummedLoss(model), precision, OptimConfig(), ProcessGroup.single_process()
    )


def load(path: Path, precision: Precision, kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    return kind.from_pretrained(path, dtype=DTYPES[precision], attn_implementation="sdpa")


def run_proofs(model: LlamaForCausalLM, precision: Precision, *, isolate: bool) -> None:
    run_self_tests(
        engine_of(model, precision),
        precision,
        ProcessGroup.single_process(),
        isolate_documents=isolate,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("isolate", [True, False])
def test_prove_sdpa_passes_and_leaves_the_model_in_training(
    model_dir: Path, precision: Precision, *, isolate: bool
) -> None:
    model = load(model_dir, precision, LlamaForCausalLM)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    run_proofs(model, precision, isolate=isolate)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prove_positions_ignored_is_refused_where_documents_are_isolated(
    model_dir: Path, precision: Precision
) -> None:
    model = load(model_dir, precision, Positionless)
    with pytest.raises(RuntimeError, match="isolate_documents"):
        run_proofs(model, precision, isolate=True)
    run_proofs(model, precision, isolate=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prove_logits_scaled_behind_the_head_are_refused(
    model_dir: Path, precision: Precision
) -> None:
    model = load(model_dir, precision, ScaledLogits)
    with pytest.raises(RuntimeError, match="projection"):
        run_proofs(model, precision, isolate=False)


def test_prove_weights_that_are_not_finite_are_named_as_that(model_dir: Path) -> None:
    model = load(model_dir, "fp32", LlamaForCausalLM)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"loss of 12 tokens is nan .*model\.path"):
        run_proofs(model, "fp32", isolate=True)
