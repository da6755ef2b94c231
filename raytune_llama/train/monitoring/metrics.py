"""Metric names, and the log that metrics are written to."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import Mirror

LOSS = "train/loss"
"""Mean loss per target token of the step, in nats, over all workers."""
LEARNING_RATE = "train/lr"
"""Learning rate of the step."""
GRAD_NORM = "train/grad_norm"
"""L2 norm of the gradient over all trained weights, before clipping."""
TOKENS_PER_SECOND = "train/tokens_per_second"
"""Target tokens per second, all workers together."""
MFU = "train/mfu"
"""Model FLOPs utilization: the share of the GPUs' peak FLOP/s that the model's arithmetic uses. A
frozen weight counts 4 FLOPs per token and a trained one 6, and attention is counted. Absent where
the peak of the device is unknown."""
TARGET_TOKENS = "train/target_tokens"
"""Tokens of the step that a loss was computed for."""
INPUT_TOKENS = "train/input_tokens"
"""Tokens of the step that the model read, without padding."""
FILLER_SEQUENCES = "train/filler_sequences"
"""Sequences without target tokens that completed the step's micro-batches, over all workers."""
SKIPPED_STEPS = "train/skipped_steps"
"""With fp16: steps so far whose update was skipped because the scaled gradient overflowed."""
LOSS_SCALE = "train/loss_scale"
"""With fp16: factor that the loss is multiplied by before the backward pass."""
BAD_STEPS = "train/bad_steps"
"""Once a run has had one: steps so far with a non-finite loss or gradient."""
UNDONE_STEPS = "train/undone_steps"
"""Once a run has had a bad step: good steps that rollbacks have undone."""
EVAL_LOSS = "eval/loss"
"""Mean loss per target token of the validation data, in nats; `eval/perplexity` is its exponential.
With several sources, each also has `eval/loss/NAME`."""
EVAL_BITS_PER_BYTE = "eval/bits_per_byte"
"""Bits per UTF-8 byte of the validation text, comparable between tokenizers; of text only. With
several sources, each also has `eval/bits_per_byte/NAME`."""
EVAL_TEXT_LOSS = "eval/text/loss"
"""As `eval/loss`, of the held-out `eval.texts`; likewise `eval/text/perplexity`, and
`eval/text/loss/NAME` per text if there are several."""
EVAL_TEXT_BITS_PER_BYTE = "eval/text/bits_per_byte"
"""As `eval/bits_per_byte`, of the held-out `eval.texts`. Tasks of `eval.tasks` have
`eval/NAME/accuracy`, and one per subject if there are several."""
STEP_SECONDS = "time/step_seconds"
"""Seconds that the step took, without evaluation and saving."""
DATA_SECONDS = "time/data_seconds"
"""Seconds of the step in which the first worker waited for its data."""
DATA_SHARE = "time/data_share"
"""`time/data_seconds` as a share of the step's time."""
EVAL_SECONDS = "time/eval_seconds"
"""Seconds that an evaluation took."""
CHECKPOINT_STALL_SECONDS = "time/checkpoint_stall_seconds"
"""Seconds that training paused for a checkpoint: for the copy of the state, which is then written
in the background."""
CHECKPOINT_WRITE_SECONDS = "time/checkpoint_write_seconds"
"""Seconds that writing a checkpoint took, while training continued."""
CHECKPOINT_FAILED = "checkpoint/failed"
"""1 for a checkpoint that could not be written."""
PEAK_MEMORY = "memory/peak_gib"
"""Peak memory of the first worker in GiB: of the GPU's allocator, or of the process on CPUs."""
RESTARTS = "run/restarts"
"""How often Ray has restarted the workers, recorded at each restart."""

METRICS_FILE = "metrics.jsonl"

_LOSSES = tuple(f"{name}/" for name in (EVAL_LOSS, EVAL_BITS_PER_BYTE, "eval/text"))
"""What the names of losses of single sources begin with; a source may be called accuracy."""


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


def run_label(run_dir: Place) -> str:
    """Return what names a run in the metrics that Ray exports: its directory, without options."""
    return str(Place(run_dir.scheme, run_dir.key))


def accuracy_name(benchmark: str) -> str:
    """Return the name of the metric of a benchmark of `eval.tasks`, its share of right answers."""
    return f"eval/{benchmark}/accuracy"


def evaluation_metrics(
    texts: Sequence[EvaluationResult], prefix: Literal["eval", "eval/text"] = "eval"
) -> dict[str, float]:
    """Return the metrics of an evaluation: over all sources and, if there are several, per source.

    The loss of a text without targets is NaN.

    Args:
        texts: results by source; without any, there are no metrics.
        prefix: what the names of the metrics begin with; `eval/text` for `eval.texts`.
    """
    if not texts:
        return {}
    sizes = [text.num_bytes for text in texts if text.num_bytes is not None]
    total = EvaluationResult(
        "",
        sum(text.loss_sum for text in texts),
        sum(text.num_targets for text in texts),
        sum(sizes) if len(sizes) == len(texts) else None,
    )
    values = {
        f"{prefix}/loss": _loss(total),
        f"{prefix}/perplexity": math.exp(min(_loss(total), 700.0)),
    }
    if total.num_bytes is not None:
        values[f"{prefix}/bits_per_byte"] = _bits_per_byte(total, total.num_bytes)
    for text in texts if len(texts) > 1 else ():
        values[f"{prefix}/loss/{text.name}"] = _loss(text)
        if text.num_bytes is not None:
            values[f"{prefix}/bits_per_byte/{text.name}"] = _bits_per_byte(text, text.num_bytes)
    return values


def describe_evaluation(values: Mapping[str, float]) -> str:
    """Return the metrics of an evaluation in words, for a log line."""
    parts: list[str] = []
    if EVAL_LOSS in values:
        bits = values.get(EVAL_BITS_PER_BYTE)
        loss = f"loss {values[EVAL_LOSS]:.4f}"
        parts.append(loss if bits is None else f"{loss}, {bits:.4f} bits per byte")
        name = EVAL_LOSS if bits is None else EVAL_BITS_PER_BYTE
        parts[-1] += _describe_sources(values, name)
    if EVAL_TEXT_BITS_PER_BYTE in values:
        text = f"text {values[EVAL_TEXT_BITS_PER_BYTE]:.4f} bits per byte"
        parts.append(text + _describe_sources(values, EVAL_TEXT_BITS_PER_BYTE))
    parts += [
        f"{name.removeprefix('eval/').removesuffix('/accuracy')} accuracy {value:.4f}"
        for name, value in values.items()
        if is_accuracy(name)
    ]
    return "; ".join(parts)


def is_accuracy(name: str) -> bool:
    """Whether a metric is `accuracy_name` of a benchmark, over all its subjects."""
    return name.startswith("eval/") and name.endswith("/accuracy") and not name.startswith(_LOSSES)


def _describe_sources(values: Mapping[str, float], name: str) -> str:
    return "".join(
        f", {source.removeprefix(f'{name}/')} {value:.4f}"
        for source, value in values.items()
        if source.startswith(f"{name}/")
    )


class MetricChange(NamedTuple):
    """A metric of evaluations; a value that is not finite is NaN."""

    before: float | None
    """Value before the first step; None if it was not evaluated then."""

    after: float | None
    """Value at a later evaluation; None if it was not evaluated."""


def read_change(records: Iterable[Mapping[str, Any]], name: str, last_step: int) -> MetricChange:
    """Return a metric before the first step, and at the last evaluation up to a step.

    Args:
        records: metric records of a run, in order.
        name: name of the metric.
        last_step: step whose weights are described; later evaluations do not count.
    """
    found = {
        record["step"]: math.nan if record[name] is None else record[name]
        for record in records
        if name in record and record["step"] <= last_step
    }
    return MetricChange(found.get(0), list(found.values())[-1] if found else None)


def describe_text_change(before: float | None, after: float) -> str:
    """Return how tuning has changed `eval.texts`, in words.

    Args:
        before: bits per byte before the first step; None if they were not evaluated then.
        after: bits per byte at a later evaluation.
    """
    if before is None:
        return f"text {after:.4f} bits per byte"
    old, new = f"{before:.4f}", f"{after:.4f}"
    verdict = "the same as" if old == new else "better than" if after < before else "worse than"
    return f"text {old} -> {new} bits per byte: {verdict} before tuning"


def _loss(text: EvaluationResult) -> float:
    return text.loss_sum / text.num_targets if text.num_targets else math.nan


def _bits_per_byte(text: EvaluationResult, num_bytes: float) -> float:
    return text.loss_sum / math.log(2) / num_bytes if text.num_targets else math.nan


def describe_accuracy_change(name: str, before: float | None, after: float | None) -> str:
    """Return how tuning has changed the accuracy of a benchmark, in words.

    Args:
        name: name of the metric.
        before: share of right answers before the first step; None if they were not asked for then.
        after: share of right answers at a later evaluation; None if there is none.
    """
    benchmark = name.removeprefix("eval/").removesuffix("/accuracy")
    known = [f"{value:.4f}" for value in (before, after) if value is not None]
    return f"{benchmark} accuracy {' -> '.join(known)}"


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
