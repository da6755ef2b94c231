"""Promise: saving takes the state as it was, holds training up little, and tells when it fails."""

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_llama.storage.lease import Lease, LeaseError, LeaseTimes
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint import shards as slices
from raytune_llama.train.checkpoint.layout import (
    CheckpointError,
    RunState,
    checkpoint_path,
    list_checkpoints,
)
from raytune_llama.train.checkpoint.restore import restore, restore_step
from raytune_llama.train.loop import read_batches, train_step
from raytune_llama.train.monitoring import metrics
from raytune_llama.train.monitoring.metrics import read_metrics
from tests.train.conftest import MakeConfig, curve, run_here, stage_fields
from tests.train.group import Group
from tests.train.saved import (
    ALONE,
    FULL,
    FullDisk,
    assert_same,
    build,
    hashes_of,
    open_saver,
    save,
    state_files,
    state_of,
)

DEADLINE_SECONDS = 60


class Gate:
    """Holds every flush to the disk back until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        fsync = os.fsync

        def held(descriptor: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self._open.wait(DEADLINE_SECONDS)
            fsync(descriptor)

        patch.setattr(os, "fsync", held)

    def open(self) -> None:
        self._open.set()


def test_save_while_training_goes_on_has_the_state_of_its_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**FULL)
    session, frozen = build(config, num_steps=2), build(config, num_steps=2)
    run_dir = Place.local(tmp_path)
    # The gate holds up the first of many files: all others are written after the next step.
    monkeypatch.setattr(slices, "FILE_BYTES", 8192)
    gate = Gate(monkeypatch)
    batch = list(zip(range(3), read_batches(session, 0), strict=False))[2][1]
    with open_saver(session, run_dir) as saver:
        saver.save(RunState(step=2))
        assert gate.reached.wait(DEADLINE_SECONDS)
        # It is being written, and the next step is taken.
        train_step(session, batch, sum(batch.source_targets))
        assert list_checkpoints(run_dir) == []
        gate.open()
    assert list_checkpoints(run_dir) == [checkpoint_path(run_dir, 2)]
    fresh = build(config).engine
    assert restore(run_dir, fresh, ALONE).step == 2
    assert_same(fresh, frozen.engine)
    assert any(
        not state.weight.equal(state_of(fresh)[name].weight)
        for name, state in state_of(session.engine).items()
    )


def test_save_waits_for_the_one_before_and_reuses_its_memory(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config()
    session = build(config)
    run_dir = Place.local(tmp_path)
    batches = read_batches(session, 0)
    states = []
    with open_saver(session, run_dir, keep_last=3) as saver:
        for step in (1, 2, 3):
            batch = next(batches)
            train_step(session, batch, sum(batch.source_targets))
            states.append(state_of(session.engine))
            saver.save(RunState(step=step))
            # All before it are there.
            assert len(list_checkpoints(run_dir)) >= step - 1
    for step, wanted in zip((1, 2, 3), states, strict=True):
        engine = build(config).engine
        restore_step(run_dir, engine, ALONE, step=step)
        for name, state in state_of(engine).items():
            assert state.weight.equal(wanted[name].weight)
            assert state.exp_avg_sq.equal(wanted[name].exp_avg_sq)


def test_save_in_the_foreground_is_there_at_once_and_the_same(
    make_config: MakeConfig, run_dir: Place
) -> None:
    session = build(make_config(), num_steps=1)
    save(session, run_dir / "behind", RunState(step=1))
    with open_saver(session, run_dir / "before", background=False) as saver:
        saver.save(RunState(step=1))
        (there,) = list_checkpoints(run_dir / "before")
    assert hashes_of(there) == hashes_of(checkpoint_path(run_dir / "behind", 1))


def test_save_cuts_large_parameters_into_files_of_bounded_size(
    make_config: MakeConfig, run_dir: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "FILE_BYTES", 8192)
    config = make_config(**FULL)
    session = build(config, num_steps=1)
    largest = max(state.weight.numel() for state in state_of(session.engine).values())
    assert 12 * largest > 8192
    save(session, run_dir, RunState(step=1))
    sizes = [status.num_bytes for status in checkpoint_path(run_dir, 1).files().values()]
    assert len(sizes) > 20
    assert sorted(sizes)[-2] < 8192 + 2048
    fresh = build(config).engine
    restore(run_dir, fresh, ALONE)
    assert_same(fresh, session.engine)


def test_train_without_background_equals_the_run_with_it(make_config: MakeConfig) -> None:
    behind, before = make_config("behind"), make_config("before", checkpoint__background=False)
    run_here(behind)
    run_here(before)
    assert curve(before) == curve(behind)
    ours, wanted = (hashes_of(list_checkpoints(c.run_place)[-1]) for c in (before, behind))
    assert ours == wanted


def test_train_writes_stall_and_time_of_every_checkpoint(make_config: MakeConfig) -> None:
    config = make_config(checkpoint__keep_best=False)
    run_here(config)
    records = read_metrics(config.run_place)
    for name in (metrics.CHECKPOINT_STALL_SECONDS, metrics.CHECKPOINT_WRITE_SECONDS):
        found = {record["step"]: record[name] for record in records if name in record}
        assert sorted(found) == [2, 4, 6]
        assert all(seconds > 0 for seconds in found.values())


def test_train_on_a_disk_that_is_full_for_a_while_goes_on_and_counts(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, full = (make_config(name, checkpoint__keep_best=False) for name in ("whole", "full"))
    run_here(whole)
    FullDisk(monkeypatch, times=2)
    assert run_here(full).status == "finished"
    assert curve(full) == curve(whole)
    assert [place.name for place in list_checkpoints(full.run_place)] == ["step-00000006"]
    records = read_metrics(full.run_place)
    assert [r["step"] for r in records if metrics.CHECKPOINT_FAILED in r] == [2, 4]
    assert [p.name for p in (full.run_place / "checkpoints").folders()] == ["step-00000006"]


@pytest.mark.parametrize("background", [True, False])
def test_train_on_a_disk_that_stays_full_ends_naming_the_cause_and_goes_on_with_room(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, *, background: bool
) -> None:
    fields = {"checkpoint__keep_best": False, "checkpoint__every_steps": 1}
    whole = make_config("whole", **fields)
    run_here(whole)
    full = make_config("full", **fields, checkpoint__background=background)
    run_here(full, stop_after=1)
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, times=10**6)
        with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
            run_here(full)
        assert 10**6 - disk.left == 3
    # None is better than the one that is there, which was kept, and no half one lies about.
    assert [p.name for p in (full.run_place / "checkpoints").folders()] == ["step-00000001"]
    assert run_here(full).status == "finished"
    assert curve(full) == curve(whole)


def test_train_whose_last_checkpoint_fails_ends_with_an_error(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoint__every_steps=6, checkpoint__keep_best=False)
    with monkeypatch.context() as patch:
        FullDisk(patch, times=1)
        with pytest.raises(CheckpointError, match="step 6"):
            run_here(config)
    assert not (config.run_place / config.result_name).exists()
    assert run_here(config).status == "finished"


def test_saver_of_a_run_that_fails_still_finishes_its_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = build(make_config())
    gate = Gate(monkeypatch)

    def fail() -> None:
        with open_saver(session, Place.local(tmp_path)) as saver:
            saver.save(RunState(step=1))
            assert gate.reached.wait(DEADLINE_SECONDS)
            gate.open()
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert list_checkpoints(Place.local(tmp_path)) == [checkpoint_path(Place.local(tmp_path), 1)]


def test_worker_that_cannot_write_gives_its_room_back_at_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = build(make_config(**FULL))
    monkeypatch.setattr(slices, "FILE_BYTES", 8192)
    FullDisk(monkeypatch, times=1, name="-00002.safetensors")

    def fail() -> None:
        # No worker cleans up after what another exception ends.
        with open_saver(session, Place.local(tmp_path)) as saver:
            saver.save(RunState(step=1))
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_saver_of_a_run_that_another_driver_has_taken_publishes_nothing(
    make_config: MakeConfig, run_dir: Place
) -> None:
    session = build(make_config())
    times = LeaseTimes(settle_seconds=0.3)
    with Lease(run_dir, times) as lease:
        fence = lease.confirm()
        save(session, run_dir, RunState(step=1), fence=fence)
    with Lease(run_dir, times) as successor:
        successor.confirm()
        with pytest.raises(LeaseError, match="another driver"):
            save(session, run_dir, RunState(step=2), fence=fence)
    assert list_checkpoints(run_dir) == [checkpoint_path(run_dir, 1)]


def test_save_of_what_is_no_json_is_an_error_of_its_own(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    session = build(make_config())
    state = replace(RunState(step=1), best_loss=float("nan"))
    with pytest.raises(ValueError, match="JSON") as caught:
        save(session, Place.local(tmp_path), state)
    assert not isinstance(caught.value, CheckpointError)
    assert list_checkpoints(Place.local(tmp_path)) == []


STRATEGIES = {
    **{f"zero_{stage}": stage_fields(stage) for stage in (1, 2, 3)},
    "ddp": stage_fields(0),
    "fsdp": {"engine__strategy": "fsdp"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_train_on_two_workers_each_writes_about_half_of_the_state(
    make_config: MakeConfig, two: Group, strategy: str
) -> None:
    config = make_config(**FULL, max_steps=1, **STRATEGIES[strategy])
    two.run(config)
    (place,) = list_checkpoints(config.run_place)
    sizes = [len(file.read_bytes()) for file in state_files(place)]
    assert len(sizes) == 2
    assert min(sizes) > 0.9 * max(sizes)
