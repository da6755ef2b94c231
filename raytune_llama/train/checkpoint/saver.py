"""Saving a run while training continues: copy the state, and write it in a background thread.

Every worker copies its slices to host memory, which is all that training waits for, and its thread
writes them. Rank 0's thread waits for the other workers' part manifests (small files next to their
slices), merges them and publishes the checkpoint; threads never use the process group, which is
reserved for training. The workers agree on whether a checkpoint was published when the next one is
due, or at the end.
"""

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from raytune_llama.storage.files import move_directory
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import is_published
from raytune_llama.train.checkpoint.config import CheckpointConfig
from raytune_llama.train.checkpoint.layout import (
    CHECKPOINT_MANIFEST,
    CheckpointError,
    RunState,
    SaveResult,
    checkpoint_path,
    delete_old_checkpoints,
    delete_unfinished,
    seal_manifest,
    unfinished_place,
)
from raytune_llama.train.checkpoint.shards import merge_worker_manifests, write_slices
from raytune_llama.train.engines.protocol import STATE_KEYS, StateSlice, TrainEngine, trained_shapes
from raytune_llama.train.process_group import ProcessGroup

logger = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""Seconds that a failing worker waits for the other workers' parts of a pending checkpoint."""

_POLL_SECONDS = (0.01, 1.0)
"""Seconds between polls for the other workers' parts: initial and maximum."""


@dataclass
class _PendingCheckpoint:
    """A checkpoint that is being written."""

    name: str
    """Id of this save, the same on all workers."""

    state: RunState
    scalars: dict[str, float]
    shapes: dict[str, list[int]]
    folder: Place
    """Folder that its files are written to."""

    started: float = field(default_factory=time.perf_counter)
    stall_seconds: float = 0.0
    write_seconds: float = 0.0

    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set if some worker's part will never be written."""

    part: "Future[dict[str, Any]] | None" = None
    """Result of writing this worker's part: its manifest."""

    published: "Future[None] | None" = None
    """Result of publishing the checkpoint; on rank 0 only."""


class SaveLog(Protocol):
    """Receiver of the durations and outcomes of saves."""

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager for the time in which training waits."""
        ...

    def saved(self, result: SaveResult) -> None:
        """Record the outcome of a checkpoint; called on every worker."""
        ...


class Saver(contextlib.AbstractContextManager["Saver"]):
    """Saves checkpoints of a run; every worker has one and calls the same methods."""

    def __init__(
        self,
        run_dir: Place,
        config: CheckpointConfig,
        engine: TrainEngine,
        workers: ProcessGroup,
        report: SaveLog,
    ) -> None:
        self._run_dir, self._config = run_dir, config
        self._engine, self._workers, self._report = engine, workers, report
        # The name marks the log records of a pack's runs.
        name = f"{threading.current_thread().name} checkpoint"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._copies: dict[tuple[str, int], StateSlice] = {}
        self._last: _PendingCheckpoint | None = None
        self._num_failed = 0
        self._failure = ""

    def __enter__(self) -> Self:
        if self._workers.is_rank_zero:
            # The remains of a killed process's last checkpoint may be what fills the disk.
            self._clean_up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the last checkpoint, which must be written unless the run has failed anyway.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        try:
            if kind is not None:
                self._abandon_last()
                return
            with self._report.saving():
                self.finish()
            if self._num_failed:
                raise CheckpointError(self._failure)
        finally:
            self._pool.shutdown(wait=False)

    def save(self, state: RunState) -> None:
        """Save a checkpoint, after the previous one is written; collective.

        Raises:
            CheckpointError: `max_failed_saves` consecutive saves failed.
        """
        with self._report.saving():
            self.finish()
            started = time.perf_counter()
            self._last = self._start_save(state)
            self._last.stall_seconds = time.perf_counter() - started
            if not self._config.background:
                self.finish()

    def finish(self) -> None:
        """Wait until the pending checkpoint is published or has failed; collective.

        Raises:
            CheckpointError: `max_failed_saves` consecutive saves failed.
        """
        attempt, self._last = self._last, None
        if attempt is None:
            return
        waiting = time.perf_counter()
        problem = self._agree(attempt)
        attempt.stall_seconds += time.perf_counter() - waiting
        self._report.saved(
            SaveResult(attempt.state.step, attempt.stall_seconds, attempt.write_seconds, problem)
        )
        if problem is None:
            self._num_failed = 0
            return
        self._num_failed += 1
        self._failure = (
            f"checkpoints could not be written to {self._run_dir} (failures in a row: "
            f"{self._num_failed}, the last at step {attempt.state.step}): {problem}; fix that and "
            "run the same command again to resume from the newest checkpoint"
        )
        if self._workers.is_rank_zero:
            logger.error(
                "checkpoint of step %d could not be written: %s", attempt.state.step, problem
            )
            self._clean_up()
        if self._num_failed >= self._config.max_failed_saves:
            raise CheckpointError(self._failure)
        # No worker writes again before rank 0 has freed space.
        self._workers.barrier()

    def _start_save(self, state: RunState) -> _PendingCheckpoint:
        name = self._workers.broadcast(uuid.uuid4().hex[:12])
        attempt = _PendingCheckpoint(
            name,
            state,
            self._engine.scalar_state(),
            trained_shapes(self._engine.module),
            unfinished_place(self._run_dir, state.step, name),
        )
        slices = self._engine.trainable_state()
        mine = self._copied(slices) if self._config.background else slices
        attempt.part = self._pool.submit(self._write_part, attempt, mine)
        if self._workers.is_rank_zero:
            attempt.published = self._pool.submit(self._publish, attempt, attempt.part)
        return attempt

    def _copied(self, slices: Iterable[StateSlice]) -> list[StateSlice]:
        """Copy slices into host buffers, which are reused: allocating new pages is slow."""
        copies: list[StateSlice] = []
        for each in slices:
            key = (each.name, each.start)
            if key not in self._copies:
                tensors = [_host_memory(getattr(each, part)) for part in STATE_KEYS]
                self._copies[key] = StateSlice(*key, *tensors)
            for part in STATE_KEYS:
                getattr(self._copies[key], part).copy_(getattr(each, part), non_blocking=True)
            copies.append(self._copies[key])
        if self._workers.device.type == "cuda":
            torch.cuda.synchronize(self._workers.device)
        return copies

    def _write_part(
        self, attempt: _PendingCheckpoint, slices: Iterable[StateSlice]
    ) -> dict[str, Any]:
        """Write this worker's slices and, unless on rank 0, their part manifest; in the thread."""
        rank = self._workers.rank
        stem = f"state-{attempt.name}-{rank:05d}"
        try:
            part = write_slices(slices, attempt.folder, stem)
            if not self._workers.is_rank_zero:
                (attempt.folder / _part_name(attempt, rank)).write_json(part)
        except OSError:
            # If the disk is full, other writers need the space at once.
            _delete_files(attempt.folder, stem)
            raise
        return part

    def _publish(self, attempt: _PendingCheckpoint, part: "Future[dict[str, Any]]") -> None:
        """Wait for all parts and publish the checkpoint; in rank 0's thread."""
        parts = [part.result(), *self._other_parts(attempt)]
        step = attempt.state.step
        target = checkpoint_path(self._run_dir, step)
        joined = merge_worker_manifests(parts, attempt.shapes)
        manifest = seal_manifest(
            {
                "attempt": attempt.name,
                "state": asdict(attempt.state),
                "scalars": attempt.scalars,
                "world_size": self._workers.world_size,
                **joined,
            }
        )
        for rank in range(1, self._workers.world_size):
            (attempt.folder / _part_name(attempt, rank)).delete()
        if self._workers.fence is not None:
            self._workers.fence.check()
        if is_published(target, CHECKPOINT_MANIFEST):
            # A step of a run always has the same content: the existing checkpoint stays.
            _delete_files(attempt.folder, f"state-{attempt.name}")
            if self._run_dir.is_local:
                attempt.folder.delete()
        else:
            (attempt.folder / CHECKPOINT_MANIFEST).write_json(manifest)
            if self._run_dir.is_local:
                move_directory(attempt.folder.path, target.path)
        attempt.write_seconds = time.perf_counter() - attempt.started
        num_bytes = sum(entry["bytes"] for entry in joined["files"].values())
        logger.info(
            "saved checkpoint of step %d: %.1f MiB in %.1f s, %s",
            step,
            num_bytes / 2**20,
            attempt.write_seconds,
            target,
        )
        try:
            delete_old_checkpoints(self._run_dir, self._config, attempt.state)
        except OSError as error:
            logger.warning("old checkpoints could not be deleted: %s", error)

    def _other_parts(self, attempt: _PendingCheckpoint) -> list[dict[str, Any]]:
        ranks = range(1, self._workers.world_size)
        names = {_part_name(attempt, rank) for rank in ranks}
        found: dict[str, dict[str, Any]] = {}
        pause, longest = _POLL_SECONDS
        while True:
            for file in attempt.folder.files() if names else ():
                if file.name in names:
                    names.remove(file.name)
                    found[file.name] = file.read_json()
            if not names:
                return list(found.values())
            if attempt.abandoned.wait(pause):
                raise CheckpointError("not every worker has written its part")
            pause = min(2 * pause, longest)

    def _agree(self, attempt: _PendingCheckpoint) -> str | None:
        """Wait for the threads; return on all workers why the save failed, or None; collective."""
        assert attempt.part is not None
        mine = _problem_of(attempt.part)
        name = f"worker {self._workers.rank}: " if self._workers.world_size > 1 else ""
        problems = self._workers.all_gather(None if mine is None else f"{name}{mine}")
        found = [problem for problem in problems if problem is not None]
        if found:
            attempt.abandoned.set()
        last = None if attempt.published is None else _problem_of(attempt.published)
        return self._workers.broadcast(found[0] if found else last)

    def _abandon_last(self) -> None:
        """Wait a little for the pending checkpoint after training failed; not collective."""
        if self._last is None:
            return
        assert self._last.part is not None
        wait([self._last.part])
        if self._last.published is not None:
            wait([self._last.published], timeout=GRACE_SECONDS)
        self._last.abandoned.set()

    def _clean_up(self) -> None:
        try:
            delete_unfinished(self._run_dir)
        except OSError as error:
            logger.warning("an unfinished checkpoint could not be deleted: %s", error)


def _host_memory(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, pin_memory=like.is_cuda)


def _delete_files(folder: Place, stem: str) -> None:
    """Delete the files whose names begin with `stem`, ignoring I/O errors."""
    with contextlib.suppress(OSError):
        for file in folder.files():
            if file.name.startswith(stem):
                file.delete()


def _part_name(attempt: _PendingCheckpoint, rank: int) -> str:
    return f"part-{attempt.name}-{rank:05d}.json"


def _problem_of(future: "Future[Any]") -> str | None:
    """Return why a write failed, or None; errors of any other kind are raised."""
    error = future.exception()
    if error is None:
        return None
    if not isinstance(error, (OSError, CheckpointError)):
        raise error
    return str(error)
