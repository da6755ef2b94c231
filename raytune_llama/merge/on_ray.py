"""Run shards as Ray tasks. The only module of the merge that depends on Ray."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from raytune_llama.connection import connect_to_ray

T = TypeVar("T")


def run_on_ray(run: Callable[[str], T], names: list[str], *, num_workers: int) -> list[T]:
    """Run a function once per name, in tasks with one CPU each; return the results in order.

    Connects to the cluster that the environment names, or starts one for the duration of the call.

    Args:
        run: Picklable and idempotent function, since Ray retries it if a node dies; it must write
            to storage that all nodes share.
        names: Arguments of the calls.
        num_workers: Number of concurrent tasks.

    Raises:
        Exception: The error of the first task that failed, after all running tasks have ended.
    """

    def call(name: str) -> T:  # Ray accepts only plain functions
        return run(name)

    with connect_to_ray():
        task: Any = ray.remote(num_cpus=1)(call)
        waiting, running, results = list(enumerate(names)), {}, {}
        problem: BaseException | None = None
        while running or (waiting and problem is None):
            while waiting and len(running) < num_workers and problem is None:
                number, name = waiting.pop(0)
                running[task.remote(name)] = number
            done, _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done[0])
            try:
                results[number] = ray.get(done[0])
            except RayTaskError as error:
                problem = problem or error.cause
        if problem is not None:
            raise problem
        return [results[number] for number in range(len(names))]
