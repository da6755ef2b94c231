"""Promise: a merge into a LLaMA 3 is written in Meta's format with tokenizer and RoPE scaling."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raytune_llama.model.meta.config import ConvertConfig
from raytune_llama.model.meta.conversion import convert_weights
from raytune_llama.model.tensors import open_weights
from tests.merge.conftest import make_adapter, merge
from tests.model.meta.conftest import WriteLlama3

__all__ = ["make_adapter"]


def to_huggingface(source: Path, target: Path) -> Path:
    convert_weights(ConvertConfig(source=str(source), target=str(target), instruct=False))
    return target


@pytest.mark.parametrize("is_tied", [False, True])
def test_merge_of_llama3_to_pth_comes_back_as_the_merged_model(
    write_llama3: WriteLlama3,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    *,
    is_tied: bool,
) -> None:
    source = write_llama3(2, is_tied=is_tied, use_scaled_rope=True)
    base = to_huggingface(source, tmp_path / "base")
    adapter = make_adapter(base)
    wanted = merge(base, adapter).rename(tmp_path / "wanted")
    target = merge(base, adapter, output_format="pth", num_shards=2)
    assert (target / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    back = to_huggingface(target, tmp_path / "back")
    found, merged = open_weights(back), open_weights(wanted)
    assert found.specs.keys() == merged.specs.keys()
    assert all(torch.equal(found.read(name), merged.read(name)) for name in merged.specs)
    settings = [json.loads((d / "config.json").read_text()) for d in (back, wanted)]
    for field in ("rope_parameters", "max_position_embeddings", "tie_word_embeddings"):
        assert settings[0][field] == settings[1][field]


def test_merge_of_llama3_with_another_tokenizer_to_pth_is_refused(
    write_llama3: WriteLlama3,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = to_huggingface(write_llama3(use_scaled_rope=True), tmp_path / "base")
    adapter = make_adapter(base)
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"][20]["content"] = "<|mine|>"
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"names the id 1220 '<\|mine\|>', but Meta's code"):
        merge(base, adapter, output_format="pth")
    assert not (tmp_path / "merged").exists()
