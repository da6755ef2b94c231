"""What is known of a directory that a job wrote: its kind, state, losses, and links to others."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from raytune_llama.runs.tree import Folder
from raytune_llama.storage.place import Place

Kind = Literal[
    "pretrain",
    "sft",
    "sweep",
    "merge",
    "vocabulary",
    "model",
    "adapter",
    "store",
    "evaluation",
    "answers",
    "instructions",
    "job",
]
"""What a directory holds. Model: weights of full training or a conversion. Answers: batch
inference. Instructions: rows of `make-data`. Job: a driver has only claimed the directory yet."""

State = Literal["running", "finished", "evaluated", "stopped", "interrupted", "failed", "damaged"]
"""State of a directory. Evaluated: a run with `max_steps: 0`. Stopped: a trial, by its sweep's
scheduler. Interrupted: its driver has ended or was killed, and the same command resumes it."""

RUN_KINDS: Final = ("pretrain", "sft")
"""Kinds with a config, checkpoints and a loss."""

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pth", ".gguf")
"""Endings of files that hold weights; equal settings give equal hashes of other files."""


@dataclass(frozen=True)
class Links:
    """Hashes and places by which entries refer to each other."""

    offers: frozenset[str] = frozenset()
    """Hashes of what the entry holds: weights of its result, or the fingerprint of its store."""

    uses: Mapping[str, str] = field(default_factory=dict)
    """What it was made from: hash to what that is, such as `adapter`."""

    places: Mapping[Place, str] = field(default_factory=dict)
    """Places that its config names, to what they are; they may hold something else by now."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run."""

    folder: Folder
    """Its folder."""

    step: int
    """Optimizer step."""

    is_newest: bool = False
    """Whether a run would resume from it."""

    is_best: bool = False
    """Whether it has the lowest evaluation loss of the run so far."""


@dataclass(frozen=True)
class Entry:
    """A directory that a job wrote."""

    folder: Folder
    """Its files."""

    kind: Kind
    """What it holds."""

    state: State
    """State, as its files and its lease show it."""

    note: str = ""
    """What a person should know besides: why it failed, from where it resumes, what is damaged."""

    step: int | None = None
    """Optimizer steps done, or trials of a sweep that have ended; None: it has no steps."""

    num_steps: int | None = None
    """Optimizer steps or trials in all; None: unknown, as with `num_epochs` before the end."""

    train_loss: float | None = None
    """Loss of the newest step, in nats per token."""

    eval_loss: float | None = None
    """Newest loss on validation data, in nats per token; of a sweep, its best metric."""

    trained: str | None = None
    """What is trained, such as `lora r8`."""

    model: str | None = None
    """Name of the base model."""

    checkpoints: tuple[Checkpoint, ...] = ()
    """Complete checkpoints, oldest first."""

    links: Links = Links()
    """What refers to what."""

    is_trial: bool = False
    """Whether it is a trial of a sweep."""

    @property
    def place(self) -> Place:
        """Where it is."""
        return self.folder.place

    @property
    def is_resumable(self) -> bool:
        """Whether a driver runs it, or the same command would continue it."""
        # A trial that has failed has ended for its sweep.
        return self.state in ("running", "interrupted") or (
            self.state == "failed" and not self.is_trial
        )

    @property
    def age_seconds(self) -> float | None:
        """Seconds since its newest write; None if it is empty."""
        return None if self.folder.modified is None else time.time() - self.folder.modified

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data, for programs."""
        modified = self.folder.modified
        return {
            "place": str(self.place),
            "kind": self.kind,
            "state": self.state,
            "note": self.note,
            "step": self.step,
            "num_steps": self.num_steps,
            "train_loss": _finite(self.train_loss),
            "eval_loss": _finite(self.eval_loss),
            "trained": self.trained,
            "model": self.model,
            "checkpoint_steps": [checkpoint.step for checkpoint in self.checkpoints],
            "is_trial": self.is_trial,
            "bytes": self.folder.num_bytes,
            "modified": None
            if modified is None
            else datetime.fromtimestamp(modified, UTC).isoformat(timespec="seconds"),
        }


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can hold: None for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None
