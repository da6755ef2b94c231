"""Whole sweeps on a tiny model."""

import csv
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.util.placement_group import placement_group_table

from raytune_llama.cli import VERBS
from raytune_llama.config.settings import ConfigError, from_dict, load, write_yaml
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LOSS, read_metrics
from raytune_llama.train.trainer import run_training
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import Journal
from raytune_llama.tune.search import trial_dir
from raytune_llama.tune.sweep import run_sweep
from tests.pipeline.conftest import ROOT, MakeJob, own_cluster
from tests.terminal import Terminal

pytestmark = pytest.mark.ray

MakeSweep = Callable[..., SweepConfig]

RATES = [3e-2, 1e-2, 1e-4, 1e-5]
"""From the best to the worst for the tiny model."""


@pytest.fixture
def make_sweep(tmp_path: Path, make_job: MakeJob) -> MakeSweep:
    """Build a sweep over the learning rate, on one worker a trial; keywords replace its fields."""

    def make(**fields: Any) -> SweepConfig:  # noqa: ANN401
        base = make_job(
            "unused", scale__num_workers=1, engine__strategy="ddp", engine__zero_stage=None
        )
        write_yaml(base, tmp_path / "base.yaml")
        values: dict[str, Any] = {
            "sweep_dir": str(tmp_path / "sweep"),
            "job": "pretrain",
            "base": str(tmp_path / "base.yaml"),
            "fixed": {"eval.every_steps": 2, "eval.max_sequences": 64},
            "space": {"optim.learning_rate": {"choice": RATES}},
            "search": {"kind": "grid"},
            "scheduler": {"kind": "asha", "grace_steps": 4, "reduction_factor": 2},
            "max_steps": 8,
        }
        return from_dict(SweepConfig, {**values, **fields})

    return make


def curve(run_dir: Place, name: str) -> dict[float, float]:
    return {r["step"]: r[name] for r in read_metrics(run_dir) if name in r}


@pytest.mark.usefixtures("ray_cluster")
def test_sweep_finds_the_best_rate_and_its_config_repeats_the_winner(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    sweep = make_sweep()
    summary = run_sweep(sweep)
    assert summary.status == "finished"
    states = {trial.number: trial.state for trial in summary.trials}
    assert summary.trials[0].number in (0, 1)
    assert states[summary.trials[0].number] == "finished"
    # Two at a time: of those that come later, the worst is stopped at the first rung.
    assert "stopped" in states.values()
    stopped = [trial for trial in summary.trials if trial.state == "stopped"]
    assert all(trial.step < 8 for trial in stopped)
    assert set(states.values()) <= {"finished", "stopped"}
    # Stopped trials have left nothing behind that the next would wait for.
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}

    rows = list(csv.DictReader((tmp_path / "sweep" / "leaderboard.csv").open()))
    assert [int(row["trial"]) for row in rows] == [trial.number for trial in summary.trials]
    assert (tmp_path / "sweep" / "sweep.html").exists()
    # One store for all.
    assert [path.name for path in tmp_path.glob("*store*")] == ["store"]

    assert summary.best_config is not None
    best = load(PretrainConfig, [str(summary.best_config.path)])
    run_training(best)
    winner = trial_dir(sweep.place, summary.trials[0].number)
    assert curve(best.run_place, LOSS) == curve(winner, LOSS)
    assert curve(best.run_place, EVAL_LOSS) == curve(winner, EVAL_LOSS)
    assert len(curve(winner, LOSS)) == 8

    # A trial that was stopped early is finished as the run that it is.
    run = load(PretrainConfig, [str(trial_dir(sweep.place, stopped[0].number).path / "run.yaml")])
    assert run_training(run).step == 8

    # Again: nothing is left to do, and nothing is done.
    before = (tmp_path / "sweep" / "journal.jsonl").read_bytes()
    assert run_sweep(sweep).status == "finished"
    assert (tmp_path / "sweep" / "journal.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match=r"sweep_dir: .* other settings"):
        run_sweep(make_sweep(max_steps=10))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_sweep_with_failed_and_diverged_trials_goes_on_and_says_why(
    make_sweep: MakeSweep, make_job: MakeJob, tmp_path: Path
) -> None:
    space: dict[str, Any] = {
        "model.path": {"choice": [str(tmp_path / "gone"), make_job().model.path]},
        "optim.learning_rate": {"choice": [1e-2, 1e30]},
    }
    fields: dict[str, Any] = {"space": space, "scheduler": {"kind": "none"}}
    with pytest.raises(ConfigError, match=r"tokenizes once(.|\n)*tokenizer: "):
        run_sweep(make_sweep(**fields))
    fields["fixed"] = {"model.tokenizer": make_job().model.path, "eval.every_steps": 4}
    with pytest.raises(ConfigError, match="gone"):
        run_sweep(make_sweep(**fields))  # the first sample is looked at before anything starts
    space["model.path"]["choice"].reverse()
    summary = run_sweep(make_sweep(**fields))
    trials = {trial.number: trial for trial in summary.trials}
    assert summary.status == "finished"
    assert [trials[n].state for n in range(4)] == ["finished", "diverged", "failed", "failed"]
    assert "gone" in (trials[2].cause or "")
    assert "the gradient norm nan" in (trials[1].cause or "")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_sweep_whose_trials_all_fail_fails(make_sweep: MakeSweep) -> None:
    space = {"optim.learning_rate": {"choice": [1e30, 1e31]}}
    summary = run_sweep(make_sweep(space=space, scheduler={"kind": "none"}))
    assert summary.status == "failed"
    assert summary.best_config is None
    assert {trial.state for trial in summary.trials} == {"diverged"}


@pytest.mark.usefixtures("ray_cluster")
def test_sweep_that_the_cluster_cannot_hold_is_refused_at_once(make_sweep: MakeSweep) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"scale\.num_workers: 3 workers"):
        run_sweep(make_sweep(fixed={"scale.num_workers": 3}))
    assert time.monotonic() - start < 30


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_sweep_prints_commands_that_run_as_printed(
    make_sweep: MakeSweep, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    space = {"optim.learning_rate": {"choice": RATES[:2]}}
    sweep = make_sweep(space=space, scheduler={"kind": "none"}, max_steps=4)
    write_yaml(sweep, tmp_path / "sweep.yaml")
    assert VERBS["sweep"]([str(tmp_path / "sweep.yaml")], "raytune sweep") == 0
    printed = capsys.readouterr().out
    assert "2 finished" in printed
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  raytune ")]
    assert [verb for _, verb, *_ in commands] == ["merge", "serve", "pretrain", "pretrain"]
    merged = sweep.place / "merged"
    for _, verb, *arguments in commands:
        if verb == "serve":  # It would serve until it is interrupted.
            assert arguments == [f"model_dir={merged}"]
        else:
            assert VERBS[verb](arguments, f"raytune {verb}") == 0
    assert (merged / "model.safetensors").exists()
    continued, longer = sweep.place / "continued", sweep.place / "best-8"
    assert (max(curve(continued, LOSS)), max(curve(longer, LOSS))) == (4, 8)
    # The best adapter is trained further, and not a new one from the base.
    winner = curve(trial_dir(sweep.place, best_trial(sweep)), EVAL_LOSS)
    assert curve(continued, EVAL_LOSS)[0] == pytest.approx(winner[4], rel=1e-5)


def best_trial(sweep: SweepConfig) -> int:
    trials = Journal(sweep.place).trials.values()
    return min(trials, key=lambda trial: trial.value or 0).number


def start_sweep(sweep: SweepConfig, log: Path) -> subprocess.Popen[bytes]:
    """Start `python jobs/sweep.py` on a Ray cluster of its own."""
    file = log.with_suffix(".yaml")
    write_yaml(sweep, file)
    command = [sys.executable, "jobs/sweep.py", str(file)]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=own_cluster())


def wait_for(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    while not reached():
        assert process.poll() is None, "the sweep ended before"
        time.sleep(0.2)


@pytest.mark.slow
def test_sweep_killed_with_kill_9_and_run_again_knows_its_trials(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    sweep = make_sweep(
        space={"optim.learning_rate": {"loguniform": [1e-5, 1e-1]}},
        search={"kind": "tpe", "startup_trials": 2},
        scheduler={"kind": "none"},
        num_trials=3,
        max_steps=16,
        max_concurrent=1,
    )
    process = start_sweep(sweep, tmp_path / "sweep.log")

    def second_runs() -> bool:
        trials = Journal(sweep.place).trials
        return 1 in trials and 4 <= trials[1].step < 12

    wait_for(process, second_runs)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = Journal(sweep.place).trials
    assert [before[n].has_ended for n in (0, 1)] == [True, False]
    first = (trial_dir(sweep.place, 0) / "metrics.jsonl").read_bytes()

    again = start_sweep(sweep, tmp_path / "sweep.log")
    assert again.wait() == 0, (tmp_path / "sweep.log").read_text()[-3000:]
    after = Journal(sweep.place).trials
    assert [after[n].state for n in range(3)] == ["finished"] * 3
    assert after[0] == before[0]
    assert after[1].sample == before[1].sample
    assert (trial_dir(sweep.place, 0) / "metrics.jsonl").read_bytes() == first
    # The second went on from a checkpoint: each step stands once, and it says where it began.
    steps = [r["step"] for r in read_metrics(trial_dir(sweep.place, 1)) if LOSS in r]
    assert steps == list(range(1, 17))
    events = [json.loads(line) for line in (tmp_path / "sweep" / "journal.jsonl").open()]
    assert [e["trial"] for e in events if e["event"] == "start"] == [0, 1, 2]
    assert (tmp_path / "sweep" / "best.yaml").exists()
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000


def run_on_nodes_of_which_one_is_lost(sweep: SweepConfig, tmp_path: Path) -> None:
    """Run a sweep on two nodes, kill one on the way, and check that all trials finish."""
    write_yaml(sweep, tmp_path / "sweep.yaml")
    # A process of its own: the cluster of two nodes must not meet the tests' shared one.
    command = [sys.executable, "-m", "tests.pipeline.sweep_lost_node", str(tmp_path / "sweep.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=own_cluster(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Ray writes there too what its raylets have to say.
    told = {"node lost", "finished", "stopped", "failed"}
    lines = [line for line in done.stdout.splitlines() if line in told]
    assert lines == ["node lost", "finished"], done.stdout + done.stderr
    assert {trial.state for trial in Journal(sweep.place).trials.values()} == {"finished"}


@pytest.mark.slow
def test_sweep_that_loses_a_node_ends_as_if_it_had_not(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "space": {"optim.learning_rate": {"choice": [1e-2, 1e-3]}},
        "scheduler": {"kind": "none"},
        "max_steps": 40,
    }
    sweep = make_sweep(**fields)
    run_on_nodes_of_which_one_is_lost(sweep, tmp_path)
    trials = Journal(sweep.place).trials

    undisturbed = run_sweep(make_sweep(**fields, sweep_dir=str(tmp_path / "undisturbed")))
    for trial in undisturbed.trials:
        assert trials[trial.number].values == trial.values


@pytest.mark.slow  # Three Ray clusters.
@pytest.mark.usefixtures("ray_cluster")
def test_sweep_stopped_by_ctrl_c_saves_its_trials_and_resumes_them(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    # No checkpoint but the one that the stop asks for.
    fields: dict[str, Any] = {
        "space": {"optim.learning_rate": {"choice": [1e-2, 1e-3]}},
        "fixed": {
            "eval.every_steps": 100,
            "checkpoint.every_steps": 1000,
            "checkpoint.keep_best": False,
        },
        "scheduler": {"kind": "none"},
        "max_steps": 400,
        "max_concurrent": 1,
    }
    sweep = make_sweep(**fields)
    write_yaml(sweep, tmp_path / "sweep.yaml")
    command = [sys.executable, "jobs/sweep.py", str(tmp_path / "sweep.yaml")]
    first = trial_dir(sweep.place, 0)

    def newest_step() -> float:
        return max(curve(first, LOSS), default=0)

    with Terminal(command, environment=own_cluster()) as terminal:
        terminal.wait_until(lambda: newest_step() >= 20)
        terminal.press_ctrl_c()
        assert terminal.wait() == 75, terminal.printed
    assert "Traceback" not in terminal.printed
    assert f"to resume: python jobs/sweep.py {tmp_path / 'sweep.yaml'}\n" in terminal.printed
    stopped_at = newest_step()
    assert stopped_at < 400
    saved = [path.name for path in (first.path / "checkpoints").iterdir()]
    assert saved == [f"step-{stopped_at:08.0f}"]
    # It has not ended, and no other has begun.
    trials = Journal(sweep.place).trials
    assert {number: trial.has_ended for number, trial in trials.items()} == {0: False}

    with Terminal(command, environment=own_cluster()) as terminal:
        assert terminal.wait() == 0, terminal.printed
    undisturbed = run_sweep(make_sweep(**fields, sweep_dir=str(tmp_path / "undisturbed")))
    trials = Journal(sweep.place).trials
    for trial in undisturbed.trials:
        assert trials[trial.number].values == trial.values
    assert curve(first, LOSS) == curve(trial_dir(undisturbed.sweep_dir, 0), LOSS)
