"""Tiny real bases and adapters with random weights, and a merge of them."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from tests.model.conftest import NAMES_LLAMA, piece_model

__all__ = ["piece_model"]

IDS = torch.arange(3, 40)[None]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHOLE = ["embed_tokens", "lm_head"]

MakeBase = Callable[..., Path]
MakeAdapter = Callable[..., Path]


def load(path: Path) -> Any:  # noqa: ANN401  # a model that is called
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def randomised(model: Any) -> Any:  # noqa: ANN401
    """Give every trainable parameter of a model random values, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(parameter + noise)
    return model


@pytest.fixture
def make_base(tmp_path: Path) -> MakeBase:
    def make(name: str = "base", *, shard_size: str = "5GB", **fields: Any) -> Path:  # noqa: ANN401
        values = {
            "vocab_size": 410,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
        }
        torch.manual_seed(len(name))
        model = LlamaForCausalLM(LlamaConfig(**(values | fields)))
        model.save_pretrained(tmp_path / name, max_shard_size=shard_size)
        return tmp_path / name

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    def make(base: Path, name: str = "adapter", *, rows: int = 0, **fields: Any) -> Path:  # noqa: ANN401
        model = load(base)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        values: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ALL, **fields}
        values = copy.deepcopy(values)  # PEFT changes the list of a tied base
        attached: Any = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **values))
        randomised(attached).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def merge(base: Path, *adapters: Path, **fields: Any) -> Path:  # noqa: ANN401
    target = base.with_name("merged")
    merge_adapters(
        MergeConfig(
            base=str(base), adapters=tuple(map(str, adapters)), target=str(target), **fields
        )
    )
    return target


@pytest.fixture
def add_pieces(piece_model: Path) -> Callable[[Path], None]:
    """Put a LLaMA's tokenizer of 360 SentencePiece tokens into a model directory."""

    def add(base: Path) -> None:
        shutil.copy(piece_model, base)
        (base / "tokenizer_config.json").write_text(json.dumps(NAMES_LLAMA))

    return add


def left_over(base: Path) -> list[str]:
    """Return what lies beside a base and its adapters, hidden files too."""
    names = {path.name for path in base.parent.iterdir()}
    return sorted(name for name in names if "merged" in name)


def rewrite_base(base: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights of a base of one file."""
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
