"""The page of an evaluation: one HTML file without scripts and without network."""

from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from raytune_llama.config.yaml12 import dump
from raytune_llama.evaluate.results import EvaluationResults, ModelResults, TaskScore, main_metric
from raytune_llama.evaluate.table import Cell, Row, describe_counts, format_score, summary_rows
from raytune_llama.storage.files import write_bytes_atomic
from raytune_llama.storage.hashes import show_hash

REPORT_FILE = "report.html"
"""The page, in the directory of an evaluation."""

_NUM_COLORS = 6
_BAR_HEIGHT, _BAR_GAP = 13, 9
_LABEL_WIDTH, _PLOT_WIDTH, _VALUE_WIDTH = 290, 560, 110

_STYLE = """
:root { color-scheme: light dark; --text: #1c2127; --muted: #56606b; --line: #d8dde3;
  --box: #f3f5f7; --page: #fff; --good: #1a7f37; --bad: #b3261e; --m0: #8a94a0; --m1: #1f6fd1;
  --m2: #d9822b; --m3: #2f9e6e; --m4: #a1479e; --m5: #c2a000; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --muted: #9aa5b1; --line: #3a424b;
  --box: #232a31; --page: #14181d; --good: #5bd17b; --bad: #ff8a80; --m0: #76808c; --m1: #5aa2f5;
  --m2: #f0a458; --m3: #5cc79a; --m4: #cf82cc; --m5: #e0c340; } }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  color: var(--text); background: var(--page); max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: var(--muted); } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92em; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { color: var(--muted); font-weight: 600; } th.name, td.name { text-align: left; }
tr.average td { font-weight: 600; background: var(--box); }
td small { color: var(--muted); white-space: nowrap; } td { white-space: nowrap; }
.better { color: var(--good) !important; } .worse { color: var(--bad) !important; }
td.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 12rem; }
td.hash { text-align: left; font-family: ui-monospace, monospace; font-size: .88em;
  white-space: normal; overflow-wrap: anywhere; }
pre { background: var(--box); padding: .6rem .8rem; white-space: pre-wrap; font-size: .86em;
  overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--muted); margin: .6rem 0; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--text); font-size: 12px; }
svg .axis { stroke: var(--line); } svg .muted { fill: var(--muted); font-size: 11px; }
svg .error { stroke: var(--text); opacity: .7; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 1em; }
"""
_STYLE += "".join(
    f"svg .m{n} {{ fill: var(--m{n}); }} .key.m{n} {{ background: var(--m{n}); }}\n"
    for n in range(_NUM_COLORS)
)


def write_report(results: EvaluationResults, target: Path) -> Path:
    """Write `report.html` into a directory; return the file."""
    file = target / REPORT_FILE
    write_bytes_atomic(file, render_report(results).encode())
    return file


def render_report(results: EvaluationResults) -> str:
    """Return the page: scores, bars per subject, answers, and where all of it comes from."""
    names = ", ".join(model.model.name for model in results.models)
    sections = [
        _summary(results),
        *(_bars(results, benchmark) for benchmark in _benchmarks(results)),
        _answers(results),
        _provenance(results),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation of {escape(names)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Evaluation of {escape(names)}</h1>\n"
        f'<p class="note">{escape(_format_date(results.date))}, '
        f"raytune_llama {escape(results.version)}</p>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def _format_date(date: str) -> str:
    return f"{datetime.fromisoformat(date):%Y-%m-%d %H:%M} UTC"


def _summary(results: EvaluationResults) -> str:
    rows = summary_rows(results, with_subjects=False)
    if not rows:
        return ""
    note = (
        "In percent, but for bits per byte, where less is better; &plusmn; one standard error. In "
        "brackets the difference to the first model, in color if it is more than two standard "
        "errors, or 1% of the bits per byte."
    )
    counts = "".join(f"<li>{escape(line)}</li>" for line in describe_counts(results))
    subjects = [row for row in summary_rows(results) if row not in rows]
    details = (
        f"<details><summary>{len(subjects)} rows of single subjects</summary>"
        f"{_score_table(results, subjects)}</details>"
        if subjects
        else ""
    )
    return (
        f'<h2>Scores</h2>\n<p class="note">{note}</p>\n{_score_table(results, rows)}\n{details}'
        + (f"<ul>{counts}</ul>" if counts else "")
    )


def _score_table(results: EvaluationResults, rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(model.model.name)}</th>" for model in results.models)
    body = "".join(
        f"<tr{' class=average' if row.is_average else ''}>"
        f'<td class="name">{escape(row.name)}</td><td class="name">{escape(row.metric)}</td>'
        f"<td><small>{escape(row.size)}</small></td>"
        + "".join(_score_cell(cell) for cell in row.cells)
        + "</tr>\n"
        for row in rows
    )
    return (
        '<div class="wide"><table><thead><tr><th class="name">on</th><th class="name">metric</th>'
        f"<th></th>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _score_cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td>-</td>"
    text = escape(format_score(cell.score, percent=cell.is_percentage))
    if cell.difference is None:
        return f"<td>{text}</td>"
    change = escape(format_score(cell.difference, percent=cell.is_percentage, signed=True))
    return f'<td>{text} <small class="{cell.verdict}">({change})</small></td>'


def _benchmarks(results: EvaluationResults) -> list[str]:
    """Return the benchmarks with several subjects."""
    return list(
        dict.fromkeys(group.benchmark for model in results.models for group in model.groups)
    )


def _bars(results: EvaluationResults, benchmark: str) -> str:
    """Return a drawing with a bar per subject and model, subjects in groups."""
    by_model = [
        {task.task: task for task in model.tasks if task.benchmark == benchmark}
        for model in results.models
    ]
    tasks = list(dict.fromkeys(name for found in by_model for name in found))
    first = next(found[tasks[0]] for found in by_model if tasks[0] in found)
    metric = main_metric(first.metrics)
    if metric is None:
        return ""
    groups = dict.fromkeys(_any_task(by_model, name).group for name in tasks)
    parts: list[str] = []
    top = 24
    for group in groups:
        if group is not None:
            parts.append(f'<text x="0" y="{top + 8}" font-weight="600">{escape(group)}</text>')
            top += 22
        for name in (one for one in tasks if _any_task(by_model, one).group == group):
            scores = [found.get(name) for found in by_model]
            parts.append(_subject_bars(_any_task(by_model, name), scores, metric, top))
            top += _BAR_HEIGHT * len(by_model) + _BAR_GAP
    width = _LABEL_WIDTH + _PLOT_WIDTH + _VALUE_WIDTH
    axis = "".join(
        f'<line class="axis" x1="{_x(share)}" x2="{_x(share)}" y1="18" y2="{top}"/>'
        f'<text class="muted" x="{_x(share)}" y="12" text-anchor="middle">{share:.0%}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    keys = "".join(
        f'<span class="key m{number % _NUM_COLORS}"></span>{escape(model.model.name)}'
        for number, model in enumerate(results.models)
    )
    return (
        f"<h2>{escape(benchmark)}: {escape(metric)} per subject</h2>\n<p>{keys}</p>\n"
        f'<svg role="img" aria-label="{escape(benchmark)} per subject" width="{width}" '
        f'height="{top}" viewBox="0 0 {width} {top}">{axis}{"".join(parts)}</svg>'
    )


def _any_task(by_model: Sequence[dict[str, TaskScore]], name: str) -> TaskScore:
    return next(found[name] for found in by_model if name in found)


def _x(share: float) -> float:
    return round(_LABEL_WIDTH + share * _PLOT_WIDTH, 1)


def _subject_bars(
    task: TaskScore, scores: Sequence[TaskScore | None], metric: str, top: int
) -> str:
    middle = top + _BAR_HEIGHT * len(scores) / 2 + 4
    label = escape(task.subject or task.task)
    parts = [f'<text x="{_LABEL_WIDTH - 8}" y="{middle}" text-anchor="end">{label}</text>']
    for number, score in enumerate(scores):
        if score is None or metric not in score.metrics:
            continue
        found, y = score.metrics[metric], top + number * _BAR_HEIGHT
        end = _x(min(max(found.value, 0.0), 1.0))
        parts.append(
            f'<rect class="m{number % _NUM_COLORS}" x="{_LABEL_WIDTH}" y="{y}" '
            f'width="{round(end - _LABEL_WIDTH, 1)}" height="{_BAR_HEIGHT - 2}"/>'
        )
        if found.stderr:
            low, high = (_x(min(max(found.value + k * found.stderr, 0), 1)) for k in (-1, 1))
            line_y = y + (_BAR_HEIGHT - 2) / 2
            parts.append(
                f'<line class="error" x1="{low}" x2="{high}" y1="{line_y}" y2="{line_y}"/>'
            )
        text = escape(format_score(found, percent=True))
        parts.append(f'<text class="muted" x="{_x(1) + 8}" y="{y + 10}">{text}</text>')
    return "".join(parts)


def _answers(results: EvaluationResults) -> str:
    """Return the generated answers of all models, side by side."""
    prompts = list(
        dict.fromkeys(answer.prompt for model in results.models for answer in model.answers)
    )
    if not prompts:
        return ""
    by_model = [{one.prompt: one for one in model.answers} for model in results.models]
    head = "".join(f'<th class="name">{escape(m.model.name)}</th>' for m in results.models)
    rows: list[str] = []
    for prompt in prompts:
        cells = [f'<td class="text"><b>{escape(prompt)}</b></td>']
        for found in by_model:
            answer = found.get(prompt)
            text = "" if answer is None else escape(answer.answer)
            is_cut = answer is not None and answer.finish_reason == "length"
            cut = " <small>(cut)</small>" if is_cut else ""
            cells.append(f'<td class="text">{text}{cut}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>\n")
    return (
        '<h2>Answers</h2>\n<div class="wide"><table><thead><tr><th class="name">prompt</th>'
        f"{head}</tr></thead><tbody>\n{''.join(rows)}</tbody></table></div>"
    )


def _provenance(results: EvaluationResults) -> str:
    """Return hashes of models and files, an example of each prompt, and the settings."""
    models = "".join(_model_rows(model) for model in results.models)
    tasks = [task for model in results.models for task in model.tasks]
    files = {
        (task.benchmark, name): digest
        for task in tasks
        for name, digest in task.file_hashes.items()
    }
    texts = {text.name: text.hash for model in results.models for text in model.texts if text.hash}
    file_rows = "".join(
        f'<tr><td class="name">{escape(benchmark)}</td><td class="hash">{escape(name)}</td>'
        f'<td class="hash">{escape(show_hash(digest))}</td></tr>\n'
        for (benchmark, name), digest in files.items()
    )
    file_rows += "".join(
        f'<tr><td class="name">text</td><td class="hash">{escape(name)}</td>'
        f'<td class="hash">{escape(show_hash(digest))}</td></tr>\n'
        for name, digest in texts.items()
    )
    listed = (
        f"<details><summary>{len(files) + len(texts)} files and texts with their hashes</summary>"
        f"<table><tbody>{file_rows}</tbody></table></details>"
        if file_rows
        else ""
    )
    return (
        "<h2>Where this comes from</h2>\n"
        f"<table><tbody>{models}</tbody></table>\n{listed}{_example_prompts(results)}"
        f"<details><summary>settings</summary><pre>{escape(dump(results.settings))}</pre></details>"
    )


def _model_rows(model: ModelResults) -> str:
    head = (
        f'<tr class="average"><td class="name">{escape(model.model.name)}</td>'
        f'<td class="hash">{escape(model.model.source)}</td></tr>\n'
    )
    return head + "".join(
        f'<tr><td class="name">{escape(part)}</td><td class="hash">{escape(digest)}</td></tr>\n'
        for part, digest in model.model.hashes.items()
    )


def _example_prompts(results: EvaluationResults) -> str:
    """Return the first prompt of each benchmark, as the first model was given it."""
    shown: dict[str, TaskScore] = {}
    for task in results.models[0].tasks:
        shown.setdefault(task.benchmark, task)
    return "".join(
        f"<details><summary>first prompt of {escape(task.task)}: {escape(_describe(task))}"
        f"</summary><pre>{escape(task.first_prompt)}</pre></details>\n"
        for task in shown.values()
    )


def _describe(task: TaskScore) -> str:
    template = (
        f"chat template {show_hash(task.template_hash)}"
        if task.template_hash
        else "without chat template"
    )
    shots = "" if task.shots is None else f"{task.shots} examples, "
    return f"{shots}{task.method}, {template}"
