"""Run numbered tasks on Ray Data that write their results to files and return counts."""

import errno
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import pyarrow as pa

from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

MAX_TASK_ATTEMPTS = 3
"""A task fails after its process has died this often; Ray alone would retry it forever."""

_RESULT_SCHEMA = pa.schema({"counts": pa.string(), "problem": pa.string()})


def quiet_ray_data() -> AbstractContextManager[object]:
    """Disable Ray Data's own progress output in a block; ours says more."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Importing Ray Data resets its loggers' levels, which undoes setup_logging.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return ray.data.DataContext.current(context)


def run_tasks(
    name: str,
    run: Callable[[int], Mapping[str, int]],
    num_tasks: int,
    attempts: Place,
    *,
    num_workers: int | None = None,
) -> Counter[str]:
    """Run the tasks 0 to `num_tasks - 1` and return the sums of their counts.

    Ray must be initialized. A task whose process dies is retried.

    Args:
        name: Name of the tasks for the log, unique within `attempts`.
        run: Task to run with its number; picklable and idempotent.
        num_tasks: Number of tasks.
        attempts: Folder on shared storage for the attempt counts of unfinished tasks.
        num_workers: Concurrent tasks, with one CPU each; None: one per CPU of the cluster.

    Raises:
        StoreError: Tasks raised it or `SourceError`, the disk was full, or the process of a task
            died too often; the message has the problems of all tasks.
    """
    import ray.data

    started = time.monotonic()
    sums: Counter[str] = Counter()
    problems: list[str] = []
    with quiet_ray_data():
        dataset = ray.data.from_items(
            [{"task": number} for number in range(num_tasks)], override_num_blocks=num_tasks
        ).map_batches(
            # Tasks instead of actors, as there is no state to keep between them.
            _Task(run, attempts / name.replace("/", "-")),
            compute=ray.data.TaskPoolStrategy(num_workers and min(num_workers, num_tasks)),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
        )
        for row in dataset.iter_rows():
            sums.update(json.loads(row["counts"]))
            problems += [row["problem"]] if row["problem"] else []
    if problems:
        raise StoreError("\n".join(sorted(set(problems))))
    listed = ", ".join(f"{number} {what}" for what, number in sums.items())
    seconds = time.monotonic() - started
    logger.info("%s: %d tasks in %.1f s: %s", name, num_tasks, seconds, listed)
    return sums


class _Task:
    """Callable that Ray runs; user errors are returned as data, since Ray would wrap them."""

    def __init__(self, run: Callable[[int], Mapping[str, int]], attempts: Place) -> None:
        self._run = run
        self._attempts = attempts

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Run the task whose number is the only row of the column `task`."""
        counts: Mapping[str, int] = {}
        problem: str | None = None
        try:
            counts = self._count_and_run(batch.column("task")[0].as_py())
        except (SourceError, StoreError) as error:
            problem = str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            problem = (
                f"{self._attempts.parent.parent}: {error}; free disk space there and run again"
            )
        row = {"counts": json.dumps(dict(counts)), "problem": problem}
        return pa.Table.from_pylist([row], schema=_RESULT_SCHEMA)

    def _count_and_run(self, number: int) -> Mapping[str, int]:
        attempt = self._attempts / str(number)
        status = attempt.status()
        num_attempts = status.num_bytes if status else 0
        if num_attempts >= MAX_TASK_ATTEMPTS:
            raise StoreError(
                f"{attempt}: the process of the task died {num_attempts} times (out of memory, or "
                "lost nodes); check the worker logs, then run again"
            )
        attempt.write_bytes(b"." * (num_attempts + 1))
        counts = self._run(number)
        attempt.delete()
        return counts
