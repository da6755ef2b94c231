"""A directory in Meta's format of LLaMA 3, with a tiktoken vocabulary that is trained here."""

# ruff: noqa: RUF001  # Chinese punctuation

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_llama.model.meta.layout import MetaParams
from raytune_llama.model.meta.tiktoken_file import dump_tiktoken
from tests.model.conftest import SENTENCES
from tests.model.meta.reference import random_tensors, shard, train_ranks

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())

CHINESE = (
    "人民日报一九九八年一月一日。新年的钟声敲响了，江泽民主席发表了新年讲话。",
    "今年的粮食产量创历史新高，全国各地的农民都很高兴；价格（每公斤）为3.50元。",
    "大语言模型通过预测下一个词来学习语言，训练需要大量的文本和图形处理器。",
    "“你好！”他说，“请问去火车站怎么走？”——“一直往前走，到第2个路口左转。”",
)

LLAMA3 = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
"""The params.json of a small LLaMA 3 without `vocab_size`."""

WriteLlama3 = Callable[..., Path]


def real_texts() -> list[str]:
    """Prose in English and Chinese, and code."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files += sorted((ROOT / "raytune_llama").rglob("*.py"))
    return [*(file.read_text() for file in files), *CHINESE, *SENTENCES]


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """A vocabulary of 1,200 tokens in tiktoken's order; no merge of others gives the last."""
    return train_ranks([*real_texts()[:12], *CHINESE * 20], 1199) | {b" qxzjvkw": 1199}


@pytest.fixture
def write_llama3(tmp_path: Path, ranks: dict[bytes, int]) -> WriteLlama3:
    """Write a LLaMA 3 of random weights in Meta's format."""

    def write(
        num_shards: int = 1,
        *,
        is_tied: bool = False,
        dtype: torch.dtype = torch.float32,
        **fields: Any,  # noqa: ANN401
    ) -> Path:
        folder = tmp_path / "meta"
        folder.mkdir()
        rows = len(ranks) + 256
        values = {"vocab_size": rows, **LLAMA3, **fields}
        tensors = random_tensors(MetaParams(**values), rows, dtype=dtype, is_tied=is_tied)
        for number, content in enumerate(shard(tensors, num_shards, embedding_axis=0)):
            torch.save(content, folder / f"consolidated.{number:02d}.pth")
        (folder / "params.json").write_text(json.dumps(values))
        (folder / "tokenizer.model").write_bytes(dump_tiktoken(ranks))
        return folder

    return write
