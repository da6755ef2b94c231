"""Promise: a run or store that recorded `bos: true`, the former default, keeps it."""

import json
import shutil
from pathlib import Path

import pytest

from raytune_llama.cli import VERBS
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import to_dict, to_yaml
from raytune_llama.data.store.manifest import fingerprint_of
from raytune_llama.model.lineage import TEXT_KEY, find_leading_ids, find_text_start
from raytune_llama.storage.files import OUTPUT_MANIFEST, write_json_atomic
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.estimate.plan import build_plan
from raytune_llama.train.export import read_result
from raytune_llama.train.identity import keep_recorded_bos
from tests.train.conftest import MakeConfig, run_here


@pytest.mark.parametrize(
    ("recorded", "bos", "kept"),
    [("true", "auto", True), ("false", "auto", "auto"), ("auto", "auto", "auto"),
     ("true", False, False)],
)  # fmt: skip
def test_keep_recorded_bos_run_that_recorded_true_keeps_it(
    recorded: str, bos: object, kept: object, make: MakeConfig, tmp_path: Path
) -> None:
    config = make(data__bos=bos, data__store_dir=str(tmp_path / "new"))
    run_yaml = config.run_place / "run.yaml"
    text = to_yaml(config).replace(f"bos: {str(bos).lower()}", f"bos: {recorded}")
    run_yaml.write_bytes(text.encode())
    assert keep_recorded_bos(config, config.run_place).data.bos == kept


def test_keep_recorded_bos_new_run_on_a_store_of_the_former_default_keeps_it(
    make: MakeConfig, tmp_path: Path
) -> None:
    config = make(data__store_dir=str(tmp_path / "store"))
    assert keep_recorded_bos(config, config.run_place) is config
    recorded = {"inputs": {"tokenizer": {"bos_id": 0}}}
    (Place.local(tmp_path / "store") / "manifest.json").write_json(recorded)
    assert keep_recorded_bos(config, config.run_place).data.bos is True


def test_result_records_how_its_texts_began(
    make_config: MakeConfig, tmp_path: Path, tokenizer_dir: Path, store_dir: Path
) -> None:
    copy = shutil.copytree(store_dir, tmp_path / "store")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["inputs"]["tokenizer"] = {"bos_id": 0, "eos_id": 1}
    manifest["fingerprint"] = fingerprint_of(manifest["inputs"])
    (copy / "manifest.json").write_text(json.dumps(manifest))
    config = make_config(data__store_dir=str(copy), max_steps=1)
    run_here(config)
    found = read_result(config)
    assert found is not None
    assert found[TEXT_KEY] == {"bos_id": 0}
    # A prompt then begins with it, although the tokenizer itself puts nothing before a text.
    tokenizer = load_tokenizer(tokenizer_dir)
    adapter = tmp_path / "run" / "pt_lora_model"
    assert find_leading_ids([Path(config.model.path), adapter], tokenizer) == (0,)
    assert find_leading_ids([Path(config.model.path)], tokenizer) == ()


@pytest.mark.parametrize(("bos", "bos_id"), [(True, 0), (False, None)])
def test_find_text_start_of_an_older_result_follows_its_config(
    bos: bool,  # noqa: FBT001
    bos_id: int | None,
    make: MakeConfig,
    tmp_path: Path,
    tokenizer_dir: Path,
) -> None:
    result = tmp_path / "result"
    result.mkdir()
    load_tokenizer(tokenizer_dir).save_pretrained(result)
    write_json_atomic(result / OUTPUT_MANIFEST, {"config": to_dict(make(data__bos=bos))})
    assert find_text_start([result]) == {"bos_id": bos_id}
    # Conversations say nothing of texts: what was known before stays.
    chat = tmp_path / "chat"
    chat.mkdir()
    write_json_atomic(chat / OUTPUT_MANIFEST, {TEXT_KEY: None, "config": {"data": {"chat": {}}}})
    assert find_text_start([result, chat]) == {"bos_id": bos_id}
    assert find_text_start([chat]) is None


def test_build_plan_with_a_stale_store_says_that_the_run_would_be_refused(make: MakeConfig) -> None:
    (warning,) = [line for line in build_plan(make()).warnings if "data.store_dir: " in line]
    assert "data.sources.0: it also has 1 file: corpus.txt" in warning


@pytest.mark.parametrize("job", ["pretrain", "sweep"])
def test_job_with_a_stale_store_is_refused_before_ray_starts(
    job: str, make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(eval__every_steps=None)
    (tmp_path / "pretrain.yaml").write_text(to_yaml(config))
    (tmp_path / "sweep.yaml").write_text(
        f"sweep_dir: {tmp_path / 'sweep'}\njob: pretrain\nbase: {tmp_path / 'pretrain.yaml'}\n"
        "space: {optim.learning_rate: {choice: [1e-4, 1e-3]}}\nsearch: {kind: grid}\n"
        "scheduler: {kind: none}\nmax_steps: 6\n"
    )
    # Not an address: to start Ray would be an error of its own.
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    # Called in this process: another would spend seven seconds on imports.
    with pytest.raises(UserError) as caught:
        VERBS[job]([str(tmp_path / f"{job}.yaml")], f"raytune {job}")
    assert "data.store_dir: " in str(caught.value)
    assert "data.sources.0: it also has 1 file: corpus.txt" in str(caught.value)
