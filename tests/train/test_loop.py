"""Promise: a run that is stopped and started again equals one that never was, bit for bit."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.model.llama import causal_lm
from raytune_llama.model.loss import IGNORE_INDEX
from raytune_llama.model.vocab import is_tied
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.checkpoint.layout import list_checkpoints
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.export import read_result
from raytune_llama.train.identity import check_run, identify, write_identity
from raytune_llama.train.inputs import build_batch_plan, build_sources
from raytune_llama.train.loop import open_session, read_batches
from raytune_llama.train.monitoring.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    FILLER_SEQUENCES,
    LEARNING_RATE,
    LOSS,
    TARGET_TOKENS,
    read_metrics,
)
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.result import RunResult
from tests.train.conftest import MakeConfig, curve, make_texts, run_here, write_store
from tests.train.group import Group
from tests.train.marked import MARKS, write_broken_model
from tests.train.saved import weights_in

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
    assert hash_file(Path(parts.run_dir, name)) == hash_file(Path(whole.run_dir, name))


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
    trained = weights_in(list_checkpoints(config.run_place)[-1])
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
    trained = weights_in(list_checkpoints(config.run_place)[-1])
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
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
    grown = copy.deepcopy(load_tokenizer(tokenizer_dir))
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
    plan = build_batch_plan(
        config, build_sources(config, TokenStore.open(Path(config.data.store_dir)))
    )
    records = [r for r in read_metrics(config.run_place) if LOSS in r]
    assert outcome.step == plan.num_steps == len(records)
    split = TokenStore.open(Path(config.data.store_dir)).split("train")
    # Isolated documents: every token but the first of each is a target, once.
    assert sum(r[TARGET_TOKENS] for r in records) == split.num_tokens - split.num_documents
    assert records[-1][FILLER_SEQUENCES] == (-plan.total_positions) % 4


TWO = [{"path": "/corpora/large.txt"}, {"path": "/corpora/small.txt"}]
WEIGHTED = [{**source, "weight": weight} for source, weight in zip(TWO, (0.25, 0.75), strict=True)]


def mixture_of(config: PretrainConfig) -> dict[str, dict[str, Any]]:
    manifest = read_result(config)
    assert manifest is not None
    return manifest["mixture"]


@pytest.mark.parametrize(
    ("packing", "sources"), [("packed", WEIGHTED), ("crops", WEIGHTED), ("seed_blocks", TWO)]
)
def test_train_in_any_form_resumes_exactly_and_counts_each_source(
    make_config: MakeConfig, two_sources_dir: Path, packing: str, sources: list[dict[str, Any]]
) -> None:
    fields = {
        "data__store_dir": str(two_sources_dir),
        "data__sources": sources,
        "batch__packing": packing,
        "eval__every_steps": None,
        "max_steps": 4,
    }
    whole, parts = make_config("whole", **fields), make_config("parts", **fields)
    run_here(whole)
    run_here(parts, stop_after=3)
    run_here(parts)
    assert losses(parts.run_dir) == losses(whole.run_dir)
    assert mixture_of(parts) == mixture_of(whole)
    seen = mixture_of(whole)
    targets = [r[TARGET_TOKENS] for r in read_metrics(whole.run_place) if TARGET_TOKENS in r]
    assert sum(source["target_tokens"] for source in seen.values()) == sum(targets)
    batches = read_batches(open_session(whole, ProcessGroup.single_process()), 0)
    labels = [part.labels_BT for batch in batches for part in batch.micro_batches]
    assert sum(targets) == sum(int((label != IGNORE_INDEX).sum()) for label in labels)
    assert sum(source["sequences"] for source in seen.values()) == 16
    if sources is WEIGHTED:
        assert [seen[name]["sequences"] for name in ("large", "small")] == [4, 12]
        assert [seen[name]["weight"] for name in ("large", "small")] == [0.25, 0.75]


def test_train_of_two_sources_tells_the_loss_of_each(
    make_config: MakeConfig, two_sources_dir: Path
) -> None:
    fields = {
        "data__store_dir": str(two_sources_dir),
        "data__sources": [TWO[0], {**TWO[1], "name": "pocket"}],
        "max_steps": 1,
        "eval__max_sequences": None,
    }
    config = make_config(**fields)
    run_here(config)
    (record,) = [r for r in read_metrics(config.run_place) if EVAL_LOSS in r][-1:]
    split = TokenStore.open(two_sources_dir).split("validation")
    names = ("large", "pocket")
    stretches = list(split.source_ranges().values())
    documents = list(split.source_documents().values())
    # Isolated documents: every token but the first of each is a target.
    targets = [len(tokens) - len(rows) for tokens, rows in zip(stretches, documents, strict=True)]
    nats = [record[f"{EVAL_LOSS}/{name}"] * n for name, n in zip(names, targets, strict=True)]
    assert record[EVAL_LOSS] == pytest.approx(sum(nats) / sum(targets))
    num_bytes = [split.bytes_between(tokens.start, tokens.stop) for tokens in stretches]
    assert sum(num_bytes) == split.num_bytes
    bits = [nat / math.log(2) for nat in nats]
    for name, bit, size in zip(names, bits, num_bytes, strict=True):
        assert record[f"{EVAL_BITS_PER_BYTE}/{name}"] == pytest.approx(bit / size)
    assert record[EVAL_BITS_PER_BYTE] == pytest.approx(sum(bits) / split.num_bytes)
    assert record[f"{EVAL_LOSS}/large"] != record[f"{EVAL_LOSS}/pocket"]


def test_train_of_one_source_has_no_loss_of_a_source(make_config: MakeConfig) -> None:
    config = make_config(max_steps=1)
    run_here(config)
    names = {name for record in read_metrics(config.run_place) for name in record}
    assert {name for name in names if name.startswith(EVAL_LOSS)} == {EVAL_LOSS}


def test_run_with_a_stop_step_ends_there_on_the_rates_of_the_whole_run(
    make_config: MakeConfig,
) -> None:
    whole, cut = make_config("whole", max_steps=8), make_config("cut", max_steps=8, stop_step=5)
    run_here(whole)
    assert run_here(cut) == RunResult("finished", 5)
    for name in (LOSS, LEARNING_RATE):
        assert curve(cut, name) == curve(whole, name)[:5]
    # It is evaluated where it ends, as every run is, and has its result.
    evaluated = [r["step"] for r in read_metrics(cut.run_place) if EVAL_LOSS in r]
    assert evaluated == [0, 3, 5]
    assert (cut.run_place / cut.result_name / "manifest.json").exists()


def evaluated_steps(config: PretrainConfig) -> list[float]:
    return [r["step"] for r in read_metrics(config.run_place) if EVAL_LOSS in r]


def test_run_of_zero_steps_evaluates_and_trains_nothing(
    make_config: MakeConfig, two: Group
) -> None:
    whole = make_config("whole")
    run_here(whole)
    # Rolling back would need a checkpoint, of which there is none.
    config = make_config("zero", max_steps=0, optim__on_bad_step="rollback")
    assert run_here(config) == RunResult("finished", 0)
    assert evaluated_steps(config) == [0]
    assert curve(config, EVAL_LOSS) == curve(whole, EVAL_LOSS)[:1]
    assert curve(config, LOSS) == []
    assert list_checkpoints(config.run_place) == []
    assert read_result(config) is None
    together = make_config("together", max_steps=0)
    two.run(together)
    assert curve(together, EVAL_LOSS) == pytest.approx(curve(config, EVAL_LOSS), rel=1e-5)


def test_run_of_zero_steps_evaluates_an_adapter(make_config: MakeConfig) -> None:
    first = make_config("first")
    run_here(first)
    adapter = str(first.run_place / first.result_name)
    config = make_config("zero", max_steps=0, lora=None, adapter=adapter)
    run_here(config)
    assert curve(config, EVAL_LOSS) == pytest.approx(curve(first, EVAL_LOSS)[-1:], rel=1e-6)


def test_run_of_zero_steps_may_be_continued_and_equals_one_that_began_with_all(
    make_config: MakeConfig,
) -> None:
    whole, zero = make_config("whole"), make_config("parts", max_steps=0)
    run_here(whole)
    check_run(zero, identify(zero))
    write_identity(zero, identify(zero))
    run_here(zero)
    parts = make_config("parts")
    check_run(parts, identify(parts))
    write_identity(parts, identify(parts))
    run_here(parts)
    assert losses(parts.run_dir) == losses(whole.run_dir)
    assert evaluated_steps(parts) == evaluated_steps(whole)
    # Other settings are refused as ever, and there is no way back.
    for fields, line in (
        ({"seed": 5}, "config.seed: 1 -> 5"),
        ({"max_steps": 0}, "config.max_steps: 6 -> 0"),
    ):
        other = make_config("parts", **fields)
        with pytest.raises(ConfigError) as caught:
            check_run(other, identify(other))
        assert line in caught.value.problems


def test_run_of_zero_steps_without_a_finite_loss_fails(
    make_config: MakeConfig, tokenizer_dir: Path, tmp_path: Path
) -> None:
    model = write_broken_model(tmp_path / "model", tokenizer_dir, MARKS[0])
    held_out = [f"the store {MARKS[0]}"]
    write_store(
        tmp_path / "marked", tokenizer_dir, train=[make_texts(9, seed=0)], validation=[held_out]
    )
    fields = {"data__store_dir": str(tmp_path / "marked"), "lora__modules_to_save": []}
    config = make_config(model__path=str(model), **fields, max_steps=0)
    with pytest.raises(FloatingPointError, match="evaluation's loss is not finite"):
        run_here(config)


@pytest.mark.parametrize("wanted", ["last", "best"])
def test_train_tells_the_best_step_in_the_log_and_in_the_manifest(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, wanted: str
) -> None:
    caplog.set_level(logging.INFO, "raytune_llama")
    # The rate rises to one that is far too high.
    config = make_config(
        optim__learning_rate=1.0,
        schedule__warmup_ratio=0.9,
        eval__every_steps=1,
        checkpoint__result=wanted,
        max_steps=12,
    )
    run_here(config)
    evaluated = curve(config, EVAL_LOSS)
    best = evaluated.index(min(evaluated))
    assert 0 < best < 12, evaluated
    manifest = read_result(config)
    assert manifest is not None
    assert manifest["step"] == (best if wanted == "best" else 12)
    assert manifest["run"]["last_step"] == 12
    assert manifest["run"]["best_step"] == best
    assert manifest["run"]["best_loss"] == evaluated[best]
    (told,) = [message for message in caplog.messages if message.startswith("the result is step")]
    assert f"step {manifest['step']}" in told
    assert f"step {best}" in told
    assert f"{evaluated[best]:.4f}" in told
