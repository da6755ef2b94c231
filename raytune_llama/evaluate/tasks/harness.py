"""Run a task through lm-evaluation-harness, on any model that has its interface."""

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raytune_llama.config.errors import UserError
from raytune_llama.evaluate.tasks.outcome import Metric, Sample, TaskOutcome
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.storage.hashes import hash_bytes

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

_BOOTSTRAP_DRAWS = 1000
_HASH_START = "blake3:"


def run_task(task: EvaluationTask, lm: "LM") -> TaskOutcome:
    """Ask a model all questions of one task.

    Deterministic, and without network for tasks from files. To count prompts that are longer than
    its context, the model needs `tok_encode(text) -> list[int]` and `max_length`, as lm-eval's own
    models have; for a chat template, `apply_chat_template` and `chat_template(True) -> str`, which
    returns the template or its hash.

    Args:
        task: Task, as `load_tasks` returns it.
        lm: Model.

    Raises:
        UserError: A chat template is wanted and the model has none, or a prompt is longer than the
            context and `truncate` is `refuse`.
    """
    # Only here, as they import torch and datasets.
    from lm_eval.evaluator import evaluate

    from raytune_llama.evaluate.tasks.context_check import CheckedModel
    from raytune_llama.evaluate.tasks.harness_tasks import build_harness_task
    from raytune_llama.evaluate.tasks.local_task import LocalTask

    started = time.monotonic()
    config = task.config
    template_hash = _hash_template(task, lm) if config.chat_template else None
    built = LocalTask(task) if task.harness_task is None else build_harness_task(task)
    model = CheckedModel(lm, config.truncate, functools.partial(_question_name, task))
    with _without_progress_bars():
        results: Any = evaluate(
            model,
            {"tasks": {task.name: built}},
            limit=None if task.harness_task is None else config.limit,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.chat_template,
        )
    samples = _read_samples(built, results["samples"][task.name], model.truncated)
    shots = len(task.shots) if task.harness_task is None else built.get_config("num_fewshot")
    return TaskOutcome(
        task=task.name,
        benchmark=task.benchmark,
        subject=task.subject,
        group=task.group,
        metrics=_read_metrics(results, task.name) | _score_answers(task, samples),
        num_questions=len(samples),
        num_missing=sum(sample.answer is None for sample in samples),
        num_truncated=len(model.truncated) if model.can_count else None,
        shots=shots,
        method=config.method if task.harness_task is None else str(built.OUTPUT_TYPE),
        template_hash=template_hash,
        file_hashes=dict(task.file_hashes),
        first_prompt=model.first_prompt,
        seconds=time.monotonic() - started,
        samples=tuple(samples),
    )


def _read_samples(
    task: "Task", examples: Sequence[Mapping[str, Any]], truncated: AbstractSet[int]
) -> list[Sample]:
    """Return the samples of a task; of several filters of lm-eval, those of the first."""
    from raytune_llama.evaluate.tasks.local_task import LocalTask

    if isinstance(task, LocalTask):
        samples = [task.build_sample(one["doc"], one["filtered_resps"]) for one in examples]
    else:
        first = examples[0]["filter"]
        samples = [_read_sample(task, one) for one in examples if one["filter"] == first]
    return [
        replace(sample, truncated=position in truncated) for position, sample in enumerate(samples)
    ]


def _hash_template(task: EvaluationTask, lm: "LM") -> str:
    """Return the hash of the model's chat template.

    Raises:
        UserError: The model has none.
    """
    known: str | None = getattr(lm, "template_hash", None)
    if known is not None:
        return known
    template = lm.chat_template(True)
    if not template:
        raise UserError(
            f"{task.name}: chat_template is true, but the model has no chat template; set it to "
            "false, or add the template to the tokenizer"
        )
    return template if template.startswith(_HASH_START) else hash_bytes(template.encode())


def _question_name(task: EvaluationTask, position: int) -> str:
    return task.questions[position].id if task.questions else str(position)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide lm-eval's progress bar of building requests, one per task."""
    import lm_eval.api.task as module

    original = module.tqdm
    module.tqdm = functools.partial(original, disable=True)
    try:
        yield
    finally:
        module.tqdm = original


def _read_metrics(results: Mapping[str, Any], name: str) -> dict[str, Metric]:
    """Return lm-eval's scores of a task; a score after a filter is named `metric/filter`."""
    found: Mapping[str, Any] = results["results"][name]
    higher: Mapping[str, bool] = results["higher_is_better"].get(name, {})
    metrics: dict[str, Metric] = {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = found.get(f"{metric}_stderr,{filtered}")
        metrics[metric if filtered == "none" else f"{metric}/{filtered}"] = Metric(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            higher_is_better=higher.get(metric, True),
        )
    return metrics


def _score_answers(task: EvaluationTask, samples: Sequence[Sample]) -> dict[str, Metric]:
    """Return F1 and MCC where the options are the same classes in every question."""
    from raytune_llama.evaluate.tasks.scores import score_classes

    classes = {frozenset(option.casefold() for option in one.options) for one in task.questions}
    if task.config.option_style != "texts" or len(classes) != 1 or not task.has_answers:
        return {}
    return score_classes(samples, task.config.positive)


def _read_sample(task: "Task", example: Mapping[str, Any]) -> Sample:
    """Return what lm-eval recorded of one document of its own task."""
    doc = example["doc"]
    responses = example["filtered_resps"]
    metrics = {
        name: float(example[name])
        for name in example["metrics"]
        if isinstance(example[name], int | float)
    }
    options: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    output: str | None = None
    answer: str | None = None
    gold = example["target"]
    if task.OUTPUT_TYPE == "multiple_choice" and not getattr(task, "multiple_input", 0):
        options = tuple(map(str, task.doc_to_choice(doc)))  # pyright: ignore[reportAttributeAccessIssue] - of its subclass
        scores = tuple(float(one[0]) for one in responses[: len(options)])
        answer = options[scores.index(max(scores))]
        gold = options[gold] if isinstance(gold, int) else gold
    elif task.OUTPUT_TYPE == "generate_until":
        output = answer = str(responses[0])
    else:
        answer = ""  # a text is scored; nothing is chosen
    right = next((metrics[name] for name in ("acc", "exact_match") if name in metrics), None)
    text = task.doc_to_text(doc)
    return Sample(
        id=str(example["doc_id"]),
        question=text if isinstance(text, str) else str(example["arguments"][0][0]),
        options=options,
        scores=scores,
        answer=answer,
        gold=str(gold),
        correct=None if right is None else bool(right),
        output=output,
        metrics=metrics,
    )
