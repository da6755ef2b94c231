"""Whole sweeps whose trials train in packs, on a tiny model."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from raytune_llama.config.settings import from_dict, load, override, write_yaml
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, GRAD_NORM, LOSS
from raytune_llama.train.trainer import run_training
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import Journal, trial_dir
from raytune_llama.tune.sweep import SweepSummary, run_sweep
from tests.pipeline.conftest import MakeJob, own_cluster
from tests.pipeline.test_sweep import (
    curve,
    run_on_nodes_of_which_one_is_lost,
    start_sweep,
    wait_for,
)
from tests.terminal import Terminal
from tests.train.conftest import run_here

pytestmark = pytest.mark.ray

MakeSweep = Callable[..., SweepConfig]

SPACE: dict[str, Any] = {
    "optim.learning_rate": {"choice": [1e-2, 1e-3, 1e-5]},
    "lora.rank": {"choice": [2, 7]},
}


@pytest.fixture
def make_sweep(tmp_path: Path, make_job: MakeJob) -> MakeSweep:
    """Build a packed sweep of six trials, three at a time; keywords replace its fields."""

    def make(**fields: Any) -> SweepConfig:  # noqa: ANN401
        # Both cores for one worker: there is room for one pack.
        base = make_job(
            "unused",
            scale__num_workers=1,
            scale__cpus_per_worker=2,
            engine__strategy="ddp",
            engine__zero_stage=None,
        )
        write_yaml(base, tmp_path / "base.yaml")
        values: dict[str, Any] = {
            "sweep_dir": str(tmp_path / "sweep"),
            "job": "pretrain",
            "base": str(tmp_path / "base.yaml"),
            "fixed": {"eval.every_steps": 2, "eval.max_sequences": 64},
            "space": SPACE,
            "search": {"kind": "grid"},
            "scheduler": {"kind": "none"},
            "max_steps": 8,
            "pack": 3,
        }
        return from_dict(SweepConfig, {**values, **fields})

    return make


@contextlib.contextmanager
def threads_of_a_worker(config: PretrainConfig) -> Iterator[None]:
    """Compute with as many threads as a worker of the run: another number rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.scale.cpus_per_worker)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_trials(
    sweep: SweepConfig,
    tmp_path: Path,
    repeat: Callable[[PretrainConfig], object] = run_here,
    numbers: Sequence[int] | None = None,
) -> None:
    """Repeat trials alone, and compare what they have learned bit for bit.

    Args:
        sweep: the sweep, all of whose trials have ended.
        tmp_path: where to repeat them.
        repeat: runs a config, with as many workers as the sweep's.
        numbers: numbers of the trials; None: all.
    """
    trials = Journal(sweep.place).trials
    for number in trials if numbers is None else numbers:
        config = load(PretrainConfig, [str(trial_dir(sweep.place, number).path / "run.yaml")])
        step = trials[number].step
        end = {} if step == config.max_steps else {"stop_step": step}
        alone = override(config, {"run_dir": str(tmp_path / "alone" / str(number)), **end})
        with threads_of_a_worker(config):
            repeat(alone)
        for name in (LOSS, EVAL_LOSS, GRAD_NORM):
            packed = curve(trial_dir(sweep.place, number), name)
            kept = {at: value for at, value in packed.items() if at <= step}
            assert kept == curve(alone.run_place, name), (number, name)


@pytest.mark.usefixtures("ray_cluster")
def test_packed_sweep_gives_each_trial_what_it_learns_alone(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    sweep = make_sweep(scheduler={"kind": "asha", "grace_steps": 2, "reduction_factor": 2})
    summary = run_sweep(sweep)
    assert summary.status == "finished"
    # ASHA compares a trial with those that have reported before it: which ones it stops depends on
    # the order in which the trials of a step report, and the first one always goes on.
    assert {trial.state for trial in summary.trials} == {"finished", "stopped"}
    assert_joined_in_free_slots(summary)
    assert_same_trials(sweep, tmp_path)
    # The workers have started once.
    assert [path.name for path in (sweep.place.path / "packs").iterdir()] == ["0000"]
    before = (tmp_path / "sweep" / "journal.jsonl").read_bytes()
    assert run_sweep(sweep).status == "finished"
    assert (tmp_path / "sweep" / "journal.jsonl").read_bytes() == before


def assert_joined_in_free_slots(summary: SweepSummary) -> None:
    """Check that all slots were used, each by one trial at a time."""
    slot_uses = [use for trial in summary.trials for use in trial.slot_uses]
    assert len(slot_uses) == len(summary.trials) == 6
    assert {use.slot for use in slot_uses} == {0, 1, 2}
    for slot in range(3):
        own = sorted((r for r in slot_uses if r.slot == slot), key=lambda use: use.started)
        assert all(
            first.ended is not None and first.ended <= second.started
            for first, second in pairwise(own)
        )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_packed_sweep_with_a_diverging_trial_goes_on(make_sweep: MakeSweep, tmp_path: Path) -> None:
    space = {"optim.learning_rate": {"choice": [1e30, 1e-2, 1e-3]}}
    sweep = make_sweep(space=space, pack=2)
    summary = run_sweep(sweep)
    trials = {trial.number: trial for trial in summary.trials}
    assert [trials[n].state for n in range(3)] == ["diverged", "finished", "finished"]
    assert "gradient norm nan" in (trials[0].cause or "")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_packed_sweep_on_two_workers_equals_trials_alone_on_two(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    fixed = {"eval.every_steps": 4, "scale.num_workers": 2, "scale.cpus_per_worker": 1}
    sweep = make_sweep(fixed=fixed, num_trials=3, pack=2)
    assert run_sweep(sweep).status == "finished"
    assert_same_trials(sweep, tmp_path, run_training, [0, 2])


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_packed_sweep_killed_with_kill_9_resumes_every_trial(
    make_sweep: MakeSweep, tmp_path: Path, victim: str
) -> None:
    fixed = {"eval.every_steps": 5, "eval.max_sequences": 8, "checkpoint.every_steps": 10}
    sweep = make_sweep(max_steps=60, fixed={**fixed, "checkpoint.keep_best": False})
    process = start_sweep(sweep, tmp_path / "sweep.log")

    def second_batch_runs() -> bool:
        trials = Journal(sweep.place).trials
        return len(trials) > 3 and trials[3].step >= 10

    wait_for(process, second_batch_runs)
    if victim == "driver":
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = start_sweep(sweep, tmp_path / "sweep.log")
    else:
        os.kill(find_worker(process.pid), signal.SIGKILL)
    assert process.wait() == 0, (tmp_path / "sweep.log").read_text()[-3000:]
    trials = Journal(sweep.place).trials
    assert [trial.state for trial in trials.values()] == ["finished"] * 6
    steps = list(range(1, 61))
    for number in trials:
        assert sorted(curve(trial_dir(sweep.place, number), LOSS)) == steps
    assert_same_trials(sweep, tmp_path, numbers=[0, 3])


def find_worker(driver: int) -> int:
    """Return the process of the training worker in a driver's own cluster."""
    below = psutil.Process(driver).children(recursive=True)
    found = [each.pid for each in below if "RayTrainWorker" in " ".join(each.cmdline())]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_elastic_pack_that_loses_a_node_continues_every_trial_on_the_other(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    elastic = {"scale.num_workers": {"min": 1, "max": 2}, "scale.cpus_per_worker": 1}
    fields: dict[str, Any] = {
        "space": {"optim.learning_rate": {"choice": [1e-2, 1e-3]}},
        # Without dropout, whose bits depend on the number of workers.
        "fixed": {
            "eval.every_steps": 2,
            "checkpoint.every_steps": 4,
            "lora.dropout": 0.0,
            **elastic,
        },
        "max_steps": 40,
        "pack": 2,
    }
    sweep = make_sweep(**fields)
    run_on_nodes_of_which_one_is_lost(sweep, tmp_path)
    trials = Journal(sweep.place).trials
    for number in trials:
        config = load(PretrainConfig, [str(trial_dir(sweep.place, number).path / "run.yaml")])
        alone = override(config, {"run_dir": str(tmp_path / "alone" / str(number))})
        run_here(alone)
        # Two workers, then one, against one: sums in another order.
        for name in (LOSS, EVAL_LOSS):
            packed = curve(trial_dir(sweep.place, number), name)
            assert packed == pytest.approx(curve(alone.run_place, name), rel=1e-5), (number, name)


@pytest.mark.slow
def test_pack_whose_node_is_lost_for_good_continues_where_another_pack_ends(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    fixed = {"eval.every_steps": 2, "checkpoint.every_steps": 4, "scale.cpus_per_worker": 1}
    space = {"optim.learning_rate": {"choice": [1e-2, 1e-3, 1e-5]}}
    sweep = make_sweep(space=space, fixed=fixed, max_steps=40, pack=1)
    run_on_nodes_of_which_one_is_lost(sweep, tmp_path)
    assert len(list((sweep.place.path / "packs").iterdir())) == 2
    assert_same_trials(sweep, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_packed_sweep_stopped_by_ctrl_c_saves_its_trials_and_resumes_them(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "space": {"optim.learning_rate": {"choice": [1e-2, 1e-3]}},
        "fixed": {"eval.every_steps": 100, "checkpoint.every_steps": 1000},
        "max_steps": 200,
        "pack": 2,
    }
    sweep = make_sweep(**fields)
    write_yaml(sweep, tmp_path / "sweep.yaml")
    command = [sys.executable, "jobs/sweep.py", str(tmp_path / "sweep.yaml")]
    places = [trial_dir(sweep.place, number) for number in range(2)]

    def newest_step(place: Place) -> float:
        return max(curve(place, LOSS), default=0)

    with Terminal(command, environment=own_cluster()) as terminal:
        terminal.wait_until(lambda: min(newest_step(place) for place in places) >= 20)
        terminal.press_ctrl_c()
        assert terminal.wait() == 75, terminal.printed
    assert "Traceback" not in terminal.printed
    for place in places:
        saved = sorted(path.name for path in (place.path / "checkpoints").iterdir())
        assert saved[-1] == f"step-{newest_step(place):08.0f}"
        assert newest_step(place) < 200
    assert run_sweep(sweep).status == "finished"
    assert_same_trials(sweep, tmp_path, numbers=[1])
