"""Promise: tokenizer, model and what is trained go together, or the run is refused by field."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from raytune_llama.model.config import LoraConfig
from raytune_llama.model.llama import load_model
from raytune_llama.model.lora import attach_adapter
from raytune_llama.model.vocab import new_ids
from raytune_llama.train.process_group import ProcessGroup
from tests.conftest import train_tokenizer
from tests.train.conftest import MakeConfig, fields_of, problems_of

STAGE_1: dict[str, Any] = {"train": "embeddings", "lora": None}
NEW_ROWS: dict[str, Any] = {**STAGE_1, "embeddings": {"new_rows_only": True}}


def test_check_run_new_ids_need_trained_tables(
    make: MakeConfig, grown_tokenizer: Path, model_dir: Path, untied_model_dir: Path
) -> None:
    def found(model: Path, **fields: Any) -> list[str]:  # noqa: ANN401
        values = {"model__path": str(model), "model__tokenizer": str(grown_tokenizer), **fields}
        return problems_of(make(**values))

    def saved(*names: str) -> dict[str, Any]:
        return {"lora__modules_to_save": list(names)}

    num_new = len(new_ids(untied_model_dir, grown_tokenizer))
    (problem,) = found(untied_model_dir, **saved())
    assert problem.startswith(f"model.tokenizer: it has {num_new} ids")
    assert "embed_tokens, lm_head" in problem
    (problem,) = found(untied_model_dir, **saved("embed_tokens"))
    assert "lm_head" in problem
    assert "embed_tokens" not in problem
    assert found(untied_model_dir, **saved("embed_tokens", "lm_head")) == []
    assert found(untied_model_dir, **saved("model.embed_tokens", "lm_head")) == []
    # Tied, there is one table, by whichever name.
    assert len(found(model_dir, **saved())) == 1
    assert found(model_dir, **saved("embed_tokens")) == []
    assert found(model_dir, **saved("lm_head")) == []
    # Whole training trains them; and a user may want it so.
    assert found(untied_model_dir, train="full", lora=None) == []
    assert found(untied_model_dir, model__allow_untrained_rows=True, **saved()) == []


@pytest.mark.parametrize(("saved", "num_problems"), [([], 1), (["embed_tokens", "lm_head"], 0)])
def test_check_run_new_ids_with_an_adapter_need_its_trained_tables(  # noqa: PLR0917
    make: MakeConfig,
    grown_tokenizer: Path,
    untied_model_dir: Path,
    tmp_path: Path,
    saved: list[str],
    num_problems: int,
) -> None:
    grown = {"model__path": str(untied_model_dir), "model__tokenizer": str(grown_tokenizer)}
    config = make(**grown)
    model = load_model(config.model, "fp32", ProcessGroup.single_process().device)
    lora = LoraConfig(modules_to_save=tuple(saved))
    attached = attach_adapter(model, lora, seed=0)
    attached.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    config = make(**grown, lora=None, adapter=str(tmp_path / "adapter"))
    assert len(problems_of(config)) == num_problems
    # By its manifest it was trained with another tokenizer.
    (tmp_path / "adapter" / "manifest.json").write_text('{"tokenizer_hash": "blake3:0123"}')
    assert any("is not the tokenizer that the adapter" in p for p in problems_of(config)) == (
        num_problems == 0
    )


def test_check_run_embeddings_with_the_own_tokenizer_train_the_table_but_no_new_rows(
    make: MakeConfig, tokenizer_dir: Path, untied_model_dir: Path
) -> None:
    for model in ({}, {"model__path": str(untied_model_dir)}):
        for tokenizer in ({}, {"model__tokenizer": str(tokenizer_dir)}):
            assert problems_of(make(**STAGE_1, **model, **tokenizer)) == []
            (problem,) = problems_of(make(**NEW_ROWS, **model, **tokenizer))
            assert problem.startswith("embeddings.new_rows_only: got true")
            assert "model.tokenizer" in problem


def test_check_run_embeddings_with_a_grown_tokenizer_may_leave_the_projection_but_say_so(
    make: MakeConfig,
    grown_tokenizer: Path,
    untied_model_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "raytune_llama")
    grown = {"model__tokenizer": str(grown_tokenizer)}
    untied = {**grown, "model__path": str(untied_model_dir)}
    for kind in (STAGE_1, NEW_ROWS):
        assert problems_of(make(**kind, **grown)) == []
    assert problems_of(make(**STAGE_1, **untied, embeddings__lm_head=True)) == []
    assert not caplog.records
    assert problems_of(make(**NEW_ROWS, **untied)) == []
    (record,) = caplog.records
    num_new = len(new_ids(untied_model_dir, grown_tokenizer))
    assert f"lm_head stays frozen, with {num_new} rows" in record.getMessage()


def test_check_run_embeddings_with_a_foreign_tokenizer_are_refused(
    make: MakeConfig, tmp_path: Path
) -> None:
    foreign = train_tokenizer(tmp_path / "foreign", special=False)
    for kind in (STAGE_1, NEW_ROWS):
        problems = problems_of(make(**kind, model__tokenizer=str(foreign)))
        assert "model.tokenizer" in fields_of(problems)
        assert "embeddings.new_rows_only" not in fields_of(problems)


def test_check_run_new_rows_of_a_model_without_a_tokenizer_are_refused(
    make: MakeConfig, tokenizer_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir / name, bare)
    paths = {"model__path": str(bare), "model__tokenizer": str(tokenizer_dir)}
    assert problems_of(make(**STAGE_1, **paths)) == []
    assert fields_of(problems_of(make(**NEW_ROWS, **paths))) == ["embeddings.new_rows_only"]


def test_check_run_rows_that_the_stage_before_left_untrained_need_their_table_trained(
    make: MakeConfig, untied_model_dir: Path, tmp_path: Path
) -> None:
    left = tmp_path / "left"
    shutil.copytree(untied_model_dir, left)
    (left / "manifest.json").write_text(json.dumps({"untrained_rows": {"lm_head": 16}}))
    path = {"model__path": str(left)}

    def saved(*names: str) -> dict[str, Any]:
        return {**path, "lora__modules_to_save": list(names)}

    (problem,) = problems_of(make(**saved("embed_tokens")))
    assert problem.startswith(f"model.path: the run that made {left}")
    assert "lm_head (16 rows)" in problem
    assert problems_of(make(**saved("embed_tokens", "lm_head"))) == []
    assert problems_of(make(**saved("embed_tokens"), model__allow_untrained_rows=True)) == []
    assert problems_of(make(**path, train="full", lora=None)) == []
    # A manifest of another program's.
    (left / "manifest.json").write_text("[]")
    assert problems_of(make(**saved("embed_tokens"))) == []


def test_check_run_embeddings_stored_under_another_name_are_refused(
    make: MakeConfig, model_dir: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(model_dir, odd)
    weights = load_file(odd / "model.safetensors")
    weights["wte.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, odd / "model.safetensors")
    (problem,) = problems_of(make(**STAGE_1, model__path=str(odd)))
    assert problem.startswith("model.path: ")
    assert "model.embed_tokens.weight" in problem
