"""Promise: a run shows its config, losses and checkpoints, and what is linked to it by hash."""

import json
from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.evaluate.results import (
    EvaluatedModel,
    EvaluationResults,
    ModelResults,
    write_results,
)
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.runs.lineage import Relative, find_results, find_sources
from raytune_llama.runs.show import choose_steps, entry_json, open_entry, render_entry
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import EVAL_LOSS
from tests.runs.conftest import MakeRun, entry_at, survey
from tests.train.conftest import curve

WIDE = 160


def links(found: list[Relative]) -> set[tuple[str, str | None, bool]]:
    """Return role, place's name, and whether a hash proves it."""
    return {
        (each.role, each.place.name if each.place else None, each.hash is not None)
        for each in found
    }


def merge(config: PretrainConfig, target: Path) -> None:
    adapter = str(config.run_place / "pt_lora_model")
    merge_adapters(MergeConfig(base=config.model.path, adapters=(adapter,), target=str(target)))


def evaluate(adapter: Path, target: Path) -> None:
    """Write the results of an evaluation of an adapter, as the job does, without scores."""
    digest = hash_file(adapter / "adapter_model.safetensors")
    model = EvaluatedModel("tuned", str(adapter), {"adapters 0 adapter_model.safetensors": digest})
    settings = {"models": [{"name": "tuned", "path": "elsewhere", "adapters": [str(adapter)]}]}
    target.mkdir()
    results = EvaluationResults((ModelResults(model, (), (), (), ()),), settings, "1", "today")
    write_results(results, [], target)


def test_run_shows_config_losses_and_checkpoints(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(checkpoint__keep_last=3)
    entry = entry_at(tmp_path / "runs" / "run")
    lines = [line.strip() for line in render_entry(entry, survey(tmp_path), WIDE).splitlines()]
    assert "optim.learning_rate: 0.01" in lines
    assert f"model.path: {config.model.path}" in lines
    for step, loss in zip((0, 3, 6), curve(config, EVAL_LOSS), strict=True):
        assert any(line.split()[:1] == [str(step)] and f"{loss:.4f}" in line for line in lines)
    assert entry.checkpoints[-1].step == 6
    assert any(line.startswith("step 6: ") and "newest" in line for line in lines)
    best = min(range(3), key=curve(config, EVAL_LOSS).__getitem__) * 3
    assert [each.step for each in entry.checkpoints if each.is_best] == [best] * (best > 0)


def test_lineage_of_an_adapter_is_found_by_hash_in_both_directions(
    make_run: MakeRun, tmp_path: Path, store_dir: Path
) -> None:
    first = make_run("first")
    result = tmp_path / "runs" / "first" / "pt_lora_model"
    make_run("second", lora=None, adapter=str(result), stop_after=2)
    merge(first, tmp_path / "merged")
    evaluate(result, tmp_path / "evaluation")
    found = survey(tmp_path, store_dir).entries
    run = entry_at(tmp_path / "runs" / "first")
    assert links(find_results(run, found)) == {
        ("adapter", "second", True),
        ("adapter 0", "merged", True),
        ("model tuned", "evaluation", True),
    }
    sources = links(find_sources(run, found))
    assert ("store", store_dir.name, True) in sources
    assert ("model", Path(first.model.path).name, True) in sources
    second = entry_at(tmp_path / "runs" / "second")
    assert ("adapter", "first", True) in links(find_sources(second, found))
    assert ("adapter 0", "first", True) in links(find_sources(entry_at(tmp_path / "merged"), found))


def test_run_that_was_made_again_is_not_the_source_of_what_the_old_one_made(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run("first")
    merge(config, tmp_path / "merged")
    config.run_place.delete()
    make_run("first", seed=7)
    found = survey(tmp_path).entries
    assert find_results(entry_at(tmp_path / "runs" / "first"), found) == []
    (source,) = [s for s in find_sources(entry_at(tmp_path / "merged"), found) if "0" in s.role]
    assert source.entry is None


def test_run_on_a_merged_model_is_linked_by_its_path(make_run: MakeRun, tmp_path: Path) -> None:
    merge(make_run("first"), tmp_path / "merged")
    make_run("second", model__path=str(tmp_path / "merged"), stop_after=1)
    found = survey(tmp_path).entries
    results = links(find_results(entry_at(tmp_path / "merged"), found))
    assert results == {("model", "second", False)}


def test_show_in_a_bucket_is_as_on_a_disk(make_run: MakeRun, s3_path: Place) -> None:
    make_run(place=s3_path / "run", stop_after=3)
    entry = open_entry(str(s3_path / "run"), "RUN")
    shown = render_entry(entry, survey(s3_path), WIDE)
    assert "interrupted at 3" in shown
    assert "step 3: " in shown


def test_json_of_a_run_has_its_config_and_every_metric(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(stop_after=3)
    document = entry_json(entry_at(tmp_path / "runs" / "run"), survey(tmp_path))
    document = json.loads(json.dumps(document, allow_nan=False))
    assert document["config"]["optim"]["learning_rate"] == 0.01
    losses = [record[EVAL_LOSS] for record in document["metrics"] if EVAL_LOSS in record]
    assert losses == curve(config, EVAL_LOSS)


def test_damaged_run_is_shown_with_what_can_be_read(make_run: MakeRun, tmp_path: Path) -> None:
    make_run()
    (tmp_path / "runs" / "run" / "metrics.jsonl").write_text("{\n")
    entry = open_entry(str(tmp_path / "runs" / "run"), "RUN")
    shown = render_entry(entry, survey(tmp_path), WIDE)
    assert "damaged" in shown
    assert "optim.learning_rate: 0.01" in shown


def test_folder_of_no_job_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="raytune runs list"):
        open_entry(str(tmp_path), "RUN")


@pytest.mark.parametrize(
    ("steps", "evaluated", "shown"),
    [
        ([1, 2, 3, 4], [0, 2], [0, 2, 4]),
        ([1, 2, 3], [], [1, 2, 3]),
        (list(range(1, 1001)), [], [1, 334, 667, 1000]),
        ([], [], []),
    ],
)
def test_few_steps_are_shown_with_the_first_and_the_last(
    steps: list[int], evaluated: list[int], shown: list[int]
) -> None:
    assert choose_steps(steps, evaluated, 4) == shown
