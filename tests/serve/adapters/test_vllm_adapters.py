"""Adapters for an engine that has the base's weights itself: what is read, written and refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_llama.serve.adapters.loading import AdapterLoader
from raytune_llama.serve.config import ServedModelConfig
from raytune_llama.serve.engine.vllm_adapters import AdapterFiles, round_up_rank
from raytune_llama.serve.generation.model import load_served_model
from tests.serve.adapters.conftest import write_adapter_directory

IDS = torch.tensor([[0, 5, 70, 33, 200]])


def loader(base: Path, device: str = "meta", **fields: Any) -> AdapterLoader:  # noqa: ANN401
    config = ServedModelConfig(path=str(base), **fields)
    return AdapterLoader(config, load_served_model(config, torch.device(device)))


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # In double precision: some CPUs' products in single round by more than assert_close allows.
    attached = peft.PeftModel.from_pretrained(model, str(adapter)).eval().double()
    with torch.inference_mode():
        return attached(input_ids=IDS).logits.float()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3, "up_proj": 40}},
    ],
)
def test_files_for_vllm_mean_the_same_to_peft_without_its_patterns(
    base_dir: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    adapter = write_adapter_directory(base_dir, tmp_path / "adapter", seed=1, **fields)
    updates = loader(base_dir).load(adapter, "tiny:x").updates
    assert updates is not None
    files = AdapterFiles(updates)
    # PEFT, unlike vLLM, takes ranks other than the config's only from a pattern.
    settings: Any = peft.LoraConfig.from_pretrained(str(files.path))
    assert not settings.use_rslora
    assert settings.lora_alpha == settings.r
    settings.rank_pattern = {name: len(update.a_RI) for name, update in updates.items()}
    settings.alpha_pattern = dict(settings.rank_pattern)
    settings.save_pretrained(str(files.path))
    torch.testing.assert_close(logits(base_dir, files.path), logits(base_dir, adapter))
    path = files.path
    del files
    assert not path.exists()


def test_saved_tables_that_equal_the_bases_are_no_change(base_dir: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    tables = ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj"],
        modules_to_save=tables,
        ensure_weight_tying=True,
    )
    peft.get_peft_model(model, config).save_pretrained(str(adapter))
    updates = loader(base_dir).load(adapter, "tiny:x").updates
    assert updates is not None
    assert all("q_proj" in name for name in updates)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head"),
        ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, "tables"),
    ],
)
def test_adapter_that_changes_more_than_linear_layers_is_refused_with_what_to_do(
    base_dir: Path, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    adapter = write_adapter_directory(base_dir, tmp_path / "adapter", seed=1, **fields)
    loads = loader(base_dir)
    with pytest.raises(ValueError, match=f"{reason}.*merge it into the base"):
        loads.load(adapter, "tiny:x")
    # Values of tables are not read for a list of adapters.
    assert (loads.find_problem(adapter) is None) == (reason == "tables")


@pytest.mark.parametrize(("device", "rank"), [("meta", 65), ("cpu", 5)])
def test_adapter_of_a_larger_rank_than_allowed_is_refused(
    base_dir: Path, tmp_path: Path, device: str, rank: int
) -> None:
    adapter = write_adapter_directory(base_dir, tmp_path / "adapter", seed=1, r=rank)
    limit: dict[str, Any] = {} if device == "meta" else {"max_adapter_rank": 4}
    with pytest.raises(ValueError, match=rf"rank {rank}.*models\.N\.max_adapter_rank"):
        loader(base_dir, device, **limit).load(adapter, "tiny:x")


@pytest.mark.parametrize(("rank", "wanted"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_rank_is_rounded_up_to_one_that_vllm_takes(rank: int, wanted: int) -> None:
    assert round_up_rank(rank) == wanted
