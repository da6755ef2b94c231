"""A tiny model with a chat template and an adapter, and jobs on it; nothing here needs Ray."""

import asyncio
import copy
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from raytune_llama.config.settings import from_dict
from raytune_llama.generate.config import GenerateConfig
from raytune_llama.generate.prompts import PromptedRow, read_prompts
from raytune_llama.generate.worker import Generator
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.serve.tiny_chat import ADAPTER, NAME, write_tiny_chat
from tests.train.conftest import write_model

Record = dict[str, Any]
MakeConfig = Callable[..., GenerateConfig]


@dataclass(frozen=True)
class TinyModel:
    """The model and its adapter on the disk."""

    path: Path
    adapter: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> TinyModel:
    folder = tmp_path_factory.mktemp("generate")
    write_tiny_chat(folder, tokenizer_dir)
    return TinyModel(folder / NAME, folder / "adapters" / ADAPTER)


@pytest.fixture(scope="session")
def untemplated_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Another model, without a chat template."""
    path = write_model(tmp_path_factory.mktemp("untemplated") / "tiny")
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def endless_dir(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, but no token that ends an answer is ever the most likely one."""
    path = tmp_path_factory.mktemp("endless") / NAME
    shutil.copytree(tiny.path, path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[:3] = 0.0
    model.save_pretrained(path)
    return path


@pytest.fixture
def make_config(tiny: TinyModel, tmp_path: Path) -> MakeConfig:
    """Return configs of jobs on a file `input.*` with this text."""

    def make(text: str, *, suffix: str = "txt", **fields: Any) -> GenerateConfig:  # noqa: ANN401
        file = tmp_path / f"input.{suffix}"
        file.write_text(text, encoding="utf-8")
        data: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tiny.path)} | fields.pop("model", {}),
            "input": {"path": str(file)} | fields.pop("input", {}),
            "sampling": {"max_new_tokens": 12} | fields.pop("sampling", {}),
            "scale": {"slots": 4} | fields.pop("scale", {}),
        }
        return from_dict(GenerateConfig, data | fields)

    return make


def read_rows(config: GenerateConfig) -> list[PromptedRow]:
    assert config.input is not None
    return read_prompts(config.input, with_prompt=config.with_prompt, system=config.system).rows


def answer(config: GenerateConfig, *calls: Sequence[PromptedRow]) -> list[Record]:
    """Return the outputs of rows in one process; without rows, of the whole input.

    Several calls overlap.
    """

    async def run(generator: Generator) -> list[Record]:
        done = await asyncio.gather(*(generator.answer(rows) for rows in calls))
        return [record for records in done for record in records]

    calls = calls or (read_rows(config),)
    with closing(Generator(config, cpus=1)) as generator:
        return asyncio.run(run(generator))


def generate_greedily(path: Path, ids: Sequence[int], num_new: int) -> str:
    """Return the text that transformers generates after a prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(path)
    made = model.generate(
        input_ids=torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=GenerationConfig(
            max_new_tokens=num_new,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        ),
    )
    text = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text
