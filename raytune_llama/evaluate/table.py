"""Rows of the summary: benchmarks, texts, and models side by side; as a table in the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_llama.evaluate.results import EvaluationResults, main_metric
from raytune_llama.evaluate.tasks.outcome import Metric

BITS_PER_BYTE = "bits per byte"
"""Name of the metric of texts."""
_MIN_TEXT_CHANGE = 0.01


@dataclass(frozen=True)
class Cell:
    """Score of one model."""

    metric: str
    """Name of the metric."""
    score: Metric
    """The score."""
    difference: Metric | None
    """Difference to the base; None: this is the base."""

    @property
    def is_percentage(self) -> bool:
        """Whether the score is shown in percent, as accuracies are; BLEU has a scale of its own."""
        return self.score.higher_is_better and abs(self.score.value) <= 1

    @property
    def verdict(self) -> str:
        """Return `better` or `worse` than the base, if by more than two standard errors.

        Bits per byte have none: texts are long, so a change of more than 1% counts. Other scores
        without a standard error have no verdict.
        """
        if self.difference is None or self.difference.value == 0:
            return ""
        limit = 2 * self.difference.stderr if self.difference.stderr is not None else math.inf
        if self.metric == BITS_PER_BYTE:
            limit = _MIN_TEXT_CHANGE * (self.score.value - self.difference.value)
        if abs(self.difference.value) <= limit:
            return ""
        is_better = (self.difference.value > 0) == self.score.higher_is_better
        return "better" if is_better else "worse"


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark, task or text."""

    name: str
    """Benchmark, `benchmark: group`, task, or text."""
    metric: str
    """Name of the metric."""
    size: str
    """Number of questions or bytes, with the unit."""
    cells: tuple[Cell | None, ...]
    """Score of each model; None: it has none."""
    is_average: bool = False
    """Whether it is an average over subjects."""


def summary_rows(results: EvaluationResults, *, with_subjects: bool = True) -> list[Row]:
    """Return the rows of a table of all models.

    Args:
        results: Results.
        with_subjects: Whether the subjects of averaged benchmarks have rows of their own.
    """
    rows = [*_text_rows(results), *_group_rows(results)]
    averaged = {group.benchmark for model in results.models for group in model.groups}
    names = dict.fromkeys(task.task for model in results.models for task in model.tasks)
    for name in names:
        found = [
            next((task for task in model.tasks if task.task == name), None)
            for model in results.models
        ]
        first = next(task for task in found if task is not None)
        if first.benchmark in averaged and not with_subjects:
            continue
        main = main_metric(first.metrics)
        shown = [main] if first.benchmark in averaged and main else list(first.metrics)
        for metric in shown:
            cells = tuple(
                Cell(metric, task.metrics[metric], task.differences.get(metric))
                if task is not None and metric in task.metrics
                else None
                for task in found
            )
            rows.append(Row(name, metric, f"{first.num_questions} questions", cells))
    return rows


def _text_rows(results: EvaluationResults) -> list[Row]:
    rows: list[Row] = []
    names = dict.fromkeys(text.name for model in results.models for text in model.texts)
    for name in names:
        found = [
            next((text for text in model.texts if text.name == name), None)
            for model in results.models
        ]
        base, cells = found[0], list[Cell | None]()
        for number, text in enumerate(found):
            if text is None:
                cells.append(None)
                continue
            score = Metric(text.bits_per_byte, None, higher_is_better=False)
            difference = None
            if number and base is not None:
                change = text.bits_per_byte - base.bits_per_byte
                difference = Metric(change, None, higher_is_better=False)
            cells.append(Cell(BITS_PER_BYTE, score, difference))
        num_bytes = next(text.num_bytes for text in found if text is not None)
        rows.append(Row(name, BITS_PER_BYTE, f"{num_bytes} bytes", tuple(cells)))
    return rows


def _group_rows(results: EvaluationResults) -> list[Row]:
    rows: list[Row] = []
    keys = dict.fromkeys(
        (group.benchmark, group.group, group.metric)
        for model in results.models
        for group in model.groups
    )
    for key in keys:
        found = [
            next((g for g in model.groups if (g.benchmark, g.group, g.metric) == key), None)
            for model in results.models
        ]
        first = next(group for group in found if group is not None)
        name = first.benchmark if first.group is None else f"{first.benchmark}: {first.group}"
        size = f"{first.num_questions} questions, {first.num_tasks} subjects"
        cells = [
            group and Cell(first.metric, group.by_questions, group.difference) for group in found
        ]
        rows.append(Row(name, first.metric, size, tuple(cells), is_average=True))
        if first.group is None:
            equal = [group and Cell(first.metric, group.by_subjects, None) for group in found]
            rows.append(
                Row(name, f"{first.metric}, mean of subjects", size, tuple(equal), is_average=True)
            )
    return rows


def format_score(metric: Metric, *, percent: bool, signed: bool = False) -> str:
    """Return a score with its standard error: `36.7 ± 1.2`, in percent, or `0.872`."""
    scale, digits = (100, 1) if percent else (1, 3)
    sign = "+" if signed else ""
    text = f"{metric.value * scale:{sign}.{digits}f}"
    return text if metric.stderr is None else f"{text} ± {metric.stderr * scale:.{digits}f}"


def render_table(results: EvaluationResults, width: int) -> str:
    """Return the table of `build_table` as plain text.

    Args:
        results: Results.
        width: Number of characters of a line.
    """
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(build_table(results))
    return captured.get().rstrip()


def build_table(results: EvaluationResults, max_rows: int = 40) -> Table:
    """Return the summary for a terminal: models side by side, with differences to the first.

    Accuracies and the like are in percent, with one standard error. Subjects are left out if the
    table would have more than `max_rows` rows.
    """
    rows = summary_rows(results)
    hidden = 0
    if len(rows) > max_rows:
        shown = summary_rows(results, with_subjects=False)
        hidden, rows = len(rows) - len(shown), shown
    table = Table(title="scores in percent ± standard error; texts in bits per byte")
    table.add_column("on")
    table.add_column("metric")
    for model in results.models:
        table.add_column(escape(model.model.name), justify="right")
    for row in rows:
        cells = [_cell_text(cell) for cell in row.cells]
        style = "bold" if row.is_average else None
        table.add_row(escape(row.name), escape(row.metric), *cells, style=style)
    if hidden:
        table.caption = f"and {hidden} rows of single subjects: see the report"
    return table


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    text = format_score(cell.score, percent=cell.is_percentage)
    if cell.difference is None:
        return text
    change = format_score(cell.difference, percent=cell.is_percentage, signed=True)
    color = {"better": "green", "worse": "red", "": "dim"}[cell.verdict]
    return f"{text} [{color}]({change})[/]"


def describe_counts(results: EvaluationResults) -> Sequence[str]:
    """Return one line for each task with missing answers or cut prompts."""
    lines: list[str] = []
    for model in results.models:
        for task in model.tasks:
            counts = [
                f"{task.num_missing} of {task.num_questions} answers are missing, counted as wrong"
                if task.num_missing
                else "",
                f"{task.num_truncated} prompts are cut at their start"
                if task.num_truncated
                else "",
            ]
            if text := "; ".join(filter(None, counts)):
                lines.append(f"{model.model.name}, {task.task}: {text}")
    return lines
