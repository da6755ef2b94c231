"""Checkpoints of a run: whole tensors by parameter name, whatever the workers and the ZeRO stage.

A checkpoint is a directory `step-00000100/` with safetensors shards, each holding `weight`,
`exp_avg` and `exp_avg_sq` of some parameters, and a `manifest.json`, which lists every tensor and
the SHA256 of every shard and of itself, and carries the rest of the state as JSON. Nothing is
pickled. It is built under another name and renamed, so it is there whole or not at all; and since
a disk can still lose bits, a reader trusts only hashes that fit.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raytune_llama.config import settings
from raytune_llama.files import publish_directory, read_json, sha256_file, write_json_atomic
from raytune_llama.train.engine import Engine, ParameterState, trained_parameters
from raytune_llama.train.workers import Workers

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

    seconds: float = 0.0
    """Time spent training, evaluating and saving, over all starts of the run."""

    best_step: int | None = None
    """Step with the lowest evaluation loss so far."""

    best_loss: float | None = None
    """That loss, in nats a token."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run_dir: Path, state: RunState, engine: Engine, workers: Workers) -> None:
    """Write the checkpoint of `state.step`; collective, the first worker writes.

    A checkpoint of this step that is there already is kept: equal steps of a run are equal.
    """
    target = checkpoint_path(run_dir, state.step)
    if workers.broadcast(target.exists()):
        return
    scalars = engine.scalar_state()
    if not workers.is_first:
        for _ in engine.trainable_state():
            pass
        return
    with publish_directory(target) as folder:
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


def restore(run_dir: Path, engine: Engine, workers: Workers) -> RunState:
    """Load the newest checkpoint that can be trusted, or start at step 0; collective.

    A checkpoint that cannot be trusted is named in the log and renamed out of the way, so that
    the run can save that step again.

    Raises:
        CheckpointError: the newest trusted checkpoint does not fit the model, or there are
            checkpoints and none can be trusted.
    """
    # An error of the first worker ends the others too: they fail in the broadcast.
    found = workers.broadcast(_newest_trusted(run_dir) if workers.is_first else None)
    if found is None:
        return RunState()
    manifest = read_json(found / MANIFEST)
    _check_fit(found, manifest["tensors"], engine)

    def read(name: str) -> ParameterState:
        with safe_open(found / manifest["tensors"][name]["file"], framework="pt") as file:
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


def _check_fit(path: Path, tensors: Mapping[str, Any], engine: Engine) -> None:
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


def _newest_trusted(run_dir: Path) -> Path | None:
    """Return the newest checkpoint that can be trusted; None in a run that never saved one."""
    for path in reversed(list_checkpoints(run_dir)):
        problem = check_checkpoint(path)
        if problem is None:
            return path
        aside = path.with_name(f"{path.name}{DAMAGED}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("%s; it is now %s, the checkpoint before it is used", problem, aside.name)
    damaged = sorted((run_dir / "checkpoints").glob(f"*{DAMAGED}"))
    if damaged:
        # Starting over would throw a run away that a person can perhaps still mend.
        raise CheckpointError(
            f"{run_dir}: none of its {len(damaged)} checkpoints can be trusted, the newest is "
            f"{damaged[-1].name}; restore one from a backup under its own name, or delete them to "
            "start at step 0"
        )
    return None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's checkpoint directories, oldest first, trusted or not."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def check_checkpoint(path: Path) -> str | None:
    """Return why a checkpoint cannot be trusted, or None: every file's size and hash is read."""
    try:
        problem = _find_damage(path)
    except (OSError, ValueError) as error:
        problem = str(error)
    return f"checkpoint {path}: {problem}" if problem else None


def _find_damage(path: Path) -> str | None:
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get(_DIGEST) != _digest(manifest):
        return f"the content of {MANIFEST} does not fit its hash"
    if manifest["format"] != FORMAT_VERSION:
        return f"format {manifest['format']}, wanted {FORMAT_VERSION}"
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if sha256_file(file) != entry["sha256"]:
            return f"the content of {name} does not fit its hash"
    return None


def delete_old_checkpoints(
    run_dir: Path, config: CheckpointConfig, state: RunState, workers: Workers
) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one; the first worker does.

    What a killed process left of a checkpoint that it was writing goes too.
    """
    if not workers.is_first:
        return
    for path in (run_dir / "checkpoints").iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)
            logger.info("checkpoint: %s, which was never finished, deleted", path.name)
    best = checkpoint_path(run_dir, state.best_step) if state.best_step is not None else None
    for path in list_checkpoints(run_dir)[: -config.keep_last]:
        if not (config.keep_best and path == best):
            shutil.rmtree(path)
            logger.info("checkpoint: %s deleted", path.name)
