"""Promise: families beside the tuned path train and merge as LLaMA 1 does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.estimate.plan import build_plan
from raytune_llama.train.monitoring.metrics import EVAL_LOSS
from tests.train.conftest import MakeConfig, curve, problems_of, run_here, stage_fields
from tests.train.group import Group

IDS = torch.arange(3, 60)[None]
SIZES: dict[str, Any] = {
    "vocab_size": 410,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(
        vocab_size=410,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
    "mpt": MptConfig(vocab_size=410, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
BLOOM = {"lora__targets": ["query_key_value", "dense_h_to_4h"], "lora__modules_to_save": []}
FIELDS: dict[str, dict[str, Any]] = {"bloom": BLOOM}


def write_family(path: Path, family: str, tokenizer_dir: Path) -> Path:
    """Write a model whose every weight is random, biases and norms too."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(FAMILIES[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(path)
    load_tokenizer(tokenizer_dir).save_pretrained(path)
    return path


def logits_of(model: Any) -> torch.Tensor:  # noqa: ANN401  # a model, maybe with its adapter
    with torch.no_grad():
        return model.eval()(IDS).logits


def load(path: Path) -> Any:  # noqa: ANN401  # a model that is called
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def merge(base: Path, adapter: Path) -> Path:
    target = base.with_name("merged")
    config = MergeConfig(
        base=str(base), adapters=(str(adapter),), target=str(target), verify="logits"
    )
    merge_adapters(config)
    return target


def assert_merged(base: Path, adapter: Path) -> None:
    """The merged directory says what base and adapter say in PEFT, and not what the base says."""
    wanted = logits_of(PeftModel.from_pretrained(load(base), str(adapter)))
    merged = load(merge(base, adapter))
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(load(base)), wanted, atol=0.1)


@pytest.mark.parametrize("family", ["bloom", "llama3", "qwen2", "qwen3"])
def test_family_learns_and_merges_with_the_logits_of_its_adapter(
    make_config: MakeConfig, tmp_path: Path, tokenizer_dir: Path, family: str
) -> None:
    base = write_family(tmp_path / "base", family, tokenizer_dir)
    fields = {"lora__modules_to_save": [], **FIELDS.get(family, {})}
    config = make_config(model__path=str(base), **fields)
    run_here(config)
    losses = curve(config, EVAL_LOSS)
    assert losses[-1] < losses[0] - 0.1
    assert_merged(base, Path(config.run_dir, "pt_lora_model"))


@pytest.mark.parametrize("table", ["word_embeddings", "lm_head"])
def test_bloom_trains_its_tied_table_and_merges_it_tied(
    make_config: MakeConfig, tmp_path: Path, tokenizer_dir: Path, table: str
) -> None:
    base = write_family(tmp_path / "base", "bloom", tokenizer_dir)
    fields = {**BLOOM, "lora__modules_to_save": [table]}
    config = make_config(model__path=str(base), **fields, optim__embedding_learning_rate=1e-3)
    run_here(config)
    assert_merged(base, Path(config.run_dir, "pt_lora_model"))
    merged = load(base.with_name("merged"))
    assert merged.lm_head.weight is merged.transformer.word_embeddings.weight


def test_bloom_in_the_names_of_its_published_files_merges(
    make_config: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    base = write_family(tmp_path / "base", "bloom", tokenizer_dir)
    file = base / "model.safetensors"
    weights = load_file(file)
    assert "transformer.word_embeddings.weight" in weights
    shortened = {name.removeprefix("transformer."): each for name, each in weights.items()}
    save_file(shortened, file, metadata={"format": "pt"})
    # Nor do they say that the tables are tied, which they are by default.
    settings = json.loads((base / "config.json").read_text())
    assert settings.pop("tie_word_embeddings")
    (base / "config.json").write_text(json.dumps(settings))
    fields = {**BLOOM, "lora__modules_to_save": ["lm_head"]}
    config = make_config(model__path=str(base), **fields)
    run_here(config)
    assert_merged(base, Path(config.run_dir, "pt_lora_model"))


@pytest.mark.parametrize("stage", [2, 3])
def test_bloom_gives_the_same_losses_on_every_stage(
    make_config: MakeConfig, tmp_path: Path, tokenizer_dir: Path, two: Group, stage: int
) -> None:
    base = write_family(tmp_path / "base", "bloom", tokenizer_dir)
    fields = {
        "model__path": str(base),
        **BLOOM,
        "lora__dropout": 0.0,
        "engine__gradient_checkpointing": True,
    }
    reference = make_config("reference", **fields)
    run_here(reference)
    config = make_config("zero", **fields, **stage_fields(stage))
    two.run(config)
    assert curve(config) == pytest.approx(curve(reference), rel=1e-5)


def test_bloom_with_the_targets_of_llama_is_refused_with_its_own(
    make: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    base = write_family(tmp_path / "base", "bloom", tokenizer_dir)
    problems = problems_of(make(model__path=str(base), lora__targets=["q_proj"]))
    assert any("query_key_value" in problem for problem in problems)


def test_family_without_positions_trains_joined_and_is_refused_isolated(
    make: MakeConfig, tmp_path: Path, tokenizer_dir: Path
) -> None:
    base = write_family(tmp_path / "base", "mpt", tokenizer_dir)
    fields = {
        "model__path": str(base),
        "lora__targets": ["Wqkv"],
        "lora__modules_to_save": [],
        "optim__neftune_alpha": 0.1,
    }
    [problem] = problems_of(make(**fields))
    assert problem.startswith("batch.isolate_documents: MptForCausalLM ")
    config = make(**fields, batch__isolate_documents=False)
    assert problems_of(config) == []
    run_here(config)
    losses = curve(config, EVAL_LOSS)
    assert losses[-1] < losses[0] - 0.1


def test_bloom_can_be_planned(make: MakeConfig, tmp_path: Path, tokenizer_dir: Path) -> None:
    base = write_family(tmp_path / "base", "bloom", tokenizer_dir)
    plan = build_plan(make(model__path=str(base), plan=True, **BLOOM))
    # Rank 4 on 32 -> 96 and 32 -> 128, in two layers.
    assert plan.counts.trained == 2 * 4 * (32 + 96 + 32 + 128)
    assert all(memory.peak > 0 for memory in plan.workers[0].memory)
