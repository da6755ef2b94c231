"""What an adapter directory becomes: its own template, its own tokenizer, or a copy of the base."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_llama.chat.config import ChatConfig
from raytune_llama.chat.encoding import build_chat_encoder
from raytune_llama.model.rope import MODEL_SETTINGS_KEY
from raytune_llama.serve.adapters.loading import AdapterLoader
from raytune_llama.serve.config import ServedModelConfig
from raytune_llama.serve.generation.model import load_served_model
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.hub_server import HubServer
from tests.serve.adapters.conftest import LINEAR, write_adapter_directory

IDS = torch.tensor([[0, 5, 70, 33, 200]])


def loader(base: Path | str, **fields: Any) -> AdapterLoader:  # noqa: ANN401
    config = ServedModelConfig(path=str(base), **fields)
    return AdapterLoader(config, load_served_model(config, torch.device("cpu")))


def test_adapter_speaks_by_the_template_that_it_was_tuned_with(
    base_dir: Path, tmp_path: Path
) -> None:
    chat = build_chat_encoder(load_tokenizer(base_dir), ChatConfig(template="alpaca"))
    recorded = {"template": "alpaca", "template_hash": chat.template.hash()}
    tuned = write_adapter_directory(
        base_dir, tmp_path / "tuned", seed=0, manifest={"chat": recorded}
    )
    plain = write_adapter_directory(base_dir, tmp_path / "plain", seed=1)
    loads = loader(base_dir, template="belle")
    templates = [loads.load(path, "tiny:x").served.chat for path in (tuned, plain)]
    assert [one.template.name for one in templates if one] == ["alpaca", "belle"]


def test_adapter_begins_texts_as_its_tokenizer_and_says_where_its_training_differed(
    base_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_bos = write_adapter_directory(
        base_dir, tmp_path / "bos", seed=0, manifest={"text": {"bos_id": 0}}
    )
    plain = write_adapter_directory(base_dir, tmp_path / "plain", seed=1)
    loads = loader(base_dir)
    wanted = load_tokenizer(base_dir)("fox")["input_ids"]
    for path, num_warnings in ((plain, 0), (with_bos, 1)):
        caplog.clear()
        assert loads.load(path, "tiny:x").served.encode_texts(["fox"])[0] == wanted
        assert sum("before a text" in record.msg for record in caplog.records) == num_warnings


def test_base_on_the_hub_serves_adapters_as_one_on_the_disk(
    base_dir: Path, tmp_path: Path, hub: HubServer
) -> None:
    commit = hub.publish("org/tiny", {file.name: file.read_bytes() for file in base_dir.iterdir()})
    folder = write_adapter_directory(base_dir, tmp_path / "tuned", seed=0)
    there = loader(f"hf://org/tiny@{commit}").load(folder, "tiny:x")
    here = loader(base_dir).load(folder, "tiny:x")
    assert there.updates is not None
    assert here.updates is not None
    assert there.served.encode_texts(["fox"]) == here.served.encode_texts(["fox"])


@pytest.mark.parametrize("has_tables", [True, False])
def test_grown_adapter_becomes_a_copy_with_its_own_tokenizer(
    base_dir: Path, tmp_path: Path, *, has_tables: bool
) -> None:
    folder = tmp_path / "grown"
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.add_tokens([f"new{n}" for n in range(30)])
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    saved = ["embed_tokens", "lm_head"] if has_tables else None
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=LINEAR,
        modules_to_save=saved,
        ensure_weight_tying=has_tables,
        init_lora_weights=False,
    )
    attached: Any = peft.get_peft_model(model, config).eval()
    attached.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    if not has_tables:
        with pytest.raises(ValueError, match="holds no embeddings for them"):
            loader(base_dir).load(folder, "tiny:grown")
        return
    loaded = loader(base_dir).load(folder, "tiny:grown")
    assert loaded.updates is None
    assert len(loaded.served.tokenizer) == len(tokenizer) == 430
    with torch.inference_mode():
        wanted = attached(input_ids=IDS).logits
        torch.testing.assert_close(
            loaded.served.model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4
        )


def test_adapter_of_longer_positions_becomes_a_copy_with_them(
    base_dir: Path, tmp_path: Path
) -> None:
    own = AutoModelForCausalLM.from_pretrained(base_dir).config
    rope = {**own.rope_parameters, "rope_type": "linear", "factor": 2.0}
    values = {"rope_parameters": rope, "max_position_embeddings": 256}
    folder = write_adapter_directory(
        base_dir, tmp_path / "long", seed=0, manifest={MODEL_SETTINGS_KEY: values}
    )
    loaded = loader(base_dir).load(folder, "tiny:long")
    assert loaded.updates is None
    assert loaded.served.max_context == 256
    assert loaded.served.model.config.rope_parameters["factor"] == 2.0
    assert own.max_position_embeddings == 128
