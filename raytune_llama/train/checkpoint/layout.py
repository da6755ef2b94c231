"""Checkpoints of a run: parameters in slices by name, whatever the workers and the strategy.

A checkpoint is a directory `step-00000100/` with safetensors files and a `manifest.json`. Each
worker has written what it holds: `weight`, `exp_avg` and `exp_avg_sq` of stretches of parameters,
in the flat order of the whole tensor. The manifest tells of every parameter its shape and in which
files its stretches lie, which together are the whole; it has the size and the SHA256 of every file
and of itself, and the rest of the state as JSON. Nothing is pickled.

Its files are written under another name (`unfinished_place`), which is then changed: so it is there
whole or not at all. In object storage, which has no rename, it is there once its manifest is, which
is uploaded last. Since bits can still be lost, a reader trusts only hashes that fit.

Here is what it is, how it is found, checked and deleted; `saver.py` writes it, `restore.py`
reads it, and `shards.py` knows the files that a worker writes.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, settings
from raytune_llama.storage.files import sha256_file
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import is_published, local_copy

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT_VERSION = 2
CHECKPOINT_MANIFEST = "manifest.json"
DAMAGED_SUFFIX = ".damaged"

_NAME = re.compile(r"step-\d{8}")
_UNFINISHED = re.compile(r"\.step-\d{8}\..*\.tmp")
_DIGEST = "sha256"


class CheckpointError(UserError):
    """A checkpoint that cannot be trusted, does not fit the run, or could not be written."""


@settings
class CheckpointConfig:
    """When a run is saved, and what is kept."""

    every_steps: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between checkpoints. One more is written at the end and on SIGTERM."""

    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints kept."""

    background: bool = True
    """Training goes on from a copy of the state in host memory while it is written; false: training
    stands still until it is, without a copy."""

    max_failed_saves: Annotated[int, Field(ge=1)] = 3
    """The run ends after so many checkpoints in a row that could not be written, on a full disk
    say; the next due step tries again. At the end of the run the last one must be written."""

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
    was stopped goes back to where one that was not does. If it could not be written, the newest
    before it takes its place."""

    seconds: float = 0.0
    """Time spent training, evaluating and saving, over all starts of the run."""

    best_step: int | None = None
    """Step with the lowest evaluation loss so far."""

    best_loss: float | None = None
    """That loss, in nats a token."""


@dataclass(frozen=True)
class SaveResult:
    """What became of one checkpoint."""

    step: int
    """Whose state it has."""

    stall_seconds: float
    """How long training stood still for it."""

    write_seconds: float
    """From its beginning until it was there for readers; 0 where it is not."""

    problem: str | None
    """Why it is not there; None where it is."""


def checkpoint_path(run_dir: Place, step: int) -> Place:
    """Return where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def unfinished_place(run_dir: Place, step: int, attempt: str) -> Place:
    """Return where the files of a checkpoint are written; in object storage, where they will be.

    Args:
        run_dir: of the run.
        step: of the checkpoint.
        attempt: names this saving of it; its files have it in their names.
    """
    target = checkpoint_path(run_dir, step)
    return target.with_name(f".{target.name}.{attempt}.tmp") if run_dir.is_local else target


def seal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with its format and with a hash of all of it."""
    content = {"format": CHECKPOINT_FORMAT_VERSION, **manifest}
    return {**content, _DIGEST: _digest(content)}


def _digest(manifest: Mapping[str, Any]) -> str:
    """Hash all of a manifest but its own hash."""
    content = {key: value for key, value in manifest.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def list_checkpoints(run_dir: Place) -> list[Place]:
    """Return the run's finished checkpoints, oldest first, trusted or not."""
    return [
        path
        for path in (run_dir / "checkpoints").folders()
        if _NAME.fullmatch(path.name) and is_published(path, CHECKPOINT_MANIFEST)
    ]


def check_checkpoint(
    path: Place, copies: Path, *, share: int = 0, num_shares: int = 1
) -> str | None:
    """Return why a checkpoint cannot be trusted, or None: sizes and hashes of files are compared.

    Args:
        path: The checkpoint.
        copies: Local folder for copies of its files, where it is in object storage.
        share: Which of its files to read, from 0; the manifest is always read.
        num_shares: Into how many shares its files are dealt out; 1: read all of them.

    Raises:
        OSError: Object storage cannot be reached.
    """
    try:
        problem = _find_damage(path, copies, share, num_shares)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        # A disk that cannot be read has lost the file; a server that does not answer has not.
        if not path.is_local and not isinstance(error, FileNotFoundError):
            raise
        problem = str(error)
    return f"checkpoint {path}: {problem}" if problem else None


def _find_damage(path: Place, copies: Path, share: int, num_shares: int) -> str | None:
    manifest = (path / CHECKPOINT_MANIFEST).read_json()
    if not isinstance(manifest, dict) or manifest.get(_DIGEST) != _digest(manifest):
        return f"the content of {CHECKPOINT_MANIFEST} does not fit its hash"
    if manifest["format"] != CHECKPOINT_FORMAT_VERSION:
        return f"format {manifest['format']}, wanted {CHECKPOINT_FORMAT_VERSION}"
    for name, entry in sorted(manifest["files"].items())[share::num_shares]:
        status = (path / name).status()
        if status is None:
            return f"{name} is missing"
        if status.num_bytes != entry["bytes"]:
            return f"{name} has {status.num_bytes} bytes, not {entry['bytes']}"
        if sha256_file(local_file_path(path, name, entry, copies)) != entry["sha256"]:
            return f"the content of {name} does not fit its hash"
    return None


def local_file_path(path: Place, name: str, entry: Mapping[str, Any], copies: Path) -> Path:
    """Return a local path to a checkpoint's file: where it is, or of object storage a checked copy.

    Args:
        path: The checkpoint.
        name: Of the file.
        entry: The manifest's entry of the file.
        copies: Local folder for copies.
    """
    return local_copy(
        path / name, sha256=entry["sha256"], num_bytes=entry["bytes"], cache_dir=copies
    )


def mark_damaged(path: Place) -> Place:
    """Rename a damaged checkpoint, so that the run can save that step again."""
    aside = path.with_name(f"{path.name}{DAMAGED_SUFFIX}")
    path.move(aside, first=CHECKPOINT_MANIFEST)
    return aside


def delete_old_checkpoints(run_dir: Place, config: CheckpointConfig, state: RunState) -> None:
    """Delete all but the newest `keep_last`, the best one and that where a bad step goes back to.

    That is the one of `rollback_step`, or where it could not be written the newest before it.

    Args:
        run_dir: of the run.
        config: says what is kept.
        state: of the newest checkpoint, which is there.
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
            logger.info("checkpoint: %s deleted", path.name)


def delete_unfinished(run_dir: Place) -> None:
    """Delete what is left of checkpoints whose writing has failed or was killed."""
    for path in (run_dir / "checkpoints").folders():
        is_half = _NAME.fullmatch(path.name) and not is_published(path, CHECKPOINT_MANIFEST)
        if is_half or _UNFINISHED.fullmatch(path.name):
            path.delete()
            logger.info("checkpoint: %s, which was never finished, deleted", path.name)
