"""Resuming from a checkpoint: find the newest intact one, and load it on every worker."""

import contextlib
import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import (
    CHECKPOINT_MANIFEST,
    DAMAGED_SUFFIX,
    CheckpointError,
    RunState,
    check_checkpoint,
    checkpoint_path,
    list_checkpoints,
    mark_damaged,
)
from raytune_llama.train.checkpoint.shards import SliceReader
from raytune_llama.train.engines.protocol import TrainEngine, trained_shapes
from raytune_llama.train.process_group import ProcessGroup

logger = logging.getLogger(__name__)


def restore(run_dir: Place, engine: TrainEngine, workers: ProcessGroup) -> RunState:
    """Load the newest intact checkpoint, or start at step 0; collective.

    A damaged checkpoint is logged and renamed, so that the run can save that step again. From
    object storage, each node downloads a file once.

    Args:
        run_dir: directory of the run.
        engine: receives the weights and moments.
        workers: all workers of the run.

    Raises:
        CheckpointError: the newest intact checkpoint does not match the model, or the run has
            checkpoints and all are damaged.
        OSError: the run directory cannot be reached.
    """
    with node_folder(workers) as copies:
        found = _newest_intact(run_dir, copies, workers)
        if found is None:
            _refuse_to_start_over(run_dir, workers)
            return RunState()
        return _load(found, copies, engine, workers)


def restore_step(run_dir: Place, engine: TrainEngine, workers: ProcessGroup, step: int) -> RunState:
    """Load the checkpoint of one step and no other; collective.

    Raises:
        CheckpointError: it is damaged, or does not match the model.
        OSError: the run directory cannot be reached.
    """
    with node_folder(workers) as copies:
        path = checkpoint_path(run_dir, step)
        damage = _check_together(path, copies, workers)
        if damage is not None:
            raise CheckpointError(
                f"{damage}; set checkpoint.result=last to export the last step instead"
            )
        return _load(path, copies, engine, workers)


def roll_back(run_dir: Place, engine: TrainEngine, workers: ProcessGroup, step: int) -> RunState:
    """Load the checkpoint of a step or, if it was not written, the newest before; collective.

    Raises:
        CheckpointError: no intact one exists, or it does not match the model.
        OSError: the run directory cannot be reached.
    """
    with node_folder(workers) as copies:
        found = _newest_intact(run_dir, copies, workers, up_to_step=step)
        if found is None:
            raise CheckpointError(
                f"{run_dir}: no intact checkpoint of step {step} or before to roll back to; make "
                "sure that they can be written, or start a new run with optim.on_bad_step=skip"
            )
        return _load(found, copies, engine, workers)


def _load(path: Place, copies: Path, engine: TrainEngine, workers: ProcessGroup) -> RunState:
    """Load a verified checkpoint; collective."""
    manifest = (path / CHECKPOINT_MANIFEST).read_json()
    _check_fit(path, manifest["tensors"], engine)
    with SliceReader(path, manifest, copies) as reader:
        engine.load_trainable_state(reader.read)
    engine.load_scalar_state(manifest["scalars"])
    state = RunState(**manifest["state"])
    logger.info("resumed from %s after step %d", path, state.step)
    if manifest["world_size"] != workers.world_size:
        logger.info(
            "number of workers changed: %d when saved, %d now",
            manifest["world_size"],
            workers.world_size,
        )
    return state


@contextlib.contextmanager
def node_folder(workers: ProcessGroup) -> Iterator[Path]:
    """Create a folder shared by the workers of a node; deleted at the end; collective."""
    name = workers.broadcast(f"raytune_llama-{uuid.uuid4().hex}")
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield folder
        workers.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_together(path: Place, copies: Path, workers: ProcessGroup) -> str | None:
    """Check a checkpoint, each worker a share; return what is wrong, or None; collective."""
    problem = check_checkpoint(path, copies, share=workers.rank, num_shares=workers.world_size)
    return next((found for found in workers.all_gather(problem) if found is not None), None)


def _newest_intact(
    run_dir: Place, copies: Path, workers: ProcessGroup, *, up_to_step: int | None = None
) -> Place | None:
    """Return the newest intact checkpoint, of `up_to_step` at most, or None; collective."""
    # If rank 0 fails, the other workers fail in the broadcast.
    listed = workers.broadcast(list_checkpoints(run_dir) if workers.is_rank_zero else [])
    last = None if up_to_step is None else checkpoint_path(run_dir, up_to_step).name
    for path in reversed([path for path in listed if last is None or path.name <= last]):
        problem = _check_together(path, copies, workers)
        if problem is None:
            return path
        if workers.is_rank_zero:
            aside = mark_damaged(path)
            logger.warning(
                "%s; renamed to %s, trying the checkpoint before it", problem, aside.name
            )
    return None


def _refuse_to_start_over(run_dir: Place, workers: ProcessGroup) -> None:
    """Raise if a run has checkpoints but all are damaged: a user may still be able to fix one."""
    folders = (run_dir / "checkpoints").folders() if workers.is_rank_zero else []
    damaged = workers.broadcast([f.name for f in folders if f.name.endswith(DAMAGED_SUFFIX)])
    if damaged:
        raise CheckpointError(
            f"{run_dir}: none of its {len(damaged)} checkpoints is intact, the newest is "
            f"{damaged[-1]}; restore one from a backup under its original name, or delete them to "
            "start at step 0"
        )


def _check_fit(path: Place, tensors: Mapping[str, Any], engine: TrainEngine) -> None:
    """Raise if a checkpoint's parameters differ from the engine's in name or shape."""
    wanted = trained_shapes(engine.module)
    problems = [f"it has no parameter {name}" for name in wanted if name not in tensors]
    problems += [f"its {name} is not trained now" for name in tensors if name not in wanted]
    problems += [
        f"its {name} has shape {tensors[name]['shape']}, the model's has {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name]["shape"] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: {'; '.join(problems[:3])}{more}: it was written with another model or "
            "adapter; use another run_dir"
        )
