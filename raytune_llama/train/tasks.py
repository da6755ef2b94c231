"""The tasks of `eval.tasks`: load and check them, and compute their metrics during a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from raytune_llama.chat.encoding import build_chat_encoder
from raytune_llama.config.settings import ConfigError
from raytune_llama.evaluate.tasks.loading import load_tasks
from raytune_llama.evaluate.tasks.outcome import TaskOutcome
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.storage.directories import fetched
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.config import AnyTrainConfig, SftConfig
from raytune_llama.train.monitoring.metrics import accuracy_name

if TYPE_CHECKING:
    from raytune_llama.train.engines.protocol import TrainEngine
    from raytune_llama.train.process_group import ProcessGroup
    from raytune_llama.train.task_model import EngineLanguageModel

_RESERVED = ("bits_per_byte", "loss", "perplexity", "text")
"""Names of other metrics of an evaluation, which no task may have."""


def open_tasks(config: AnyTrainConfig) -> tuple[EvaluationTask, ...]:
    """Read and check the questions of `eval.tasks`; empty without tasks.

    Raises:
        ConfigError: lists every problem of the settings and of the files.
        UserError: lm-evaluation-harness is not installed.
    """
    if not config.eval.tasks:
        return ()
    tasks = load_tasks(config.eval.tasks, "eval.tasks", need_answers=True)
    problems: list[str] = []
    for task in tasks:
        field = f"eval.tasks.{config.eval.tasks.index(task.config)}"
        if task.benchmark in _RESERVED:
            problems.append(
                f"{field}.name: {task.benchmark!r} is the name of another metric; set another one"
            )
        if task.harness_task is not None:
            problems += _check_harness_task(task, field)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return tuple(tasks)


def _check_harness_task(task: EvaluationTask, field: str) -> list[str]:
    # Only here, as it imports torch and datasets.
    from raytune_llama.evaluate.tasks.harness_tasks import build_harness_task

    built = build_harness_task(task)
    if built.OUTPUT_TYPE != "multiple_choice":
        return [
            f"{field}.task: {task.harness_task} is of lm-eval's type {built.OUTPUT_TYPE}, but a "
            "training run only scores given options (multiple_choice); evaluate it after training"
        ]
    if "acc" not in (built.aggregation() or {}):
        return [f"{field}.task: {task.harness_task} reports no accuracy (acc); remove it"]
    return []


@dataclass(frozen=True)
class TaskEvaluator:
    """Asks the model in training the questions of `eval.tasks`."""

    tasks: tuple[EvaluationTask, ...]
    """Tasks, the same on every worker."""

    model: "EngineLanguageModel"
    """The model in training, through lm-eval's interface."""

    @classmethod
    def open(
        cls, config: AnyTrainConfig, engine: "TrainEngine", workers: "ProcessGroup"
    ) -> Self | None:
        """Load the tasks on rank 0 and send them to all workers; None without tasks; collective."""
        if not config.eval.tasks:
            return None
        # Only here, as it imports lm-eval.
        from raytune_llama.train.task_model import EngineLanguageModel

        tasks = workers.broadcast(open_tasks(config) if workers.is_rank_zero else ())
        tokenizer = load_tokenizer(fetched(config.model.tokenizer_path))
        chat = None
        if isinstance(config, SftConfig) and any(task.config.chat_template for task in tasks):
            chat = build_chat_encoder(tokenizer, config.data.chat)
        batch = config.batch
        batch_tokens = batch.micro_batch_sequences * batch.sequence_tokens
        model = EngineLanguageModel(engine, workers, tokenizer, chat, batch_tokens=batch_tokens)
        return cls(tasks, model)

    @property
    def num_questions(self) -> int:
        """Number of questions of all tasks."""
        return sum(task.num_questions for task in self.tasks)

    def evaluate(self) -> dict[str, float]:
        """Return the accuracy of each benchmark, and of its subjects if several; collective."""
        from raytune_llama.evaluate.tasks.harness import run_task

        return accuracy_metrics([run_task(task, self.model) for task in self.tasks])


def accuracy_metrics(outcomes: Sequence[TaskOutcome]) -> dict[str, float]:
    """Return the share of right answers over all questions of each benchmark, and per subject."""
    metrics: dict[str, float] = {}
    for benchmark in dict.fromkeys(outcome.benchmark for outcome in outcomes):
        parts = [outcome for outcome in outcomes if outcome.benchmark == benchmark]
        num_right = sum(part.metrics["acc"].value * part.num_questions for part in parts)
        metrics[accuracy_name(benchmark)] = num_right / sum(part.num_questions for part in parts)
        for part in parts if len(parts) > 1 else ():
            metrics[f"{accuracy_name(benchmark)}/{part.subject}"] = part.metrics["acc"].value
    return metrics
