"""Promise: PiSSA starts as the base, in its largest parts, and ends as a plain LoRA on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.lora import attach_adapter, check_adapter_targets, write_adapter
from raytune_llama.model.pissa import apply_principal_factors, principal_factors
from tests.model.conftest import MakeModel

IDS = torch.arange(5, 25)[None]
LAYER = "base_model.model.model.layers.1.mlp.up_proj"


def config_of(**fields: Any) -> LoraConfig:  # noqa: ANN401
    return from_dict(LoraConfig, {"rank": 4, "dropout": 0.0, "init": "pissa", **fields})


def started(
    make_llama: MakeModel,
    config: LoraConfig,
    **fields: Any,  # noqa: ANN401
) -> tuple[PeftModel, dict[str, Tensor]]:
    attached = attach_adapter(make_llama(**fields), config, seed=0)
    factors = principal_factors(attached)
    apply_principal_factors(attached, factors)
    return attached, factors


def trained_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_principal_factors_are_the_largest_singular_triplets(
    make_llama: MakeModel, *, rslora: bool, scale: float
) -> None:
    # Wider than what is computed beside the wanted values, so that the SVD is not a whole one.
    attached, factors = started(
        make_llama,
        config_of(alpha=6.0, rslora=rslora),
        hidden_size=64,
        intermediate_size=160,
    )
    weight = attached.get_parameter(f"{LAYER}.base_layer.weight").detach()
    left, values, right = torch.linalg.svd(weight.double())
    wanted = left[:, :4] * values[:4] @ right[:4]
    factor_A, factor_B = (factors[f"{LAYER}.{part}"].double() for part in "AB")
    torch.testing.assert_close(scale * factor_B @ factor_A, wanted, rtol=2e-2, atol=2e-2)
    # Both halves of a triplet are of one length.
    lengths = [factor_A.norm(dim=1), factor_B.norm(dim=0)]
    torch.testing.assert_close(*lengths, rtol=1e-5, atol=0)
    torch.testing.assert_close(scale * lengths[0] ** 2, values[:4], rtol=2e-2, atol=0)


def test_start_from_leaves_the_logits_as_they_were_and_trains_a_and_b_alone(
    make_llama: MakeModel,
) -> None:
    attached, factors = started(make_llama, config_of())
    torch.testing.assert_close(logits_of(attached), logits_of(make_llama()), rtol=1e-4, atol=1e-4)
    trained = trained_of(attached)
    assert len(trained) == 2 * 14
    assert all(".default." in name for name in trained)
    assert torch.equal(trained[f"{LAYER}.lora_A.default.weight"], factors[f"{LAYER}.A"])
    assert torch.equal(trained[f"{LAYER}.lora_B.default.weight"], factors[f"{LAYER}.B"])


@pytest.mark.parametrize("fields", [{}, {"rslora": True}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("tied", [True, False])
def test_write_adapter_of_pissa_is_a_plain_lora_of_twice_the_rank_on_the_original_base(
    make_llama: MakeModel, tmp_path: Path, fields: dict[str, Any], *, tied: bool
) -> None:
    base = make_llama(tie_word_embeddings=tied)
    attached, factors = started(make_llama, config_of(**fields), tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(1)
    for tensor in trained_of(attached).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    write_adapter(attached, trained_of(attached), tmp_path, initial=factors)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 8
    wanted, plain = logits_of(attached), logits_of(base)
    got = logits_of(PeftModel.from_pretrained(base, str(tmp_path)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=0.1)


@pytest.mark.parametrize(
    ("fields", "field"), [({"dropout": 0.05}, "dropout"), ({"dora": True}, "dora")]
)
def test_pissa_with_what_it_excludes_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**fields)
    [problem] = caught.value.problems
    assert problem.startswith(f"{field}: got ")


def test_pissa_of_more_than_the_singular_values_is_refused(make_llama: MakeModel) -> None:
    # Two heads of 4 for the keys: 8 rows.
    [problem] = check_adapter_targets(make_llama(), config_of(rank=9))
    assert problem.startswith("lora.rank: got 9, ")
    assert "k_proj has 8 singular" in problem
    assert check_adapter_targets(make_llama(), config_of(rank=8)) == []


def test_pissa_of_a_quantised_weight_is_refused(make_llama: MakeModel) -> None:
    attached = attach_adapter(make_llama(), config_of(), seed=0)
    layer: Any = attached.get_submodule(LAYER)
    layer.base_layer.weight = nn.Parameter(
        torch.zeros(24, 16, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"lora\.init: .*up_proj, which is quantized"):
        principal_factors(attached)
