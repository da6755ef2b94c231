"""Checkpoint format: slices of parameters by name, independent of world size and strategy.

A checkpoint is a directory `step-00000100/` with safetensors files and a `manifest.json`. Each
worker writes what it holds: `weight`, `exp_avg` and `exp_avg_sq` of slices of parameters, in the
order of the flattened full tensor. The manifest lists the shape of every parameter and the files
of its slices, which together cover it; the size and hash of every file; a hash of itself; and the
rest of the state as JSON. Nothing is pickled.

A checkpoint is written under a temporary name (`unfinished_place`) and then renamed, so it exists
completely or not at all. Object storage has no rename: there it exists once its manifest does,
which is uploaded last. Since bits can still be lost, a reader trusts only matching hashes.

This module defines the format and lists, checks and deletes checkpoints; `saver.py` writes them,
`restore.py` loads them, and `shards.py` handles the files of one worker.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raytune_llama.config.errors import UserError
from raytune_llama.storage.hashes import HASH_KEYS, find_hash, hash_bytes, hash_file
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import is_published, local_copy
from raytune_llama.train.checkpoint.config import CheckpointConfig

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT_VERSION = 3
CHECKPOINT_MANIFEST = "manifest.json"
DAMAGED_SUFFIX = ".damaged"

CHECKPOINT_NAME = re.compile(r"step-\d{8}")
"""Name of the directory of a checkpoint."""

_UNFINISHED = re.compile(r"\.step-\d{8}\..*\.tmp")
_SHA256_VERSION = 2
"""Version that is read as well; it has SHA-256 hashes, under the key `sha256`."""


class CheckpointError(UserError):
    """A checkpoint is damaged, does not match the run, or could not be written."""


@dataclass(frozen=True)
class RunState:
    """State of a run other than tensors."""

    step: int = 0
    """Number of optimizer steps done; it alone determines the next step's batch."""

    tokens: int = 0
    """Number of target tokens trained on."""

    source_sequences: list[int] = field(default_factory=list)
    """Number of sequences trained on, per source that has any; empty before the first step."""

    source_targets: list[int] = field(default_factory=list)
    """Number of target tokens trained on, per source as above; their sum is `tokens`."""

    num_skipped_steps: int = 0
    """Number of steps skipped because half-precision gradients overflowed."""

    num_bad_steps: int = 0
    """Number of steps skipped because the loss or gradient was not finite (bad steps)."""

    num_bad_in_row: int = 0
    """Number of bad steps since the last applied step."""

    num_undone_steps: int = 0
    """Number of good steps undone by rollbacks. What they read stays in the counts here, and is not
    read again."""

    rollback_step: int | None = None
    """Step of the checkpoint that a bad step may roll back to: the newest not saved at a stop, so
    that a stopped run rolls back as an uninterrupted one does. If it could not be written, the
    newest before it takes its place."""

    seconds: float = 0.0
    """Seconds spent training, evaluating and saving, over all starts of the run."""

    best_step: int | None = None
    """Step with the lowest evaluation loss so far; None before the first evaluation."""

    best_loss: float | None = None
    """Evaluation loss of `best_step`, in nats per token."""

    @property
    def num_kept_steps(self) -> int:
        """Number of steps whose updates are in the weights: neither skipped, bad nor undone."""
        return self.step - self.num_skipped_steps - self.num_bad_steps - self.num_undone_steps

    def with_loss(self, loss: float | None) -> "RunState":
        """Return the state after an evaluation, with this step as the best if its loss is.

        Args:
            loss: evaluation loss; not finite, or None without validation text: never the best.
        """
        if loss is None or not math.isfinite(loss):
            return self
        is_best = self.best_loss is None or loss < self.best_loss
        return replace(self, best_step=self.step, best_loss=loss) if is_best else self


@dataclass(frozen=True)
class SaveResult:
    """Outcome of saving one checkpoint."""

    step: int
    """Optimizer step of the checkpoint."""

    stall_seconds: float
    """Seconds that training waited for the save."""

    write_seconds: float
    """Seconds from the start of the save until it was published; 0 if it failed."""

    problem: str | None
    """Why the save failed; None if it succeeded."""


def checkpoint_path(run_dir: Place, step: int) -> Place:
    """Return the directory of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def unfinished_place(run_dir: Place, step: int, attempt: str) -> Place:
    """Return where a checkpoint's files are written: in object storage, its final place.

    Args:
        run_dir: directory of the run.
        step: optimizer step of the checkpoint.
        attempt: id of this save, which is part of the names of its files.
    """
    target = checkpoint_path(run_dir, step)
    return target.with_name(f".{target.name}.{attempt}.tmp") if run_dir.is_local else target


def seal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with its format version and a hash of its content."""
    content = {"format": CHECKPOINT_FORMAT_VERSION, **manifest}
    return {**content, "hash": _hash_manifest(content)}


def _hash_manifest(manifest: Mapping[str, Any], like: str | None = None) -> str:
    """Return the hash of a manifest without its own hash."""
    content = {key: value for key, value in manifest.items() if key not in HASH_KEYS}
    return hash_bytes(json.dumps(content, sort_keys=True).encode(), like)


def list_checkpoints(run_dir: Place) -> list[Place]:
    """Return the run's finished checkpoints, oldest first, intact or not."""
    return [
        path
        for path in (run_dir / "checkpoints").folders()
        if CHECKPOINT_NAME.fullmatch(path.name) and is_published(path, CHECKPOINT_MANIFEST)
    ]


def newest_checkpoint_step(run_dir: Place) -> int:
    """Return the step of the run's newest checkpoint, intact or not; 0 if there is none."""
    paths = list_checkpoints(run_dir)
    return int(paths[-1].name.rpartition("-")[2]) if paths else 0


def check_checkpoint(
    path: Place, copies: Path, *, share: int = 0, num_shares: int = 1
) -> str | None:
    """Check the sizes and hashes of a checkpoint's files; return what is wrong, or None.

    Args:
        path: The checkpoint.
        copies: Local folder for copies of its files, if it is in object storage.
        share: Index of the share of its files to read, from 0; the manifest is always read.
        num_shares: Number of shares that its files are divided into; 1: read all of them.

    Raises:
        OSError: Object storage cannot be reached.
    """
    try:
        problem = _find_damage(path, copies, share, num_shares)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        # A read error of a disk means that the file is lost; an unreachable server does not.
        if not path.is_local and not isinstance(error, FileNotFoundError):
            raise
        problem = str(error)
    return f"checkpoint {path}: {problem}" if problem else None


def _find_damage(path: Place, copies: Path, share: int, num_shares: int) -> str | None:
    manifest = (path / CHECKPOINT_MANIFEST).read_json()
    wanted = find_hash(manifest) if isinstance(manifest, dict) else None
    if wanted is None or _hash_manifest(manifest, like=wanted) != wanted:
        return f"the content of {CHECKPOINT_MANIFEST} does not match its recorded hash"
    if manifest["format"] not in (_SHA256_VERSION, CHECKPOINT_FORMAT_VERSION):
        return f"format {manifest['format']}, wanted {CHECKPOINT_FORMAT_VERSION}"
    for name, entry in sorted(manifest["files"].items())[share::num_shares]:
        status = (path / name).status()
        if status is None:
            return f"{name} is missing"
        if status.num_bytes != entry["bytes"]:
            return f"{name} has {status.num_bytes} bytes, not {entry['bytes']}"
        wanted = _entry_hash(entry)
        if hash_file(local_file_path(path, name, entry, copies), like=wanted) != wanted:
            return f"the content of {name} does not match its recorded hash"
    return None


def local_file_path(path: Place, name: str, entry: Mapping[str, Any], copies: Path) -> Path:
    """Return a local path to a checkpoint's file: its own, or a verified copy from object storage.

    Args:
        path: The checkpoint.
        name: Name of the file.
        entry: The manifest's entry of the file.
        copies: Local folder for copies.
    """
    wanted = _entry_hash(entry)
    return local_copy(path / name, wanted=wanted, num_bytes=entry["bytes"], cache_dir=copies)


def _entry_hash(entry: Mapping[str, Any]) -> str:
    found = find_hash(entry)
    assert found is not None, "the manifest's own hash covers its entries"
    return found


def mark_damaged(path: Place) -> Place:
    """Rename a damaged checkpoint, so that the run can save that step again; return its place."""
    aside = path.with_name(f"{path.name}{DAMAGED_SUFFIX}")
    path.move(aside, first=CHECKPOINT_MANIFEST)
    return aside


def delete_old_checkpoints(run_dir: Place, config: CheckpointConfig, state: RunState) -> None:
    """Delete all checkpoints but the newest `keep_last`, the best one and the rollback target.

    The target is that of `rollback_step` or, if it could not be written, the newest before it.

    Args:
        run_dir: directory of the run.
        config: which checkpoints to keep.
        state: state of the newest checkpoint, which must exist.
    """
    paths = list_checkpoints(run_dir)
    kept = set(paths[-config.keep_last :])
    if config.keep_best and state.best_step is not None:
        kept.add(checkpoint_path(run_dir, state.best_step))
    if state.rollback_step is not None:
        target = checkpoint_path(run_dir, state.rollback_step).name
        kept.update([path for path in paths if path.name <= target][-1:])
    for path in paths:
        if path not in kept:
            path.delete()
            logger.info("deleted old checkpoint %s", path.name)


def delete_unfinished(run_dir: Place) -> None:
    """Delete the remains of checkpoints whose write failed or was killed."""
    for path in (run_dir / "checkpoints").folders():
        is_half = CHECKPOINT_NAME.fullmatch(path.name) and not is_published(
            path, CHECKPOINT_MANIFEST
        )
        if is_half or _UNFINISHED.fullmatch(path.name):
            path.delete()
            logger.info("deleted unfinished checkpoint %s", path.name)
