"""Going on from a checkpoint: find the newest that can be trusted, and load it on every worker."""

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
    """Load the newest checkpoint that can be trusted, or start at step 0; collective.

    A checkpoint that cannot be trusted is named in the log and renamed out of the way, so that
    the run can save that step again. From object storage, each node fetches a file once.

    Args:
        run_dir: the run's directory.
        engine: takes the weights and moments.
        workers: all of the run.

    Raises:
        CheckpointError: the newest trusted checkpoint does not fit the model, or there are
            checkpoints and none can be trusted.
        OSError: the run directory cannot be reached.
    """
    with node_folder(workers) as copies:
        found = _newest_trusted(run_dir, copies, workers)
        if found is None:
            _refuse_to_start_over(run_dir, workers)
            return RunState()
        return _load(found, copies, engine, workers)


def restore_step(run_dir: Place, engine: TrainEngine, workers: ProcessGroup, step: int) -> RunState:
    """Load the checkpoint of one step and no other; collective.

    Raises:
        CheckpointError: it cannot be trusted, or does not fit the model.
        OSError: the run directory cannot be reached.
    """
    with node_folder(workers) as copies:
        path = checkpoint_path(run_dir, step)
        damage = _check_together(path, copies, workers)
        if damage is not None:
            raise CheckpointError(f"{damage}; set checkpoint.result=last to do without it")
        return _load(path, copies, engine, workers)


def roll_back(run_dir: Place, engine: TrainEngine, workers: ProcessGroup, step: int) -> RunState:
    """Load the checkpoint of a step, or where it was not written the newest before; collective.

    Raises:
        CheckpointError: there is none that can be trusted, or it does not fit the model.
        OSError: the run directory cannot be reached.
    """
    with node_folder(workers) as copies:
        found = _newest_trusted(run_dir, copies, workers, most=step)
        if found is None:
            raise CheckpointError(
                f"{run_dir}: no checkpoint of step {step} or before could be written, so there is "
                "none to go back to; mend that, or start a run with optim.on_bad_step=skip"
            )
        return _load(found, copies, engine, workers)


def _load(path: Place, copies: Path, engine: TrainEngine, workers: ProcessGroup) -> RunState:
    """Load a checkpoint that was checked."""
    manifest = (path / CHECKPOINT_MANIFEST).read_json()
    _check_fit(path, manifest["tensors"], engine)
    with SliceReader(path, manifest, copies) as reader:
        engine.load_trainable_state(reader.read)
    engine.load_scalar_state(manifest["scalars"])
    state = RunState(**manifest["state"])
    logger.info("resumed from %s: step %d done", path, state.step)
    if manifest["world_size"] != workers.world_size:
        logger.info(
            "workers: %d when it was saved, %d now", manifest["world_size"], workers.world_size
        )
    return state


@contextlib.contextmanager
def node_folder(workers: ProcessGroup) -> Iterator[Path]:
    """A folder that the workers of a node have together; deleted at the end; collective."""
    name = workers.broadcast(f"raytune_llama-{uuid.uuid4().hex}")
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield folder
        workers.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_together(path: Place, copies: Path, workers: ProcessGroup) -> str | None:
    """Return why a checkpoint cannot be trusted, or None; each worker reads its share of it."""
    problem = check_checkpoint(path, copies, share=workers.rank, num_shares=workers.world_size)
    return next((found for found in workers.all_gather(problem) if found is not None), None)


def _newest_trusted(
    run_dir: Place, copies: Path, workers: ProcessGroup, *, most: int | None = None
) -> Place | None:
    """Return the newest checkpoint that can be trusted, of at most a step; None without one."""
    # An error of the first worker ends the others too: they fail in the broadcast.
    listed = workers.broadcast(list_checkpoints(run_dir) if workers.is_rank_zero else [])
    last = None if most is None else checkpoint_path(run_dir, most).name
    for path in reversed([path for path in listed if last is None or path.name <= last]):
        problem = _check_together(path, copies, workers)
        if problem is None:
            return path
        if workers.is_rank_zero:
            aside = mark_damaged(path)
            logger.warning(
                "%s; it is now %s, the checkpoint before it is used", problem, aside.name
            )
    return None


def _refuse_to_start_over(run_dir: Place, workers: ProcessGroup) -> None:
    """Raise where a run has checkpoints, all damaged: a person can perhaps still mend one."""
    folders = (run_dir / "checkpoints").folders() if workers.is_rank_zero else []
    damaged = workers.broadcast([f.name for f in folders if f.name.endswith(DAMAGED_SUFFIX)])
    if damaged:
        raise CheckpointError(
            f"{run_dir}: none of its {len(damaged)} checkpoints can be trusted, the newest is "
            f"{damaged[-1]}; restore one from a backup under its own name, or delete them to "
            "start at step 0"
        )


def _check_fit(path: Place, tensors: Mapping[str, Any], engine: TrainEngine) -> None:
    """Refuse a checkpoint of other parameters than the engine's, by name or by shape."""
    wanted = trained_shapes(engine.module)
    problems = [f"it has no parameter {name}" for name in wanted if name not in tensors]
    problems += [f"its {name} is not trained now" for name in tensors if name not in wanted]
    problems += [
        f"its {name} is of shape {tensors[name]['shape']}, the model's of {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name]["shape"] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: {'; '.join(problems[:3])}{more}: it was written with another model or "
            "adapter; use another run_dir"
        )
