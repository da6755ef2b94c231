"""Numbered tasks on Ray Data that leave their results in files and return counts."""

import errno
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import pyarrow as pa
import ray.data

from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

MAX_TASK_ATTEMPTS = 3
"""A task that ended its process this often is refused: Ray would start it again for ever."""

_RESULT_SCHEMA = pa.schema({"counts": pa.string(), "problem": pa.string()})


def quiet_ray_data() -> AbstractContextManager[object]:
    """Let Ray Data show no progress of its own in a block: ours says more."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data sets its loggers' levels when it is imported: what setup_logging did is undone.
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

    Ray must be initialised. A task whose process dies is run again.

    Args:
        name: What they do, for the log; no other tasks with the same `attempts` have it.
        run: A task, picklable; it must give the same result when it is run again.
        num_tasks: How many there are.
        attempts: A folder that all nodes see, for what is begun and not finished.
        num_workers: Tasks at a time, a CPU each; null: as many as there are CPUs.

    Raises:
        StoreError: Tasks raised it or `SourceError`, found a full disk, or ended their process too
            often; the problems of all of them.
    """
    started = time.monotonic()
    sums: Counter[str] = Counter()
    problems: list[str] = []
    with quiet_ray_data():
        dataset = ray.data.from_items(
            [{"task": number} for number in range(num_tasks)], override_num_blocks=num_tasks
        ).map_batches(
            # Tasks and not actors, as there is nothing to load that would be kept between them.
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
    """What Ray runs; a problem of the user's is returned as data, since Ray would wrap it."""

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
            problem = f"{self._attempts.parent.parent}: {error}; make room there and run again"
        row = {"counts": json.dumps(dict(counts)), "problem": problem}
        return pa.Table.from_pylist([row], schema=_RESULT_SCHEMA)

    def _count_and_run(self, number: int) -> Mapping[str, int]:
        attempt = self._attempts / str(number)
        status = attempt.status()
        num_attempts = status.num_bytes if status else 0
        if num_attempts >= MAX_TASK_ATTEMPTS:
            raise StoreError(
                f"{attempt}: the task ended its process {num_attempts} times (out of memory, or "
                "lost machines); look into the workers' logs, then run again"
            )
        attempt.write_bytes(b"." * (num_attempts + 1))
        counts = self._run(number)
        attempt.delete()
        return counts
