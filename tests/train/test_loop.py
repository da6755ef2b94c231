"""Promise: a run that is stopped and started again equals one that never was, bit for bit."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_llama.data.store import TokenStore
from raytune_llama.files import sha256_file
from raytune_llama.model.llama import causal_lm
from raytune_llama.model.lora import is_tied
from raytune_llama.model.tokenizer import load_tokenizer
from raytune_llama.storage import Place
from raytune_llama.train.checkpoint import list_checkpoints
from raytune_llama.train.loop import plan_run
from raytune_llama.train.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    FILLER_SEQUENCES,
    LOSS,
    TARGET_TOKENS,
    read_metrics,
)
from tests.train.conftest import MakeConfig, run_here

IDS = torch.arange(5, 25)[None]


def losses(run_dir: str) -> dict[float, float]:
    """Return the training loss by step; a step that stands twice in the file is an error."""
    found = [
        (r["step"], r[LOSS]) for r in read_metrics(Place.parse(run_dir, "run_dir")) if LOSS in r
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_train_stopped_and_started_again_equals_the_uninterrupted_run(
    make_config: MakeConfig, stop_after: int
) -> None:
    whole, parts = make_config("whole"), make_config("parts")
    assert run_here(whole).status == "finished"
    stopped = run_here(parts, stop_after=stop_after)
    assert (stopped.status, stopped.step) == ("stopped", stop_after)
    assert run_here(parts).status == "finished"
    assert losses(parts.run_dir) == losses(whole.run_dir)
    name = "pt_lora_model/adapter_model.safetensors"
    assert sha256_file(Path(parts.run_dir, name)) == sha256_file(Path(whole.run_dir, name))


def test_train_of_real_text_lowers_loss_and_bits_per_byte(make_config: MakeConfig) -> None:
    config = make_config(max_steps=30, eval__every_steps=None)
    run_here(config)
    records = read_metrics(config.run_place)
    bits = [r[EVAL_BITS_PER_BYTE] for r in records if EVAL_BITS_PER_BYTE in r]
    assert len(bits) == 2
    assert bits[1] < 0.8 * bits[0]


def test_train_with_modules_to_save_writes_an_adapter_that_peft_loads(
    make_config: MakeConfig, model_dir: Path
) -> None:
    config = make_config()
    run_here(config)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    plain = base(IDS).logits.detach().clone()
    result = Path(config.run_dir, "pt_lora_model")
    loaded = PeftModel.from_pretrained(base, str(result))
    # The masters of the last checkpoint are what was trained.
    state = load_file(list_checkpoints(config.run_place)[-1].path / "state-00000.safetensors")
    trained = {key.removeprefix("weight/"): t for key, t in state.items() if "weight/" in key}
    mine = dict(loaded.named_parameters())
    assert trained
    assert all(torch.equal(mine[name], tensor) for name, tensor in trained.items())
    assert is_tied(causal_lm(loaded))
    assert not torch.allclose(loaded(IDS).logits, plain, atol=0.1)


def test_train_full_writes_a_model_that_transformers_loads(make_config: MakeConfig) -> None:
    config = make_config(train="full", lora=None, optim__learning_rate=1e-3)
    run_here(config)
    result = Path(config.run_dir, "pt_model")
    model = AutoModelForCausalLM.from_pretrained(result)
    state = load_file(list_checkpoints(config.run_place)[-1].path / "state-00000.safetensors")
    assert all(torch.equal(p, state[f"weight/{name}"]) for name, p in model.named_parameters())
    assert is_tied(model)


def eval_losses(run_dir: str) -> list[float]:
    return [r[EVAL_LOSS] for r in read_metrics(Place.parse(run_dir, "run_dir")) if EVAL_LOSS in r]


def test_train_from_an_adapter_goes_on_where_it_ended(make_config: MakeConfig) -> None:
    first = make_config("first")
    run_here(first)
    adapter = Path(first.run_dir, "pt_lora_model")
    second = make_config("second", lora=None, adapter=str(adapter))
    run_here(second)
    assert eval_losses(second.run_dir)[0] == pytest.approx(eval_losses(first.run_dir)[-1], rel=1e-6)
    shapes = {
        path: {key: t.shape for key, t in load_file(path / "adapter_model.safetensors").items()}
        for path in (adapter, Path(second.run_dir, "pt_lora_model"))
    }
    assert len({str(sorted(value.items())) for value in shapes.values()}) == 1
    assert eval_losses(second.run_dir)[-1] < eval_losses(first.run_dir)[-1]


def test_train_with_a_grown_tokenizer_saves_the_new_rows(
    make_config: MakeConfig, tokenizer_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    grown = load_tokenizer(tokenizer_dir)
    num_added = grown.add_tokens([f"new{number}" for number in range(30)])
    grown.save_pretrained(tmp_path / "grown")
    config = make_config(model__tokenizer=str(tmp_path / "grown"))
    run_here(config)
    result = Path(config.run_dir, "pt_lora_model")
    rows = len(load_tokenizer(tokenizer_dir)) + num_added
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    assert rows > base.config.vocab_size
    base.resize_token_embeddings(rows)
    loaded = PeftModel.from_pretrained(base, str(result))
    assert loaded(torch.tensor([[rows - 1, 5, 6]])).logits.shape == (1, 3, rows)
    assert len(load_tokenizer(result)) == rows


def test_train_of_epochs_ends_with_a_smaller_step(make_config: MakeConfig) -> None:
    config = make_config(max_steps=None, num_epochs=1.0, eval__every_steps=None)
    outcome = run_here(config)
    plan = plan_run(config, TokenStore.open(Path(config.data.store_dir)))
    records = [r for r in read_metrics(config.run_place) if LOSS in r]
    assert outcome.step == plan.num_steps == len(records)
    split = TokenStore.open(Path(config.data.store_dir)).split("train")
    # Isolated documents: every token but the first of each is a target, once.
    assert sum(r[TARGET_TOKENS] for r in records) == split.num_tokens - split.num_documents
    assert records[-1][FILLER_SEQUENCES] == (-plan.total_positions) % 4
