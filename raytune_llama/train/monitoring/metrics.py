"""Metric names, and the log that metrics are written to."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import Mirror

LOSS = "train/loss"
LEARNING_RATE = "train/lr"
GRAD_NORM = "train/grad_norm"
TOKENS_PER_SECOND = "train/tokens_per_second"
MFU = "train/mfu"
TARGET_TOKENS = "train/target_tokens"
INPUT_TOKENS = "train/input_tokens"
FILLER_SEQUENCES = "train/filler_sequences"
SKIPPED_STEPS = "train/skipped_steps"
LOSS_SCALE = "train/loss_scale"
# Once a run has had a bad step (non-finite loss or gradient): bad steps, and undone good steps.
BAD_STEPS = "train/bad_steps"
UNDONE_STEPS = "train/undone_steps"
# With several sources, each also has `eval/loss/<name>` and `eval/bits_per_byte/<name>`.
EVAL_LOSS = "eval/loss"
EVAL_PERPLEXITY = "eval/perplexity"
EVAL_BITS_PER_BYTE = "eval/bits_per_byte"
STEP_SECONDS = "time/step_seconds"
DATA_SECONDS = "time/data_seconds"
DATA_SHARE = "time/data_share"
EVAL_SECONDS = "time/eval_seconds"
# Training waits for the copy of the state, which is then written in the background.
CHECKPOINT_STALL_SECONDS = "time/checkpoint_stall_seconds"
CHECKPOINT_WRITE_SECONDS = "time/checkpoint_write_seconds"
CHECKPOINT_FAILED = "checkpoint/failed"
PEAK_MEMORY = "memory/peak_gib"
RESTARTS = "run/restarts"

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class EvaluationResult:
    """Result of an evaluation on the text of one source."""

    name: str
    """Name of the source."""

    loss_sum: float
    """Summed loss of the target tokens, in nats."""

    num_targets: int
    """Number of target tokens."""

    num_bytes: float | None
    """Number of bytes of text in the evaluated sequences; None if not every token is a target, as
    with conversations."""


def evaluation_metrics(texts: Sequence[EvaluationResult]) -> dict[str, float]:
    """Return the metrics of an evaluation: over all sources and, if there are several, per source.

    The loss of a text without targets is NaN.
    """
    sizes = [text.num_bytes for text in texts if text.num_bytes is not None]
    total = EvaluationResult(
        "",
        sum(text.loss_sum for text in texts),
        sum(text.num_targets for text in texts),
        sum(sizes) if len(sizes) == len(texts) else None,
    )
    values = {EVAL_LOSS: _loss(total), EVAL_PERPLEXITY: math.exp(min(_loss(total), 700.0))}
    if total.num_bytes is not None:
        values[EVAL_BITS_PER_BYTE] = _bits_per_byte(total, total.num_bytes)
    for text in texts if len(texts) > 1 else ():
        values[f"{EVAL_LOSS}/{text.name}"] = _loss(text)
        if text.num_bytes is not None:
            values[f"{EVAL_BITS_PER_BYTE}/{text.name}"] = _bits_per_byte(text, text.num_bytes)
    return values


def _loss(text: EvaluationResult) -> float:
    return text.loss_sum / text.num_targets if text.num_targets else math.nan


def _bits_per_byte(text: EvaluationResult, num_bytes: float) -> float:
    return text.loss_sum / math.log(2) / num_bytes if text.num_targets else math.nan


class MetricsLog:
    """Appends records to `metrics.jsonl` and TensorBoard; each has a `step` and numbers.

    In object storage, which cannot append, they appear at each `sync`.
    """

    def __init__(self, run_dir: Place, *, resumed_step: int, tensorboard: bool) -> None:
        self._mirror = Mirror(run_dir)
        # Steps after the checkpoint run again: drop their records.
        kept = (
            [r for r in read_metrics(run_dir) if r["step"] <= resumed_step] if resumed_step else []
        )
        file = Place.local(self._mirror.folder / METRICS_FILE)
        file.write_bytes("".join(map(record_line, kept)).encode())
        self._file = file.path.open("a")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # A run that starts over evaluates at step 0 again.
            purge_step = resumed_step + 1 if resumed_step else 0
            self._writer = SummaryWriter(
                str(self._mirror.folder / "tensorboard"), purge_step=purge_step
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record; a non-finite value is written as null."""
        finite = {name: v if abs(v) < float("inf") else None for name, v in values.items()}
        self._file.write(record_line({"step": step, **finite}))
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Flush all records so far to the run directory."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()
        self._mirror.push()

    def close(self) -> None:
        """Flush everything to the run directory and close."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def record_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_metrics(run_dir: Place) -> list[dict[str, float]]:
    """Return a run's metric records in order; see `read_records`."""
    return read_records(run_dir / METRICS_FILE)


def read_records(file: Place) -> list[dict[str, Any]]:
    """Return the records of a JSON Lines file; a last line cut off by a crash is dropped."""
    if file.status() is None:
        return []
    lines = file.read_bytes().decode().split("\n")
    # Only a line that ends with a line break was fully written.
    return [json.loads(line) for line in lines[:-1] if line]
