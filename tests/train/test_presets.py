"""Every config in `jobs/configs` for training parses, and takes two steps on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import load, override
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig, SftConfig
from tests.train.conftest import curve
from tests.train.group import Group
from tests.train.test_sft import write_chat_store

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
KINDS = {"pretrain": PretrainConfig, "sft": SftConfig}
PRESETS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name.partition("_")[0] in KINDS)


def read_preset(path: Path) -> AnyTrainConfig:
    return load(KINDS[path.name.partition("_")[0]], [str(path)])


@pytest.fixture(scope="module")
def chat_store(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chat_store(folder, tokenizer_dir)
    return folder


@pytest.fixture
def shrink(
    tmp_path: Path, untied_model_dir: Path, store_dir: Path, chat_store: Path
) -> Callable[[AnyTrainConfig], AnyTrainConfig]:
    """Put a tiny model, store and batch under a preset, on two CPU workers."""

    def change(config: AnyTrainConfig) -> AnyTrainConfig:
        fields: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "model.path": str(untied_model_dir),
            "model.tokenizer": None,
            "data.store_dir": str(chat_store if isinstance(config, SftConfig) else store_dir),
            "batch.sequence_tokens": 64,
            "batch.sequences_per_step": 4,
            "batch.micro_batch_sequences": 2,
            "max_steps": 2,
            "num_epochs": None,
            "scale.num_workers": 2,
            "scale.use_gpu": False,
            "eval.max_sequences": 8,
            "eval.texts": [],
            "logging.tensorboard": False,
        }
        if config.engine.precision == "fp16":  # which DeepSpeed does not have on CPUs
            fields["engine.precision"] = "bf16"
        return override(config, fields)

    return change


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_takes_two_steps_on_a_tiny_model(
    path: Path, shrink: Callable[[AnyTrainConfig], AnyTrainConfig], two: Group
) -> None:
    config = shrink(read_preset(path))
    two.run(config)
    assert len(curve(config)) == 2
    assert Path(config.run_dir, config.result_name, "manifest.json").is_file()


def test_there_are_presets_for_the_recipes_of_the_seeds() -> None:
    names = {path.stem for path in PRESETS}
    assert names >= {
        "pretrain_chinese_llama_7b_stage1",
        "pretrain_chinese_llama_7b_stage2",
        "sft_chinese_alpaca_7b",
        "sft_calm_7b",
        "sft_calm_7b_int8",
        "pretrain_finetune_llama_7b_fsdp",
        "pretrain_finetune_llama_7b_fsdp_checkpointing",
    }
