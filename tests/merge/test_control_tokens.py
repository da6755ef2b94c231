"""Promise: a merged model's settings name the control tokens of the tokenizer that it carries."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.model.lineage import CHAT_KEY
from raytune_llama.storage.files import OUTPUT_MANIFEST, read_json, write_json_atomic
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.merge.conftest import MakeAdapter, MakeBase

CHATML = (
    "{% for m in messages %}<|im_end|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>assistant\n{% endif %}"
)


@pytest.fixture
def tuned(make_base: MakeBase, make_adapter: MakeAdapter, tokenizer_dir: Path) -> tuple[Path, Path]:
    """A base whose settings name other tokens, and an adapter tuned with a chat template."""
    base = make_base(eos_token_id=[0, 399], bos_token_id=5, pad_token_id=6)
    settings = {"eos_token_id": [0, 399], "bos_token_id": 5, "temperature": 0.6, "do_sample": True}
    write_json_atomic(base / "generation_config.json", settings)
    adapter = make_adapter(base)
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = CHATML
    tokenizer.pad_token = "<|im_end|>"  # noqa: S105  # a token's name
    tokenizer.save_pretrained(adapter)
    write_json_atomic(adapter / OUTPUT_MANIFEST, {CHAT_KEY: {"template": "tokenizer"}})
    return base, adapter


def merge_into(base: Path, adapter: Path, **fields: Any) -> Path:  # noqa: ANN401
    target = base.with_name("merged")
    merge_adapters(
        MergeConfig(base=str(base), adapters=(str(adapter),), target=str(target), **fields)
    )
    return target


def test_merged_model_stops_at_the_ends_of_its_tokenizer_and_template(
    tuned: tuple[Path, Path],
) -> None:
    target = merge_into(*tuned)
    tokenizer = load_tokenizer(target)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = read_json(target / "config.json")
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (0, 1)
    assert settings["pad_token_id"] == stop
    generation = read_json(target / "generation_config.json")
    # Of the base's own, 0 is a control token of the tokenizer, and 399 a piece of text.
    assert stop == 2
    assert generation["eos_token_id"] == [1, 2, 0]
    assert generation["temperature"] == 0.6
    model: Any = AutoModelForCausalLM.from_pretrained(target)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[stop] = 1.0
    with torch.no_grad():
        model.model.norm.weight.abs_()
        hidden = model.model(input_ids=torch.tensor([[7]])).last_hidden_state[0, -1]
        model.lm_head.weight.data[stop] = hidden
    written = model.generate(torch.tensor([[7]]), max_new_tokens=8, do_sample=False)
    assert written[0].tolist() == [7, stop]


def test_merged_model_without_a_template_stops_at_eos_alone(tuned: tuple[Path, Path]) -> None:
    base, adapter = tuned
    (adapter / OUTPUT_MANIFEST).unlink()
    write_json_atomic(base / "generation_config.json", {"eos_token_id": 399})
    target = merge_into(base, adapter)
    assert read_json(target / "generation_config.json")["eos_token_id"] == 1


def test_merged_model_without_a_tokenizer_keeps_the_settings_of_its_base(
    make_base: MakeBase, make_adapter: MakeAdapter
) -> None:
    base = make_base(eos_token_id=7)
    target = merge_into(base, make_adapter(base))
    assert read_json(target / "config.json")["eos_token_id"] == 7
    generation = (base / "generation_config.json").read_text()
    assert json.loads(generation) == read_json(target / "generation_config.json")


def test_gguf_names_the_end_of_the_template_besides_eos(tuned: tuple[Path, Path]) -> None:
    target = merge_into(*tuned, output_format="gguf", gguf_type="f32")
    fields = GGUFReader(next(target.glob("*.gguf"))).fields
    found = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")}
    assert found == {"eos": 1, "eot": 2}
