"""A task that is ready to run: its questions in memory, checked, and nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from raytune_llama.evaluate.tasks.config import TaskConfig


@dataclass(frozen=True)
class Question:
    """One question with its options."""

    id: str
    """Unique identifier within the task."""
    text: str
    """Question without options; for CALM the entire query."""
    options: tuple[str, ...]
    """Texts of the options, at least two."""
    gold: int | None
    """Index of the right option; None: the file has no answers."""


@dataclass(frozen=True)
class EvaluationTask:
    """One subject or file of a benchmark; picklable, so that a Ray worker can run it."""

    name: str
    """Unique name, such as `ceval/law`."""
    benchmark: str
    """Name of the benchmark that it is a part of, such as `ceval`."""
    subject: str | None
    """Subject or part within the benchmark; None: the task is the whole benchmark."""
    group: str | None
    """`STEM`, `Social`, `Humanities` or `Other` for C-Eval and CMMLU; None: no group."""
    config: TaskConfig
    """Settings that it was loaded with."""
    num_questions: int
    """Number of questions to ask, `limit` applied."""
    questions: tuple[Question, ...] = ()
    """Questions to ask; empty for a task of lm-eval, which holds its own."""
    shots: tuple[Question, ...] = ()
    """Examples that are shown before each question, in order."""
    title: str = ""
    """Subject's name in Chinese, for the description; its English name if it has none."""
    harness_task: str | None = None
    """Name of the lm-eval task; None: the questions are from files."""
    file_hashes: Mapping[str, str] = field(default_factory=dict)
    """Hash of each file that questions or examples were read from, by path. Of an lm-eval task: of
    its YAML file, its questions and its examples."""

    @property
    def has_answers(self) -> bool:
        """Whether the right answers are known; otherwise the result is a submission."""
        return not self.questions or self.questions[0].gold is not None
