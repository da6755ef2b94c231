"""Shards on Ray: a task each. The only module of the merge that knows Ray."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from raytune_llama.connection import connect_to_ray

T = TypeVar("T")


def run_on_ray(run: Callable[[str], T], names: list[str], *, num_workers: int) -> list[T]:
    """Run a function once for each name, in tasks of one CPU; return the results in order.

    The cluster is the one that the environment names, or one that is started here and left again.

    Args:
        run: Picklable, and with the same result when it is run again, as Ray does where a node
            dies; what it writes must be in a place that all nodes see.
        names: What it is called with.
        num_workers: Tasks at a time.

    Raises:
        Exception: What the first task raised that failed; no other task is running then.
    """

    def call(name: str) -> T:  # Ray takes plain functions alone
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
