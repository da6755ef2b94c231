"""Promise: a comparison of two runs says which settings, which inputs and which losses differ."""

from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.runs.diff import RunDifferences, compare_runs, render_differences
from raytune_llama.train.monitoring.metrics import EVAL_LOSS
from tests.runs.conftest import MakeRun, entry_at
from tests.train.conftest import curve, make_texts, write_store

WIDE = 160


def compare(folder: Path) -> RunDifferences:
    return compare_runs(entry_at(folder / "runs" / "a"), entry_at(folder / "runs" / "b"))


def fields_of(lines: tuple[str, ...]) -> set[str]:
    return {line.partition(":")[0] for line in lines}


def test_settings_and_placement_are_distinguished(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("a")
    make_run("b", optim__learning_rate=0.02, logging__every_steps=7, checkpoint__every_steps=3)
    found = compare(tmp_path)
    assert found.settings == ("optim.learning_rate: 0.01 -> 0.02",)
    assert fields_of(found.placement) == {
        "run_dir",
        "logging.every_steps",
        "checkpoint.every_steps",
    }
    assert found.inputs == found.problems == ()


def test_group_of_settings_that_one_run_lacks_is_a_setting(
    make_run: MakeRun, tmp_path: Path
) -> None:
    result = make_run("a").run_place / "pt_lora_model"
    make_run("b", lora=None, adapter=str(result))
    found = compare(tmp_path)
    assert "lora.rank" in fields_of(found.settings)
    assert "adapter" in fields_of(found.placement)
    assert "adapter.adapter_model.safetensors" in fields_of(found.inputs)


def test_other_data_and_model_are_differences_by_hash(
    make_run: MakeRun, tmp_path: Path, tokenizer_dir: Path
) -> None:
    make_run("a")
    other = tmp_path / "stores" / "other"
    other.parent.mkdir()
    texts = make_texts(80, seed=5)
    write_store(other, tokenizer_dir, train=[texts[:70]], validation=[texts[70:]])
    make_run("b", data__store_dir=str(other))
    found = compare(tmp_path)
    assert found.settings == ()
    assert fields_of(found.inputs) == {"store"}


def test_losses_are_side_by_side_at_common_steps(make_run: MakeRun, tmp_path: Path) -> None:
    configs = [make_run("a"), make_run("b", optim__learning_rate=0.02, stop_after=4)]
    first, second = (entry_at(tmp_path / "runs" / name) for name in "ab")
    shown = render_differences(first, second, compare_runs(first, second), WIDE)
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line[:8].strip()}
    losses = [curve(config, EVAL_LOSS) for config in configs]
    left, right = losses[0][1], losses[1][1]
    assert rows["3"][-3:] == [f"{left:.4f}", f"{right:.4f}", f"{right - left:+.4f}"]
    assert rows["0"][-1] == "+0.0000"
    assert "6" not in rows  # the second run has no such step


def test_equal_runs_say_so(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("a")
    entry = entry_at(tmp_path / "runs" / "a")
    found = compare_runs(entry, entry)
    assert found == RunDifferences((), (), ())
    assert "the same" in render_differences(entry, entry, found, WIDE)


def test_config_of_another_release_is_compared_and_named(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("a")
    make_run("b")
    file = tmp_path / "runs" / "b" / "run.yaml"
    file.write_text(file.read_text() + "future_field: 3\n")
    found = compare(tmp_path)
    assert "future_field: (not given) -> 3" in (*found.settings, *found.placement)
    assert any("future_field" in problem for problem in found.problems)


def test_unreadable_identity_is_a_problem_and_not_an_error(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run("a")
    make_run("b")
    (tmp_path / "runs" / "b" / "identity.json").unlink()
    found = compare(tmp_path)
    assert found.inputs == ()
    assert any("inputs are not compared" in problem for problem in found.problems)


def test_what_is_no_run_is_refused_by_name(
    make_run: MakeRun, tmp_path: Path, store_dir: Path
) -> None:
    make_run("a", stop_after=1)
    with pytest.raises(ConfigError, match=r"B: .* is not a run \(store\)"):
        compare_runs(entry_at(tmp_path / "runs" / "a"), entry_at(store_dir))
