"""Promise: the list of runs says what their directories say; a broken one hides no other."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError, to_yaml
from raytune_llama.runs.listing import list_json, render_list
from raytune_llama.runs.survey import survey_places
from raytune_llama.storage.lease import LEASE_FOLDER, Lease
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LOSS
from raytune_llama.tune.config import load_base
from raytune_llama.tune.journal import Journal, trial_dir
from raytune_llama.tune.results import write_leaderboard
from tests.runs.conftest import QUICK, HoldLease, MakeRun, entry_at, survey
from tests.train.conftest import curve
from tests.tune.conftest import MakeSweep, make_sweep

__all__ = ["make_sweep"]

WIDE = 200


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_finished_run_has_its_steps_and_losses(make_run: MakeRun, run_dir: Place) -> None:
    config = make_run(place=run_dir)
    entry = entry_at(run_dir)
    assert (entry.kind, entry.state, entry.step, entry.num_steps) == ("pretrain", "finished", 6, 6)
    assert entry.train_loss == curve(config, LOSS)[-1]
    assert entry.eval_loss == curve(config, EVAL_LOSS)[-1]
    assert (entry.trained, entry.model) == ("lora r4", Path(config.model.path).name)
    if run_dir.is_local:
        assert entry.folder.num_bytes == size_of(run_dir.path)


def test_stopped_run_is_interrupted_and_says_from_where_it_resumes(
    make_run: MakeRun, run_dir: Place
) -> None:
    make_run(place=run_dir, stop_after=3)
    entry = entry_at(run_dir)
    assert (entry.state, entry.step, entry.num_steps) == ("interrupted", 3, 6)
    assert "resumes from step 3" in entry.note


def test_run_of_a_live_driver_is_running_and_of_a_killed_one_interrupted(
    make_run: MakeRun, hold_lease: HoldLease, run_dir: Place
) -> None:
    make_run(place=run_dir, stop_after=3)
    driver = hold_lease(run_dir)
    running = entry_at(run_dir)
    assert running.state == "running"
    assert str(driver.pid) in running.note
    driver.kill()
    driver.wait()
    killed = entry_at(run_dir)
    assert killed.state == "interrupted"
    assert f"process {driver.pid}" in killed.note
    assert "killed" in killed.note


def test_failed_run_names_the_error_of_its_driver(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(stop_after=2, fails=True)
    entry = entry_at(tmp_path / "runs" / "run")
    assert entry.state == "failed"
    assert "the workers failed 3 times in a row" in entry.note
    assert "failed at 2" in render_list(survey(tmp_path / "runs"), WIDE)


def test_run_that_was_resumed_after_a_failure_is_failed_no_more(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(stop_after=2, fails=True)
    make_run(stop_after=2)
    assert entry_at(tmp_path / "runs" / "run").state == "interrupted"


@pytest.mark.parametrize(("silent_seconds", "state"), [(1, "running"), (3600, "interrupted")])
def test_driver_on_another_machine_runs_while_its_heartbeats_are_new(
    make_run: MakeRun, tmp_path: Path, silent_seconds: int, state: str
) -> None:
    make_run(stop_after=2)
    folder = tmp_path / "runs" / "run"
    (claim,) = (folder / LEASE_FOLDER).iterdir()
    content = json.loads(claim.read_text())
    content |= {"released": False, "process": content["process"] | {"boot": "another"}}
    claim.write_text(json.dumps(content))
    written = time.time() - silent_seconds
    os.utime(claim, (written, written))
    assert entry_at(folder).state == state


def test_run_that_only_evaluates_is_evaluated(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(max_steps=0)
    assert entry_at(tmp_path / "runs" / "run").state == "evaluated"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "cut run.yaml": lambda run: (run / "run.yaml").write_text("model: {path"),
    "run.yaml of a list": lambda run: (run / "run.yaml").write_text("- a\n- b\n"),
    "run.yaml of another shape": lambda run: (run / "run.yaml").write_text("data: 3\nmodel: 4\n"),
    "binary run.yaml": lambda run: (run / "run.yaml").write_bytes(b"\xff\x00\xfe"),
    "cut identity": lambda run: cut(run / "identity.json"),
    "identity of a list": lambda run: (run / "identity.json").write_text("[]"),
    "cut metrics line": lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "tr\n{}\n'),
    "metrics of numbers": lambda run: (run / "metrics.jsonl").write_text("1\n2\n"),
    "cut result": lambda run: cut(run / "pt_lora_model" / "manifest.json"),
    "cut checkpoint": lambda run: [cut(f) for f in run.glob("checkpoints/*/manifest.json")],
    "cut claim": lambda run: [cut(file) for file in (run / LEASE_FOLDER).iterdir()],
    "claim without a process": lambda run: [
        f.write_text("{}") for f in (run / LEASE_FOLDER).iterdir()
    ],
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_run_is_damaged_and_others_are_listed(
    make_run: MakeRun, tmp_path: Path, breakage: str
) -> None:
    make_run("broken")
    make_run("whole")
    manifest = tmp_path / "runs" / "broken" / "pt_lora_model" / "manifest.json"
    if breakage == "cut checkpoint":  # read only where no result says which step is the best
        manifest.unlink()
    BREAKAGES[breakage](tmp_path / "runs" / "broken")
    found = survey(tmp_path / "runs")
    states = {entry.place.name: entry.state for entry in found.entries}
    assert states == {"broken": "damaged", "whole": "finished"}
    shown = render_list(found, WIDE)
    assert "broken: damaged: " in shown
    assert "1 damaged, 1 finished" in shown


def test_run_without_its_config_is_listed_with_what_is_left(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(stop_after=3)
    (tmp_path / "runs" / "run" / "run.yaml").unlink()
    entry = entry_at(tmp_path / "runs" / "run")
    assert (entry.state, entry.step, entry.num_steps) == ("interrupted", 3, None)
    assert "no run.yaml" in entry.note


def test_newest_losses_of_a_long_log_are_found(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(stop_after=3)
    file = tmp_path / "runs" / "run" / "metrics.jsonl"
    lines = [f'{{"step": {step}, "train/loss": {1 / step}}}\n' for step in range(4, 30000)]
    file.write_text(file.read_text() + '{"step": 3, "eval/loss": 1.25}\n' + "".join(lines))
    assert file.stat().st_size > 2**20
    entry = entry_at(tmp_path / "runs" / "run")
    assert (entry.step, entry.train_loss, entry.eval_loss) == (29999, 1 / 29999, 1.25)
    with file.open("a") as opened:
        opened.write('{"step": 29999, "eval/loss": null}\n{"step": 30000, "train/lo')
    assert "not finite" in render_list(survey(tmp_path / "runs"), WIDE)


def make_trials(sweep_dir: Place, make_run: MakeRun) -> Journal:
    """Write a journal of three trials, of which the last has not ended, and their runs."""
    journal = Journal(sweep_dir)
    for number, loss in enumerate([2.5, 2.25, None]):
        journal.start(number, {"optim.learning_rate": 0.01, "lora.rank": 4, "lora.alpha": 8})
        make_run(place=trial_dir(sweep_dir, number), stop_after=4)
        (trial_dir(sweep_dir, number) / LEASE_FOLDER).delete()
        if loss is not None:
            journal.report(number, 4, loss, seconds=1.0)
            journal.end(number, "stopped" if number else "finished")
    return journal


def test_sweep_is_one_row_with_its_trials_by_state(
    make_sweep: MakeSweep, make_run: MakeRun, hold_lease: HoldLease, tmp_path: Path
) -> None:
    sweep = make_sweep(sweep_dir=str(tmp_path / "runs" / "sweep"), num_trials=3)
    journal = make_trials(sweep.place, make_run)
    (sweep.place / "sweep.yaml").write_bytes(to_yaml(sweep).encode())
    write_leaderboard(sweep, load_base(sweep), list(journal.trials.values()))
    found = survey(tmp_path / "runs")
    entry = next(each for each in found.entries if each.kind == "sweep")
    assert (entry.state, entry.step, entry.num_steps) == ("interrupted", 2, 3)
    assert entry.eval_loss == 2.25
    assert "1 finished, 1 stopped, 1 interrupted" in entry.note
    trials = [each.state for each in found.entries if each.is_trial]
    assert trials == ["finished", "stopped", "interrupted"]
    assert len(json.loads(list_json(found))["entries"]) == 1
    assert len(json.loads(list_json(found, trials=True))["entries"]) == 4
    hold_lease(sweep.place)
    states = [each.state for each in survey(tmp_path / "runs").entries]
    assert states == ["running", "finished", "stopped", "running"]


def test_list_changes_nothing_of_a_sweep_that_is_being_written(
    make_sweep: MakeSweep, make_run: MakeRun, tmp_path: Path
) -> None:
    sweep = make_sweep(sweep_dir=str(tmp_path / "runs" / "sweep"), num_trials=3)
    make_trials(sweep.place, make_run)
    (sweep.place / "sweep.yaml").write_bytes(to_yaml(sweep).encode())
    file = sweep.place.path / "journal.jsonl"
    with file.open("a") as opened:
        opened.write('{"event": "end", "tri')
    before = {path: path.stat().st_mtime_ns for path in sweep.place.path.rglob("*")}
    assert entry_at(sweep.place).step == 2
    assert {path: path.stat().st_mtime_ns for path in sweep.place.path.rglob("*")} == before


def test_store_is_listed_and_foreign_folders_are_not(store_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "deep" / "data-00000-of-00001.arrow").write_bytes(b"other")
    (tmp_path / "corpus" / "run.yaml").write_text("apiVersion: v1\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "store").symlink_to(store_dir)
    (tmp_path / "link").symlink_to(store_dir)
    assert not survey(tmp_path).entries
    entry = entry_at(store_dir)
    assert (entry.kind, entry.state) == ("store", "finished")
    assert "120 documents" in entry.note


def test_claim_without_a_run_is_a_job_that_prepares(tmp_path: Path) -> None:
    place = Place.local(tmp_path / "run")
    with Lease(place, QUICK) as lease:
        lease.confirm()
        assert [(e.kind, e.state) for e in survey(tmp_path).entries] == [("job", "running")]


def test_json_has_every_entry_with_its_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(stop_after=3)
    (entry,) = json.loads(list_json(survey(tmp_path / "runs")))["entries"]
    assert entry["place"] == str(config.run_place)
    assert (entry["state"], entry["step"], entry["num_steps"]) == ("interrupted", 3, 6)
    assert entry["train_loss"] == curve(config, LOSS)[-1]
    assert entry["bytes"] == size_of(tmp_path / "runs")


def test_directory_below_another_is_listed_once(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(stop_after=1)
    assert len(survey(tmp_path / "runs" / "run", tmp_path, tmp_path / "runs").entries) == 1


def test_missing_directory_and_bucket_are_named(tmp_path: Path, s3: Place) -> None:
    with pytest.raises(ConfigError, match=r"DIR: .*nowhere is not a directory"):
        survey_places([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="no bucket absent"):
        survey_places([str(Place(s3.scheme, "absent/runs", s3.options))])
    with pytest.raises(ConfigError, match=r"nowhere.* has no files"):
        survey_places([str(s3 / "nowhere")])


def test_nothing_to_look_in_names_the_default_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"none of runs/, stores/"):
        survey_places([])
