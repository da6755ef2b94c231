"""The metrics that the runs of a sweep report, and checks of those that it compares and limits."""

import difflib
from collections.abc import Sequence

from raytune_llama.data.batches.config import source_names
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig
from raytune_llama.train.monitoring.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    EVAL_TEXT_BITS_PER_BYTE,
    EVAL_TEXT_LOSS,
    accuracy_name,
    is_accuracy,
)
from raytune_llama.train.tasks import open_tasks
from raytune_llama.tune.config import SweepConfig

_NUM_SHOWN = 8


def list_metrics(
    base: AnyTrainConfig, tasks: Sequence[EvaluationTask], validated: Sequence[str]
) -> list[str]:
    """Return the names of the metrics that a run's evaluations report.

    Args:
        base: config of the run.
        tasks: tasks of its `eval.tasks`.
        validated: names of the sources that have validation text.
    """
    texts = source_names(base.eval.texts)
    totals = [EVAL_LOSS, EVAL_BITS_PER_BYTE] if isinstance(base, PretrainConfig) else [EVAL_LOSS]
    return [
        *_with_sources(totals, validated),
        *_with_sources([EVAL_TEXT_BITS_PER_BYTE, EVAL_TEXT_LOSS], texts),
        *_list_accuracies(tasks),
    ]


def _list_accuracies(tasks: Sequence[EvaluationTask]) -> list[str]:
    return list(dict.fromkeys(accuracy_name(task.benchmark) for task in tasks))


def watched_metrics(
    sweep: SweepConfig, base: AnyTrainConfig, tasks: Sequence[EvaluationTask]
) -> tuple[str, ...]:
    """Return the metrics that a trial reports besides the sweep's own.

    They are those that are limited, and those of texts and tasks.

    Args:
        sweep: config of the sweep.
        base: config of every trial, without its sample.
        tasks: tasks of its `eval.tasks`.
    """
    texts = [EVAL_TEXT_BITS_PER_BYTE] if base.eval.texts else []
    return tuple(dict.fromkeys([*sweep.constraints, *texts, *_list_accuracies(tasks)]))


def evaluation_interval(sweep: SweepConfig, base: AnyTrainConfig) -> int | None:
    """Return the steps between two evaluations of a sweep's metric; None: only at the end."""
    every = base.eval.every_steps
    if every is None or not is_accuracy(sweep.metric):
        return every
    return every * base.eval.tasks_every


def _with_sources(totals: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Return metrics over all sources and, if there are several, of each."""
    if not sources:
        return []
    several = sources if len(sources) > 1 else ()
    return [*totals, *(f"{name}/{source}" for name in totals for source in several)]


def check_metrics(
    sweep: SweepConfig, base: AnyTrainConfig, *, validated: Sequence[str] | None = None
) -> list[str]:
    """Return why a sweep cannot compare or limit its metrics; empty if it can.

    Args:
        sweep: config of the sweep.
        base: config of every trial, without its sample.
        validated: names of the sources that have validation text; None: not known before the token
            store is built.

    Raises:
        ConfigError: a task of `eval.tasks` cannot be loaded.
    """
    names = source_names(base.data.all_sources) if validated is None else validated
    available = list_metrics(base, open_tasks(base), names)
    fields = {"metric": sweep.metric}
    fields |= {f"constraints.{name}": name for name in sweep.constraints}
    problems = [
        f"{field}: got {name}, which runs of {sweep.base} don't report; {_suggest(name, available)}"
        for field, name in fields.items()
        if name not in available
    ]
    is_other = sweep.metric.startswith((EVAL_TEXT_LOSS, EVAL_TEXT_BITS_PER_BYTE))
    if base.checkpoint.result == "best" and (is_other or is_accuracy(sweep.metric)):
        problems.append(
            f"metric: got {sweep.metric}, but checkpoint.result of the base is best, the step with "
            f"the lowest {EVAL_LOSS}; set fixed.checkpoint.result=last"
        )
    if is_accuracy(sweep.metric) and sweep.mode == "min":
        problems.append(f"mode: got min, but a higher {sweep.metric} is better; set mode=max")
    return problems


def _suggest(name: str, available: Sequence[str]) -> str:
    """Return which metric is meant, or what a run needs to report one."""
    if name.startswith("eval/text/") and EVAL_TEXT_LOSS not in available:
        return "set eval.texts of the base, or fixed.eval.texts, to files of held-out text"
    if is_accuracy(name) and not any(map(is_accuracy, available)):
        return "set eval.tasks of the base, or fixed.eval.tasks"
    if not available:
        return (
            "set data.validation_fraction or data.validation of the base, so that they report any"
        )
    near = difflib.get_close_matches(name, available, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(available) - _NUM_SHOWN} more" if len(available) > _NUM_SHOWN else ""
    return f"they report {', '.join(available[:_NUM_SHOWN])}{more}"
