"""Promise: what cannot be packed is refused by the name of its field, before anything starts."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MixtralConfig

from raytune_llama.train.pack.checks import check_packable, check_packable_model, check_shared
from tests.train.conftest import MakeConfig, fields_of

PLAIN = {"lora__modules_to_save": []}
SIZES: dict[str, Any] = {
    "vocab_size": 410,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({}, []),
        ({"lora__modules_to_save": ["embed_tokens", "lm_head"]}, []),
        ({"optim__neftune_alpha": 5.0, "lora__rslora": True}, []),
        ({"train": "full", "lora": None}, ["lora"]),
        ({"train": "embeddings", "lora": None}, ["lora"]),
        ({"lora": None, "adapter": "/adapter"}, ["lora"]),
        ({"engine__strategy": "fsdp"}, ["engine.strategy"]),
        ({"engine__strategy": "deepspeed"}, ["engine.strategy"]),
        ({"model__quantization": "nf4"}, ["model.quantization"]),
        ({"model__attention": "flash_attention_2"}, ["model.attention"]),
        ({"lora__init": "pissa", "lora__dropout": 0.0}, ["lora.init"]),
        ({"lora__dora": True}, ["lora.dora"]),
        ({"lora__modules_to_save": ["embed_tokens", "model.norm"]}, ["lora.modules_to_save"]),
    ],
)
def test_check_packable_refuses_by_field_what_runs_cannot_share(
    make_config: MakeConfig, fields: dict[str, Any], refused: list[str]
) -> None:
    config = make_config(**({**PLAIN, **fields} if "lora" not in fields else fields))
    assert fields_of(check_packable(config)) == refused


def test_check_shared_refuses_fields_of_the_base_that_differ(make_config: MakeConfig) -> None:
    same = make_config("same", lora__rank=2, seed=3, batch__sequence_tokens=40)
    other = make_config("other", engine__precision="bf16", model__allow_untrained_rows=True)
    assert check_shared([make_config(), same]) == []
    assert fields_of(check_shared([make_config(), same, other])) == [
        "space.model.allow_untrained_rows",
        "space.engine.precision",
    ]


@pytest.mark.parametrize(
    ("config", "is_packable"),
    [
        (LlamaConfig(**SIZES), True),
        (BloomConfig(vocab_size=410, hidden_size=32, n_layer=2, n_head=4), False),
        (MixtralConfig(**SIZES, num_local_experts=2), False),
        (
            LlamaConfig(
                **SIZES,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "long_factor": [1.0] * 4,
                    "short_factor": [1.0] * 4,
                    "original_max_position_embeddings": 64,
                },
            ),
            False,
        ),
    ],
    ids=["llama", "bloom", "experts", "longrope"],
)
def test_check_packable_model_refuses_what_depends_on_other_runs(
    config: Any,  # noqa: ANN401
    *,
    is_packable: bool,
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert fields_of(check_packable_model(model)) == ([] if is_packable else ["model.path"])
