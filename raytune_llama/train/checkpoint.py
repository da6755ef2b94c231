"""Checkpoints of a run: whole tensors by parameter name, whatever the workers and the strategy.

A checkpoint is a directory `step-00000100/` with safetensors shards, each holding `weight`,
`exp_avg` and `exp_avg_sq` of some parameters, and a `manifest.json`, which lists every tensor and
the SHA256 of every shard and of itself, and carries the rest of the state as JSON. Nothing is
pickled. It is built under another name and renamed, so it is there whole or not at all; in object
storage, which has no rename, it is there once its manifest is, which is uploaded last. Since bits
can still be lost, a reader trusts only hashes that fit.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raytune_llama.config import ConfigError, settings
from raytune_llama.files import sha256_file, write_json_atomic
from raytune_llama.storage import Place
from raytune_llama.train.engine import Engine, ParameterState, trained_parameters
from raytune_llama.train.workers import Workers
from raytune_llama.transfers import is_published, local_copy, publish_place

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DAMAGED = ".damaged"
SHARD_BYTES = 2 * 2**30
"""Size at which a shard is written; host memory needed to save, beside one parameter's state."""

_PARTS = ("weight", "exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step-\d{8}")
_UNFINISHED = re.compile(r"\.step-\d{8}\..*\.tmp")
_DIGEST = "sha256"


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted or does not fit the run."""


@settings
class CheckpointConfig:
    """When a run is saved, and what is kept."""

    every_steps: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between checkpoints. One more is written at the end and on SIGTERM."""

    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints kept."""

    keep_best: bool = True
    """Also save and keep the step with the lowest `eval/loss`."""

    result: Literal["last", "best"] = "last"
    """Whose weights become the result of the run: those of its last step, or of the best that was
    kept."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.result == "best" and not self.keep_best:
            raise ConfigError(["result: best is not kept; set keep_best=true, or use last"])
        return self


@dataclass(frozen=True)
class RunState:
    """All of a run's state that is no tensor."""

    step: int = 0
    """Optimizer steps done; the next step's batch follows from it alone."""

    tokens: int = 0
    """Target tokens trained on."""

    source_sequences: list[int] = field(default_factory=list)
    """Sequences trained on, of each source that has any; empty before the first step."""

    source_targets: list[int] = field(default_factory=list)
    """Target tokens trained on, of each such source; they sum up to `tokens`."""

    num_skipped_steps: int = 0
    """Steps that moved no weight since half-precision gradients overflowed."""

    num_bad_steps: int = 0
    """Steps that moved no weight since their loss or gradient was not finite."""

    num_bad_in_row: int = 0
    """Such steps since the last that moved weights."""

    num_undone_steps: int = 0
    """Good steps that were taken back by going back to a checkpoint; what they read is counted in
    all that is counted here, and not read again."""

    rollback_step: int | None = None
    """The newest checkpoint but for those of a stop, where a bad step may go back to: a run that
    was stopped goes back to where one that was not does."""

    seconds: float = 0.0
    """Time spent training, evaluating and saving, over all starts of the run."""

    best_step: int | None = None
    """Step with the lowest evaluation loss so far."""

    best_loss: float | None = None
    """That loss, in nats a token."""


def checkpoint_path(run_dir: Place, step: int) -> Place:
    """Return where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run_dir: Place, state: RunState, engine: Engine, workers: Workers) -> None:
    """Write the checkpoint of `state.step`; collective, the first worker writes.

    A checkpoint of this step that is there already is kept: equal steps of a run are equal.
    """
    target = checkpoint_path(run_dir, state.step)
    if workers.broadcast(workers.is_first and is_published(target, MANIFEST)):
        return
    scalars = engine.scalar_state()
    if not workers.is_first:
        for _ in engine.trainable_state():
            pass
        return
    with publish_place(target, last=MANIFEST) as folder:
        tensors = _write_shards(engine.trainable_state(), folder)
        files = sorted(path.name for path in folder.iterdir())
        manifest = {
            "format": FORMAT_VERSION,
            "state": asdict(state),
            "scalars": scalars,
            "tensors": tensors,
            "files": {name: _file_entry(folder / name) for name in files},
            "world_size": workers.world_size,
        }
        write_json_atomic(folder / MANIFEST, {**manifest, _DIGEST: _digest(manifest)})
    num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    logger.info("checkpoint: step %d, %.1f MiB, %s", state.step, num_bytes / 2**20, target)


def _digest(manifest: Mapping[str, Any]) -> str:
    """Hash all of a manifest but its own hash."""
    content = {key: value for key, value in manifest.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _write_shards(parameters: Iterable[tuple[str, ParameterState]], folder: Path) -> dict[str, Any]:
    """Write parameters into shards of bounded size and return where each lies."""
    index: dict[str, Any] = {}
    shard: dict[str, Tensor] = {}
    num_files = 0
    num_bytes = 0

    def flush() -> None:
        nonlocal shard, num_files, num_bytes
        save_file(shard, folder / _shard_name(num_files))
        shard, num_files, num_bytes = {}, num_files + 1, 0

    for name, state in parameters:
        for part in _PARTS:
            tensor: Tensor = getattr(state, part).contiguous()
            shard[f"{part}/{name}"] = tensor
            num_bytes += tensor.numel() * tensor.element_size()
        index[name] = {"shape": list(state.weight.shape), "file": _shard_name(num_files)}
        if num_bytes >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    return index


def _shard_name(number: int) -> str:
    return f"state-{number:05d}.safetensors"


def restore(
    run_dir: Place, engine: Engine, workers: Workers, *, step: int | None = None
) -> RunState:
    """Load the newest checkpoint that can be trusted, or start at step 0; collective.

    A checkpoint that cannot be trusted is named in the log and renamed out of the way, so that
    the run can save that step again. From object storage, each node fetches a checkpoint once.

    Args:
        run_dir: the run's directory.
        engine: takes the weights and moments.
        workers: all of the run.
        step: load the checkpoint of this step, and no other.

    Raises:
        CheckpointError: the newest trusted checkpoint does not fit the model, or there are
            checkpoints and none can be trusted; or not that of `step`.
        OSError: the run directory cannot be reached.
    """
    with node_folder(workers) as copies:
        # An error of the first worker ends the others too: they fail in the broadcast.
        found = workers.broadcast(_trusted(run_dir, copies, step) if workers.is_first else None)
        if found is None:
            return RunState()
        manifest = (found / MANIFEST).read_json()
        _check_fit(found, manifest["tensors"], engine)

        def read(name: str) -> ParameterState:
            shard = manifest["tensors"][name]["file"]
            path = _shard_path(found, shard, manifest["files"][shard], copies)
            with safe_open(path, framework="pt") as file:
                return ParameterState(*(file.get_tensor(f"{part}/{name}") for part in _PARTS))

        engine.load_trainable_state(read)
    engine.load_scalar_state(manifest["scalars"])
    state = RunState(**manifest["state"])
    logger.info("resumed from %s: step %d done", found, state.step)
    if manifest["world_size"] != workers.world_size:
        logger.info(
            "workers: %d when it was saved, %d now", manifest["world_size"], workers.world_size
        )
    return state


@contextlib.contextmanager
def node_folder(workers: Workers) -> Iterator[Path]:
    """A folder that the workers of a node have together; deleted at the end; collective."""
    name = workers.broadcast(f"raytune_llama-{uuid.uuid4().hex}")
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield folder
        workers.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shard_path(path: Place, name: str, entry: Mapping[str, Any], copies: Path) -> Path:
    """Return a local path to a shard: where it is, or of one in object storage a checked copy."""
    return local_copy(
        path / name, sha256=entry["sha256"], num_bytes=entry["bytes"], cache_dir=copies
    )


def _check_fit(path: Place, tensors: Mapping[str, Any], engine: Engine) -> None:
    """Refuse a checkpoint of other parameters than the engine's, by name or by shape."""
    # ZeRO 3 leaves the whole shape in an attribute.
    wanted = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in trained_parameters(engine.module)
    }
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


def _trusted(run_dir: Place, copies: Path, step: int | None) -> Place | None:
    if step is None:
        return _newest_trusted(run_dir, copies)
    path = checkpoint_path(run_dir, step)
    damage = check_checkpoint(path, copies)
    if damage is not None:
        raise CheckpointError(f"{damage}; set checkpoint.result=last to do without it")
    return path


def _newest_trusted(run_dir: Place, copies: Path) -> Place | None:
    """Return the newest checkpoint that can be trusted; None in a run that never saved one."""
    for path in reversed(list_checkpoints(run_dir)):
        problem = check_checkpoint(path, copies)
        if problem is None:
            return path
        aside = path.with_name(f"{path.name}{DAMAGED}")
        path.move(aside, first=MANIFEST)
        logger.warning("%s; it is now %s, the checkpoint before it is used", problem, aside.name)
    folders = (run_dir / "checkpoints").folders()
    damaged = [folder for folder in folders if folder.name.endswith(DAMAGED)]
    if damaged:
        # Starting over would throw a run away that a person can perhaps still mend.
        raise CheckpointError(
            f"{run_dir}: none of its {len(damaged)} checkpoints can be trusted, the newest is "
            f"{damaged[-1].name}; restore one from a backup under its own name, or delete them to "
            "start at step 0"
        )
    return None


def list_checkpoints(run_dir: Place) -> list[Place]:
    """Return the run's finished checkpoints, oldest first, trusted or not."""
    return [
        path
        for path in (run_dir / "checkpoints").folders()
        if _NAME.fullmatch(path.name) and is_published(path, MANIFEST)
    ]


def check_checkpoint(path: Place, copies: Path) -> str | None:
    """Return why a checkpoint cannot be trusted, or None: every file's size and hash is read.

    Args:
        path: The checkpoint.
        copies: Local folder for copies of its files, where it is in object storage.

    Raises:
        OSError: Object storage cannot be reached.
    """
    try:
        problem = _find_damage(path, copies)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        # A disk that cannot be read has lost the file; a server that does not answer has not.
        if not path.is_local and not isinstance(error, FileNotFoundError):
            raise
        problem = str(error)
    return f"checkpoint {path}: {problem}" if problem else None


def _find_damage(path: Place, copies: Path) -> str | None:
    manifest = (path / MANIFEST).read_json()
    if not isinstance(manifest, dict) or manifest.get(_DIGEST) != _digest(manifest):
        return f"the content of {MANIFEST} does not fit its hash"
    if manifest["format"] != FORMAT_VERSION:
        return f"format {manifest['format']}, wanted {FORMAT_VERSION}"
    for name, entry in manifest["files"].items():
        status = (path / name).status()
        if status is None:
            return f"{name} is missing"
        if status.num_bytes != entry["bytes"]:
            return f"{name} has {status.num_bytes} bytes, not {entry['bytes']}"
        if sha256_file(_shard_path(path, name, entry, copies)) != entry["sha256"]:
            return f"the content of {name} does not fit its hash"
    return None


def delete_old_checkpoints(
    run_dir: Place, config: CheckpointConfig, state: RunState, workers: Workers
) -> None:
    """Delete all but the newest `keep_last` checkpoints, the best one and that of `rollback_step`.

    The first worker does.

    What a killed process left of a checkpoint that it was writing goes too.
    """
    if not workers.is_first:
        return
    for path in (run_dir / "checkpoints").folders():
        is_half = _NAME.fullmatch(path.name) and not is_published(path, MANIFEST)
        if is_half or _UNFINISHED.fullmatch(path.name):
            path.delete()
            logger.info("checkpoint: %s, which was never finished, deleted", path.name)
    needed = {state.rollback_step} | ({state.best_step} if config.keep_best else set())
    kept = {checkpoint_path(run_dir, step) for step in needed if step is not None}
    for path in list_checkpoints(run_dir)[: -config.keep_last]:
        if path not in kept:
            path.delete()
            logger.info("checkpoint: %s deleted", path.name)
