"""Promise: a process that is killed while it compiles does not block all later ones."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from torch.utils.file_baton import FileBaton

from raytune_llama.train.engines.deepspeed_zero import CompileLock
from tests.train.group import training_processes


def hold(path: str, ready: Connection) -> None:
    ready.send(CompileLock(path).try_acquire())
    signal.pause()


def test_compile_lock_excludes_others_until_its_holder_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    processes = training_processes()
    here, there = processes.Pipe()
    holder = processes.Process(target=hold, args=(path, there), daemon=True)
    holder.start()
    assert here.recv()
    second = CompileLock(path)
    assert not second.try_acquire()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    second.wait()
    assert second.try_acquire()
    second.release()
    assert CompileLock(path).try_acquire()
    holder.join()


def test_compile_lock_has_the_methods_of_the_class_that_it_stands_in_for() -> None:
    public = [name for name in vars(FileBaton) if not name.startswith("_")]
    assert all(hasattr(CompileLock, name) for name in public)
