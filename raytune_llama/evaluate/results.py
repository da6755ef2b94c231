"""Results of an evaluation: models side by side, as `results.json` and `samples.jsonl` hold them.

    results = build_results(config, outcomes)
    write_results(results, outcomes, target)

The first model is the base that the others are compared with.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import stdev
from typing import Any

import pydantic

import raytune_llama
from raytune_llama.config.settings import to_dict
from raytune_llama.evaluate.tasks.outcome import (
    Metric,
    Sample,
    TaskOutcome,
    TaskSummary,
    build_submission,
)
from raytune_llama.storage.files import read_json, write_bytes_atomic, write_json_atomic

RESULTS_FILE = "results.json"
"""Scores of all models, in the directory of an evaluation."""
SAMPLES_FILE = "samples.jsonl"
"""One line per model and question, in the same directory."""
SUBMISSION_FILE = "submission.json"
"""Answers to questions without known right answers, as C-Eval takes them. With several models, the
files of all but the first are named `submission-MODEL.json`."""

MAIN_METRICS = ("acc", "exact_match", "f1")
"""Metrics by which tasks are compared: the first one that a task has."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, and what proves which one it is."""

    name: str
    """Unique name in tables, such as `base` or the name of an adapter."""
    source: str
    """Where it is: a model directory, `BASE + ADAPTER`, or the URL and model of an endpoint."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Hash of each part by what it is: `weights`, `tokenizer`, `template`, `adapter NAME`."""


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts one text source."""

    name: str
    """Name of the source."""
    bits_per_byte: float
    """Bits per UTF-8 byte of text; comparable between tokenizers."""
    perplexity: float
    """Exponential of the mean loss per token; comparable for one tokenizer only."""
    num_tokens: int
    """Number of predicted tokens."""
    num_bytes: int
    """Number of UTF-8 bytes of their text."""
    hash: str | None = None
    """Hash of the token store or the files."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """One answer to read."""

    prompt: str
    """Prompt, or the last user message."""
    answer: str
    """What the model wrote."""
    finish_reason: str = "stop"
    """`stop`, or `length` if it was cut at the maximum number of tokens."""


@dataclass(frozen=True)
class ModelOutcome:
    """All that one model yielded."""

    model: EvaluatedModel
    """The model."""
    tasks: tuple[TaskOutcome, ...] = ()
    """Outcomes of its tasks, with samples."""
    texts: tuple[TextScore, ...] = ()
    """Scores on texts."""
    answers: tuple[GeneratedAnswer, ...] = ()
    """Answers to read, in the order of the prompts."""


@dataclass(frozen=True)
class TaskScore(TaskSummary):
    """Scores of one model on one task, compared with the base."""

    differences: dict[str, Metric]
    """Differences to the base by name; their standard errors are those of the differences of single
    questions, as both models were asked the same. Empty for the base."""


@dataclass(frozen=True)
class GroupScore:
    """Average of one metric over the subjects of a group, or over a whole benchmark."""

    benchmark: str
    """Benchmark."""
    group: str | None
    """Group of subjects; None: all of them."""
    metric: str
    """Name of the metric."""
    num_tasks: int
    """Number of subjects."""
    num_questions: int
    """Number of questions of all of them."""
    by_questions: Metric
    """Average in which each question counts the same."""
    by_subjects: Metric
    """Average in which each subject counts the same, as C-Eval and CMMLU report it."""
    difference: Metric | None = None
    """Difference of `by_questions` to the base; None: this is the base."""


@dataclass(frozen=True)
class ModelResults:
    """Scores of one model."""

    model: EvaluatedModel
    """The model."""
    tasks: tuple[TaskScore, ...]
    """Its tasks."""
    groups: tuple[GroupScore, ...]
    """Averages of benchmarks with several subjects: the whole one first, then its groups."""
    texts: tuple[TextScore, ...]
    """Its scores on texts."""
    answers: tuple[GeneratedAnswer, ...]
    """Its answers to read."""


@dataclass(frozen=True)
class EvaluationResults:
    """Content of `results.json`."""

    models: tuple[ModelResults, ...]
    """Models; the first is the base."""
    settings: dict[str, Any]
    """Config of the evaluation, defaults included."""
    version: str
    """Version of this package."""
    date: str
    """When it was finished: ISO 8601, UTC."""


_RESULTS: pydantic.TypeAdapter[EvaluationResults] = pydantic.TypeAdapter(EvaluationResults)


def build_results(config: object, outcomes: Sequence[ModelOutcome]) -> EvaluationResults:
    """Compare models with the first one, and average subjects.

    Args:
        config: Settings of the evaluation, a settings object.
        outcomes: What the models yielded, the base first.
    """
    base = {task.task: task for task in outcomes[0].tasks}
    models: list[ModelResults] = []
    for number, outcome in enumerate(outcomes):
        compared = base if number else {}
        tasks = tuple(_score_task(task, compared.get(task.task)) for task in outcome.tasks)
        groups = tuple(_average_groups(tasks))
        models.append(ModelResults(outcome.model, tasks, groups, outcome.texts, outcome.answers))
    return EvaluationResults(
        tuple(models),
        settings=to_dict(config),
        version=raytune_llama.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def write_results(
    results: EvaluationResults, outcomes: Sequence[ModelOutcome], target: Path
) -> list[Path]:
    """Write `results.json` and `samples.jsonl`, and a submission of each model that has one.

    Returns:
        The files.
    """
    written = [target / RESULTS_FILE]
    write_json_atomic(written[0], asdict(results))
    if lines := b"".join(_sample_lines(outcomes)):
        written.append(target / SAMPLES_FILE)
        write_bytes_atomic(written[-1], lines)
    for number, outcome in enumerate(outcomes):
        if submission := build_submission(outcome.tasks):
            name = "".join(c if c.isalnum() or c in "._-" else "_" for c in outcome.model.name)
            stem, _, suffix = SUBMISSION_FILE.partition(".")
            written.append(target / (f"{stem}-{name}.{suffix}" if number else SUBMISSION_FILE))
            write_json_atomic(written[-1], submission)
    return written


def read_results(file: Path) -> EvaluationResults:
    """Read `results.json`.

    Raises:
        ValueError: The file is not JSON or of another form.
    """
    return _RESULTS.validate_python(read_json(file))


def main_metric(metrics: Iterable[str]) -> str | None:
    """Return the name of the metric by which a task is compared; None if it has none."""
    names = [name for name in metrics if not name.endswith("_stderr")]
    return next((name for name in MAIN_METRICS if name in names), next(iter(names), None))


def _sample_lines(outcomes: Sequence[ModelOutcome]) -> Iterable[bytes]:
    for outcome in outcomes:
        for task in outcome.tasks:
            for sample in task.samples:
                line = {"model": outcome.model.name, "task": task.task, **asdict(sample)}
                yield (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _score_task(task: TaskOutcome, base: TaskOutcome | None) -> TaskScore:
    differences: dict[str, Metric] = {}
    for name, metric in task.metrics.items() if base is not None else ():
        if base is not None and (other := base.metrics.get(name)) is not None:
            is_mean = _is_mean(name, metric, task.samples) and _is_mean(name, other, base.samples)
            differences[name] = Metric(
                metric.value - other.value,
                _paired_stderr(name, task.samples, base.samples) if is_mean else None,
                metric.higher_is_better,
            )
    shared = {member.name: getattr(task, member.name) for member in fields(TaskSummary)}
    return TaskScore(**shared, differences=differences)


def _is_mean(name: str, metric: Metric, samples: Sequence[Sample]) -> bool:
    """Whether a metric is the mean of its samples, and not, say, a perplexity or a BLEU score."""
    values = [_sample_score(name, sample) for sample in samples]
    known = [value for value in values if value is not None]
    return len(known) == len(values) > 0 and math.isclose(
        sum(known) / len(known), metric.value, rel_tol=1e-6, abs_tol=1e-9
    )


def _paired_stderr(name: str, samples: Sequence[Sample], base: Sequence[Sample]) -> float | None:
    """Return the standard error of a mean difference; None if samples lack the metric."""
    others = {sample.id: _sample_score(name, sample) for sample in base}
    differences: list[float] = []
    for sample in samples:
        value, other = _sample_score(name, sample), others.get(sample.id)
        if value is None or other is None:
            return None
        differences.append(value - other)
    if len(differences) < 2:
        return None
    return stdev(differences) / math.sqrt(len(differences))


def _sample_score(name: str, sample: Sample) -> float | None:
    if name == "acc" and sample.correct is not None:
        return float(sample.correct)
    return (sample.metrics or {}).get(name)


def _average_groups(tasks: Sequence[TaskScore]) -> Iterable[GroupScore]:
    """Yield the averages of each benchmark with several subjects, and of its groups."""
    for benchmark in dict.fromkeys(task.benchmark for task in tasks):
        parts = [task for task in tasks if task.benchmark == benchmark]
        groups = dict.fromkeys(task.group for task in parts if task.group is not None)
        names = {main_metric(task.metrics) for task in parts}
        if len(parts) < 2 or len(names) > 1:
            continue
        (metric,) = names
        if metric is None:
            continue
        yield _average(benchmark, None, metric, parts)
        for group in groups if len(groups) > 1 else ():
            inside = [task for task in parts if task.group == group]
            yield _average(benchmark, group, metric, inside)


def _average(
    benchmark: str, group: str | None, metric: str, tasks: Sequence[TaskScore]
) -> GroupScore:
    scores = [task.metrics[metric] for task in tasks]
    sizes = [float(task.num_questions) for task in tasks]
    differences = [task.differences[metric] for task in tasks if metric in task.differences]
    return GroupScore(
        benchmark=benchmark,
        group=group,
        metric=metric,
        num_tasks=len(tasks),
        num_questions=sum(task.num_questions for task in tasks),
        by_questions=_weighted_mean(scores, sizes),
        by_subjects=_weighted_mean(scores, [1.0] * len(scores)),
        difference=(_weighted_mean(differences, sizes) if len(differences) == len(tasks) else None),
    )


def _weighted_mean(scores: Sequence[Metric], weights: Sequence[float]) -> Metric:
    """Return the mean of independent scores, and its standard error if all of them have one."""
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    value = math.fsum(share * score.value for share, score in zip(shares, scores, strict=True))
    squares = [
        (share * score.stderr) ** 2
        for share, score in zip(shares, scores, strict=True)
        if score.stderr is not None
    ]
    is_known = len(squares) == len(scores)
    stderr = math.sqrt(math.fsum(squares)) if is_known else None
    return Metric(value, stderr, scores[0].higher_is_better)
