"""Promise: a worker's mistake ends the run on all workers, and is told as it is."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raytune_llama.config.settings import ConfigError
from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.worker import (
    describe_user_error,
    newest_step,
    unblock_other_workers,
)
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import Runs, copy_run
from tests.train.group import training_processes

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=30)


def fail_alone(store: str) -> None:
    """Join a group of two, and leave it as a worker does that has found a mistake."""
    method = f"file://{store}"
    dist.init_process_group("gloo", init_method=method, rank=1, world_size=2, timeout=TIMEOUT)
    ProcessGroup.from_torch(CPU).barrier()
    unblock_other_workers(CPU)
    time.sleep(600)  # its process stays, as Ray's does


def wait_for_leaver(store: str) -> None:
    """Join a group of two, and wait in a collective for the member that leaves it."""
    method = f"file://{store}"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=2, timeout=TIMEOUT)
    workers = ProcessGroup.from_torch(CPU)
    workers.barrier()
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        workers.barrier()
    assert time.monotonic() - start < 120


def test_worker_that_leaves_lets_those_that_wait_for_it_fail_at_once(tmp_path: Path) -> None:
    # Both in processes of their own: DeepSpeed keeps a clone of the group that it first saw in a
    # process, so a test's process must not leave its group.
    store = str(tmp_path / "store")
    processes = training_processes()
    leaver = processes.Process(target=fail_alone, args=(store,), daemon=True)
    waiter = processes.Process(target=wait_for_leaver, args=(store,), daemon=True)
    leaver.start()
    waiter.start()
    try:
        waiter.join(300)
        assert waiter.exitcode == 0
    finally:
        for process in (leaver, waiter):
            process.kill()
            process.join()


def test_mistake_is_told_by_message_and_a_stranger_by_its_kind_too() -> None:
    assert describe_user_error(ConfigError(["a.b: bad"])) == "a.b: bad"
    assert describe_user_error(FileNotFoundError(2, "no", "f")).startswith("FileNotFoundError: ")


def test_newest_step_is_that_of_the_newest_finished_checkpoint(run_dir: Place, runs: Runs) -> None:
    assert newest_step(run_dir) == 0
    copy_run(runs, run_dir)
    assert newest_step(run_dir) == 5
    (run_dir / "checkpoints" / ".step-00000009.x.tmp" / "half").write_bytes(b"half")
    assert newest_step(run_dir) == 5
