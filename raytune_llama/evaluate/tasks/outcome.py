"""What running a task yields: metrics, counts and one sample per question; plain JSON data."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pydantic


@dataclass(frozen=True)
class Metric:
    """One score of a task."""

    value: float
    """Score, such as an accuracy of 0 to 1."""
    stderr: float | None
    """Standard error over the questions; None: unknown."""
    higher_is_better: bool = True
    """Whether a higher score is better."""


@dataclass(frozen=True)
class Sample:
    """One question, what the model answered, and whether that is right."""

    id: str
    """Identifier of the question within the task."""
    question: str
    """Text of the question."""
    options: tuple[str, ...]
    """Options; empty for a task of lm-eval that has none."""
    scores: tuple[float, ...]
    """Log-likelihood of each option in nats, its forms summed; empty for generated answers."""
    answer: str | None
    """Option that the model chose: its letter, or its text; None: no answer was found."""
    gold: str | None
    """Right option, as `answer`; None: unknown."""
    correct: bool | None
    """Whether the answer is right; None: unknown."""
    output: str | None = None
    """Generated text; None: nothing was generated."""
    truncated: bool = False
    """Whether the start of its prompt was cut to fit the model's context."""
    metrics: dict[str, float] | None = None
    """Further scores of this question by name, such as those of an lm-eval task."""


@dataclass(frozen=True)
class TaskSummary:
    """Result of one task with one model, without its samples."""

    task: str
    """Unique name of the task, such as `ceval/law`."""
    benchmark: str
    """Benchmark that it is a part of."""
    subject: str | None
    """Subject or part within the benchmark."""
    group: str | None
    """Group of the subject; None: no group."""
    metrics: dict[str, Metric]
    """Scores by name: `acc`, `acc_norm`, `f1`, `mcc`, ...; empty without right answers."""
    num_questions: int
    """Number of questions that were asked."""
    num_missing: int
    """Number of questions without an answer; they count as wrong."""
    num_truncated: int | None
    """Number of prompts whose start was cut; None: the model does not report its context."""
    shots: int | None
    """Number of examples before each question; None: unknown."""
    method: str
    """`likelihood`, `generation`, or lm-eval's type of output."""
    template_hash: str | None
    """Hash of the chat template that prompts went through; None: without one."""
    file_hashes: dict[str, str]
    """Hash of each file of questions and examples, by path."""
    first_prompt: str
    """First prompt as the model was given it, before truncation."""
    seconds: float
    """Duration."""


@dataclass(frozen=True)
class TaskOutcome(TaskSummary):
    """Result of one task with one model."""

    samples: tuple[Sample, ...] = ()
    """One sample per question, in order."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON file; `outcome_from_json` reads it."""
        return asdict(self)


_OUTCOME: pydantic.TypeAdapter[TaskOutcome] = pydantic.TypeAdapter(TaskOutcome)


def outcome_from_json(data: dict[str, Any]) -> TaskOutcome:
    """Build an outcome from what `TaskOutcome.to_json` returned.

    Raises:
        ValueError: The data is of another form.
    """
    return _OUTCOME.validate_python(data)


def build_submission(outcomes: Iterable[TaskOutcome]) -> dict[str, dict[str, str]]:
    """Return C-Eval's form of a submission, subject to question id to letter.

    Only subjects without right answers are in it. A question without an answer has the empty text.
    """
    return {
        outcome.subject or outcome.task: {
            sample.id: sample.answer or "" for sample in outcome.samples
        }
        for outcome in outcomes
        if outcome.samples and all(sample.gold is None for sample in outcome.samples)
    }
