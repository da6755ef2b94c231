"""Promise: wherever saving fails or is killed, a valid checkpoint loads, and saving goes on."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint import shards as slices
from raytune_llama.train.checkpoint.layout import CheckpointError, RunState, check_checkpoint
from raytune_llama.train.checkpoint.restore import restore
from raytune_llama.train.loop import Session, read_batches, train_step
from tests.chaos.faults import Calls, die, no_space
from tests.train.conftest import MakeConfig
from tests.train.saved import ALONE, WholeState, build, save, state_of

DEADLINE_SECONDS = 60


@dataclass(frozen=True)
class Saved:
    """A run with a checkpoint of step 1, which is at step 2."""

    session: Session
    at_start: Path
    """Its directory, to be copied."""

    states: dict[int, dict[str, WholeState]]
    """What its checkpoints must give back, by step."""

    def save(self, run_dir: Path, step: int = 2) -> None:
        # The oldest one is deleted as soon as the new one is there.
        save(self.session, Place.local(run_dir), RunState(step=step), keep_last=1, keep_best=False)

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.at_start, target)
        return target


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder in memory, where there is one: hundreds of flushes cost nothing there."""
    memory = Path("/dev/shm")  # noqa: S108  # the folder in it has a name of its own
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder).resolve()


@pytest.fixture
def saved(make_config: MakeConfig, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Saved:
    # Two files to a checkpoint, of few tensors each.
    monkeypatch.setattr(slices, "FILE_BYTES", 4096)
    config = make_config(lora__targets=["q_proj"], lora__modules_to_save=[])
    session = build(config, num_steps=1)
    states = {1: state_of(session.engine)}
    at_start = disk / "at_start"
    save(session, Place.local(at_start), RunState(step=1))
    batch = list(zip(range(2), read_batches(session, 0), strict=False))[1][1]
    train_step(session, batch, sum(batch.source_targets))
    states[2] = states[3] = state_of(session.engine)
    return Saved(session, at_start, states)


def count_calls(saved: Saved, run_dir: Path) -> list[str]:
    calls = Calls(run_dir, fail_at=None)
    with calls.watched():
        saved.save(saved.copy(run_dir))
    assert {"open", "write", "fsync", "replace", "rename", "mkdir", "rmtree"} <= set(calls.names)
    return calls.names


def assert_loads(saved: Saved, run_dir: Path, steps: set[int]) -> int:
    """Load the newest checkpoint, which is of one of some steps, and compare every number."""
    place = Place.local(run_dir)
    state = restore(place, saved.session.engine, ALONE)
    assert state.step in steps
    for name, wanted in saved.states[state.step].items():
        ours = state_of(saved.session.engine)[name]
        assert torch.equal(ours.weight, wanted.weight)
        assert torch.equal(ours.exp_avg, wanted.exp_avg)
        assert torch.equal(ours.exp_avg_sq, wanted.exp_avg_sq)
    # None was found damaged, and none that lies about looks finished.
    for folder in (place / "checkpoints").folders():
        assert folder.name.startswith(".") or check_checkpoint(folder, run_dir) is None
    return state.step


def assert_goes_on(saved: Saved, run_dir: Path) -> None:
    """Take the next checkpoint; nothing of a failed one is left."""
    saved.save(run_dir, step=3)
    assert assert_loads(saved, run_dir, {3}) == 3
    assert [folder.name for folder in (run_dir / "checkpoints").iterdir()] == ["step-00000003"]


def assert_survived(saved: Saved, run_dir: Path, disk: Path) -> int:
    """Check that a run goes on from a step and is saved again; return the step; delete the run."""
    step = assert_loads(saved, run_dir, {1, 2})
    saved.states[3] = saved.states[step]
    assert_goes_on(saved, run_dir)
    # Back to the state of step 2, whatever was loaded.
    restore(Place.local(disk / "counted"), saved.session.engine, ALONE)
    shutil.rmtree(run_dir)
    return step


def test_save_that_fails_at_any_call_leaves_a_valid_checkpoint(saved: Saved, disk: Path) -> None:
    names = count_calls(saved, disk / "counted")
    loaded: list[int] = []
    for number in range(len(names)):
        run_dir = saved.copy(disk / f"run-{number}")
        calls = Calls(run_dir, fail_at=number, fault=no_space)
        with calls.watched():
            try:
                saved.save(run_dir)
            except CheckpointError as error:
                assert os.strerror(28) in str(error)  # noqa: PT017  # not every call ends the run
        assert len(calls.names) > number
        loaded.append(assert_survived(saved, run_dir, disk))
    # Until the new one has its name the old one loads, and from then on the new one.
    assert loaded == sorted(loaded)
    assert set(loaded) == {1, 2}


def save_and_die(saved: Saved, run_dir: Path, number: int) -> int:
    """Save in a child process that is killed at a call; return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            with Calls(run_dir, fail_at=number, fault=die).watched():
                saved.save(run_dir)
        finally:
            # Never back into the tests, whatever happened.
            os._exit(1)
    late = threading.Timer(DEADLINE_SECONDS, os.kill, (child, signal.SIGKILL))
    late.start()
    _, status = os.waitpid(child, 0)
    late.cancel()
    return os.waitstatus_to_exitcode(status)


def test_save_that_is_killed_at_any_call_leaves_a_valid_checkpoint(
    saved: Saved, disk: Path
) -> None:
    names = count_calls(saved, disk / "counted")
    loaded: list[int] = []
    for number in range(len(names)):
        run_dir = saved.copy(disk / f"run-{number}")
        assert save_and_die(saved, run_dir, number) == 9
        loaded.append(assert_survived(saved, run_dir, disk))
    assert loaded == sorted(loaded)
    assert set(loaded) == {1, 2}
