"""Promise: what a worker tells of itself is true, and costs the loop nothing."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raytune_llama.train.orchestration.heartbeat import locate_frame
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.progress import Progress
from tests.train.conftest import MakeConfig
from tests.train.group import training_processes


def test_pulse_times_steps_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pulse = Progress()
    for step, seconds in enumerate([50.0, 3.0, 7.0, 2.0], 1):
        now += seconds
        pulse.record_step(step)
    # The first is no step's time: it has the loading in it.
    assert (pulse.pop_slowest_seconds(), pulse.pop_slowest_seconds(), pulse.step) == (7.0, 0.0, 4)
    with pulse.during("evaluating"):
        assert pulse.phase == "evaluating"
        now += 1000.0
    assert pulse.phase == "training"
    now += 5.0
    pulse.record_step(5)
    assert pulse.pop_slowest_seconds() == 5.0


def test_pulse_marks_grow_with_everything_that_is_done() -> None:
    pulse = Progress()
    marks = [pulse.ticks]
    pulse.record_step(1)
    marks.append(pulse.ticks)
    with pulse.during("saving"):
        marks.append(pulse.ticks)
    marks.append(pulse.ticks)
    assert marks == sorted(set(marks))


def test_run_of_the_loop_tells_its_phases(make_config: MakeConfig) -> None:
    from raytune_llama.train.loop import train

    workers = ProcessGroup.single_process()
    seen: list[str] = []

    class Recorder(Progress):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "phase" and value != getattr(self, "phase", None):
                seen.append(str(value))
            super().__setattr__(name, value)

    object.__setattr__(workers, "progress", Recorder())
    train(make_config(max_steps=2), workers, lambda: False)
    assert seen == [
        *("starting", "evaluating", "starting", "training", "evaluating", "training"),
        *("saving", "training", "saving", "training", "finishing"),
    ]
    assert workers.progress.step == 2


def wait_for_peer(store: str) -> None:
    """Join a group of two whose other member never comes to the collective."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=2)
    time.sleep(600)


def observe(store: str, peer: int) -> None:
    """Watch a thread that waits in a collective, until the other member is killed."""
    started = threading.Event()

    def wait() -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=2)
        workers = ProcessGroup.from_torch(torch.device("cpu"))
        started.set()
        with pytest.raises(RuntimeError):
            workers.barrier()
        dist.destroy_process_group()

    thread = threading.Thread(target=wait)
    thread.start()
    assert started.wait(120)
    deadline = time.monotonic() + 60
    where, waits = "", False
    while not waits and time.monotonic() < deadline:
        where, waits = locate_frame(sys._current_frames().get(thread.ident or 0))
        time.sleep(0.01)
    os.kill(peer, signal.SIGKILL)  # upon which the collective fails
    assert waits
    assert where.startswith("train/process_group.py:")
    thread.join(120)
    assert not thread.is_alive()
    assert not locate_frame(sys._current_frames()[threading.get_ident()])[1]


def test_thread_in_a_collective_is_seen_to_wait(tmp_path: Path) -> None:
    # In a process of its own: this one may be in a group already.
    store = f"{tmp_path}/store"
    processes = training_processes()
    peer = processes.Process(target=wait_for_peer, args=(store,))
    peer.start()
    observer = processes.Process(target=observe, args=(store, peer.pid))
    observer.start()
    observer.join(400)
    peer.kill()
    assert observer.exitcode == 0
