"""Promise: a run whose loss or isolation of documents is broken stops before its first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from raytune_llama.model.llama import DTYPES, Precision, SummedLoss
from raytune_llama.train.engine import DataParallelEngine, OptimConfig
from raytune_llama.train.proofs import prove
from raytune_llama.train.workers import Workers


class ScaledLogits(LlamaForCausalLM):
    """Multiplies its logits, as Granite and Cohere do."""

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:  # noqa: ANN401
        output = super().forward(*args, **kwargs)
        assert isinstance(output, CausalLMOutputWithPast)
        assert output.logits is not None
        output.logits = output.logits * 0.5  # pyright: ignore[reportAttributeAccessIssue]
        return output


class Positionless(nn.Module):
    """A decoder that counts positions itself and so lets documents see each other."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        return self.decoder(input_ids=input_ids, **kwargs)


class Shifted(Positionless):
    """A decoder that isolates documents but goes on counting positions in the second one."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        assert position_ids is not None
        starts = position_ids.eq(0).cumsum(-1) - 1
        # A jump beyond one is what tells documents apart; it need not begin at 0 again.
        return self.decoder(
            input_ids=input_ids, position_ids=position_ids + 40 * starts * starts, **kwargs
        )


def engine_of(model: LlamaForCausalLM, precision: Precision) -> DataParallelEngine:
    model.config.use_cache = False
    return DataParallelEngine(SummedLoss(model), precision, OptimConfig(), Workers.alone())


def load(path: Path, precision: Precision, kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    return kind.from_pretrained(path, dtype=DTYPES[precision], attn_implementation="sdpa")


def run_proofs(model: LlamaForCausalLM, precision: Precision, *, isolate: bool) -> None:
    prove(engine_of(model, precision), precision, Workers.alone(), isolate_documents=isolate)


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
    model = load(model_dir, precision, LlamaForCausalLM)
    model.model = Positionless(model.model)  # pyright: ignore[reportAttributeAccessIssue]
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
