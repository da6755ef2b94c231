"""Processes with gloo between them, as under Ray Train but without Ray; kept for many runs."""

import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raytune_llama.config.settings import from_dict, to_dict
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.loop import train
from raytune_llama.train.process_group import ProcessGroup

TIMEOUT_SECONDS = 300


Job = Callable[[ProcessGroup], None]


def training_processes() -> ForkServerContext:
    """Return a context whose processes start with all that training imports, which takes 6 s.

    They are forked from a server process that has imported it once, and has done nothing else.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.preloaded"])
    return context


def _serve(
    rank: int, world_size: int, store: str, jobs: "Queue[Any]", answers: "Queue[Any]"
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    workers = ProcessGroup.from_torch(torch.device("cpu"))
    while (job := jobs.get()) is not None:
        try:
            job(workers)
            answers.put(None)
        except BaseException:  # noqa: BLE001 - every failure is the test's to show
            answers.put(traceback.format_exc())
    dist.destroy_process_group()


def _train(
    kind: type[AnyTrainConfig],
    settings: dict[str, Any],
    stop_after: int | None,
    around: Callable[[int], AbstractContextManager[None]],
    workers: ProcessGroup,
) -> None:
    steps = iter(range(10**9))
    with around(workers.rank):
        train(from_dict(kind, settings), workers, lambda: next(steps) == stop_after)


class Group:
    """Runs the loop on a fixed number of processes, one run after the other."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self._world_size, self._folder = world_size, folder
        self._num_starts = 0
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = training_processes()
        self._jobs = [context.Queue() for _ in range(self._world_size)]
        self._answers = context.Queue()
        store = str(self._folder / f"rendezvous-{self._num_starts}")
        self._num_starts += 1
        self._processes = [
            context.Process(
                target=_serve, args=(rank, self._world_size, store, jobs, self._answers)
            )
            for rank, jobs in enumerate(self._jobs)
        ]
        for process in self._processes:
            process.start()

    def run(
        self,
        config: AnyTrainConfig,
        *,
        stop_after: int | None = None,
        others: Mapping[int, AnyTrainConfig] | None = None,
        around: Callable[[int], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Train on all processes; raise what any of them raised first.

        Args:
            config: of the run.
            stop_after: ask it to stop after so many steps.
            others: configs of single ranks, which are to be wrong.
            around: gives each process, by its rank, a block around the run; a function of a module.
        """
        configs = [(others or {}).get(rank, config) for rank in range(self._world_size)]
        self._call_each(
            [partial(_train, type(each), to_dict(each), stop_after, around) for each in configs]
        )

    def call(self, job: Job) -> None:
        """Run a job on all processes: something that can be pickled, and takes the workers."""
        self._call_each([job] * self._world_size)

    def _call_each(self, each: Sequence[Job]) -> None:
        if not self._processes:
            self._start()
        for jobs, job in zip(self._jobs, each, strict=True):
            jobs.put(job)
        for _ in self._jobs:
            problem = self._next_answer()
            if problem:
                # The others wait for it for ever: the next run takes new processes.
                for process in self._processes:
                    process.kill()
                self._processes = []
                raise AssertionError(problem)

    def _next_answer(self) -> str | None:
        """Wait until a worker has finished its job; return its problem."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            exited = [each.exitcode for each in self._processes if not each.is_alive()]
            try:
                return self._answers.get(timeout=1.0)
            except Empty:
                if exited:
                    return f"a worker has exited with status {exited[0]}"
        return f"a worker has not answered for {TIMEOUT_SECONDS} s"

    def close(self) -> None:
        """End the processes."""
        if not self._processes:
            return
        for jobs in self._jobs:
            jobs.put(None)
        for process in self._processes:
            process.join(30)
            if process.is_alive():
                process.kill()
