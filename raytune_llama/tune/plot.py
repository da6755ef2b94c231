"""Plots of a sweep, and the HTML page that shows them."""

import base64
import io
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, EVAL_TEXT_LOSS, is_accuracy
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.findings import STATE_NAMES, Finding, Importances
from raytune_llama.tune.journal import TrialRecord
from raytune_llama.tune.pack_table import render_packs
from raytune_llama.tune.results import check_trial, find_best, score_trial, shown_metrics
from raytune_llama.tune.space import Distribution

SWEEP_PLOT_FILE = "sweep.png"
SWEEP_PAGE_FILE = "sweep.html"

_BEST_COLOR = "C3"
_MAX_SPREAD = 3.0
"""Range of the drawn evaluations, as a multiple of the range of the better half of the trials."""

_END_MARKS = {
    "stopped": ("x", "stopped early here"),
    "diverged": ("^", "diverged after this"),
    "failed": ("v", "failed after this"),
}
"""Marker and label of the last evaluation of a trial that did not finish, by its state."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2127; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } img { max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .9em; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d8dde3; text-align: right; }
pre { background: #f3f5f7; padding: .4rem .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
th { color: #56606b; font-weight: 600; } tr.best td { background: #e8f1fb; }
tr.failed td, tr.diverged td { color: #a03a22; } td.cause { text-align: left; }
tr.violating td { color: #8a8f96; }
"""


def write_page(
    sweep: SweepConfig,
    base: AnyTrainConfig,
    trials: Sequence[TrialRecord],
    importances: Importances,
    findings: Sequence[Finding],
) -> Place | None:
    """Write `sweep.png` and, with it and the leaderboard, `sweep.html`.

    Args:
        sweep: config of the sweep.
        base: config of every trial, without its sample.
        trials: trials, best first.
        importances: importances of the fields.
        findings: what the sweep found, listed above the picture.

    Returns:
        The page, or None if no trial has been evaluated yet.
    """
    if not any(trial.values for trial in trials):
        return None
    picture = draw_sweep(sweep, base, trials, importances)
    (sweep.place / SWEEP_PLOT_FILE).write_bytes(picture)
    page = sweep.place / SWEEP_PAGE_FILE
    page.write_bytes(render_page(sweep, base, trials, picture, findings).encode())
    return page


def draw_sweep(
    sweep: SweepConfig,
    base: AnyTrainConfig,
    trials: Sequence[TrialRecord],
    importances: Importances,
) -> bytes:
    """Draw curves, importances and parallel coordinates; return a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    upper, lower = halves
    curves, bars = upper.subplots(1, 2, width_ratios=[2, 1])
    _draw_curves(curves, sweep, base, trials)
    _draw_importances(bars, importances)
    _draw_coordinates(lower, sweep, base, trials)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _draw_curves(
    axes: Any,  # noqa: ANN401
    sweep: SweepConfig,
    base: AnyTrainConfig,
    trials: Sequence[TrialRecord],
) -> None:
    """Draw each trial's evaluations; the best last, on top of the others."""
    drawn = [trial for trial in trials if trial.values]
    best = find_best(sweep, base, trials)
    labelled: set[str] = set()
    for trial in reversed(drawn):
        steps, values = list(trial.values), list(trial.values.values())
        is_best = trial is best
        color = _BEST_COLOR if is_best else "0.65"
        label = f"best: trial {trial.number}" if is_best else "other trials"
        axes.plot(
            *(steps, values),
            color=color,
            marker=".",
            linewidth=1 + is_best,
            label=None if label in labelled else label,
        )
        labelled.add(label)
        if trial.state in _END_MARKS:
            mark, label = _END_MARKS[trial.state]
            shown = None if label in labelled else label
            axes.plot(steps[-1], values[-1], color="k", marker=mark, linestyle="", label=shown)
            labelled.add(label)
    axes.set_title("evaluations of each trial", fontsize="medium")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(_metric_label(sweep.metric), parse_math=False)
    handles, texts = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], texts[::-1], fontsize="small")
    axes.grid(alpha=0.3)
    _limit_scale(axes, sweep, drawn)


def _limit_scale(axes: Any, sweep: SweepConfig, drawn: Sequence[TrialRecord]) -> None:  # noqa: ANN401
    """Leave out values so bad that the better half of the trials would be one line; count them."""
    values = [value for trial in drawn for value in trial.values.values()]
    shown = [v for trial in drawn[: (len(drawn) + 1) // 2] for v in trial.values.values()]
    is_min = sweep.mode == "min"
    good, bad = (min(shown), max(shown)) if is_min else (max(shown), min(shown))
    limit = good + _MAX_SPREAD * (bad - good)
    inside = [value for value in values if (value <= limit if is_min else value >= limit)]
    if len(inside) == len(values) or limit == good:
        return
    worst = max(inside) if is_min else min(inside)
    margin = 0.05 * (worst - good)
    ends = (good - margin, worst + margin)
    axes.set_ylim(min(ends), max(ends))
    title = f"evaluations of each trial (off the scale: {len(values) - len(inside)})"
    axes.set_title(title, fontsize="medium")


def _draw_importances(axes: Any, importances: Importances) -> None:  # noqa: ANN401
    axes.set_title("importance of each field (PED-ANOVA)", fontsize="medium")
    if importances.reason is not None:
        text = textwrap.fill(importances.reason, 23)
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    shares = dict(reversed(list(importances.shares.items())))
    for field, share in shares.items():
        may_be_chance = field in importances.by_chance
        bar = axes.barh(_field_label(field), share, color="0.75" if may_be_chance else "C0")
        text = f"{share:.0%}{' (may be chance)' if may_be_chance else ''}"
        axes.bar_label(bar, [text], padding=3)
    axes.set_xlim(0, 1.2)
    axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_xlabel(f"share of the total, from {importances.num_trials} trials")


def _draw_coordinates(
    figure: Any,  # noqa: ANN401
    sweep: SweepConfig,
    base: AnyTrainConfig,
    trials: Sequence[TrialRecord],
) -> None:
    """Draw one line per trial through its value on each field's axis, colored by its score."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = figure.subplots()
    fields = [name for name, kind in sweep.space.items() if kind.multiple_of is None]
    scored = [
        (trial, found[1]) for trial in trials if (found := score_trial(trial, base, sweep.mode))
    ]
    if not scored:
        axes.set_axis_off()
        return
    best = find_best(sweep, base, trials)
    scores = [value for _, value in scored]
    spread = Normalize(min(scores), max(scores) if max(scores) > min(scores) else None)
    colors: Any = ScalarMappable(spread, "viridis" if sweep.mode == "min" else "viridis_r")
    for trial, value in reversed(scored):
        heights = [sweep.space[name].position(trial.sample[name]) for name in fields]
        heights.append(float(spread(value)) if max(scores) > min(scores) else 0.5)
        is_best = trial is best
        axes.plot(
            heights,
            color=_BEST_COLOR if is_best else colors.to_rgba(value),
            linewidth=3 if is_best else 1.5,
            alpha=1 if is_best else 0.8,
            label=f"best: trial {trial.number}" if is_best else None,
        )
    names = [*map(_field_label, fields), sweep.metric]
    for position, name in enumerate(fields):
        kind = sweep.space[name]
        names[position] += "\n(log scale)" if kind.loguniform else ""
        for height, text in _ticks(kind):
            _write_tick(axes, position, height, text)
    for height, text in _ends([min(scores), max(scores)]) if max(scores) > min(scores) else ():
        _write_tick(axes, len(fields), height, text)
    for position in range(len(names)):
        axes.axvline(position, color="0.6", linewidth=0.8)
    axes.set_title("values of each trial, one line per trial with a score", fontsize="medium")
    axes.set_xticks(range(len(names)), names)
    axes.margins(x=0.06)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([])
    if best is not None:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
        axes.legend(fontsize="small", **place)
    if max(scores) > min(scores):
        figure.colorbar(colors, ax=axes, label=_metric_label(sweep.metric), pad=0.01)


def _write_tick(axes: Any, position: int, height: float, text: str) -> None:  # noqa: ANN401
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    axes.annotate(
        text,
        (position, height),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize="small",
        va="center",
        bbox=box,
        parse_math=False,
    )


def _ticks(kind: Distribution) -> list[tuple[float, str]]:
    if kind.choice is not None:
        texts = [textwrap.shorten(str(value), 24, placeholder="...") for value in kind.choice]
        return [
            (kind.position(value), text) for value, text in zip(kind.choice, texts, strict=True)
        ]
    low, high = kind.loguniform or kind.uniform or kind.randint or (0, 1)
    return _ends([low, high])


def _ends(values: list[float]) -> list[tuple[float, str]]:
    return [(0.0, f"{values[0]:.4g}"), (1.0, f"{values[1]:.4g}")]


def _field_label(field: str) -> str:
    """Return a dotted field on two lines, so that neighbors on an axis don't overlap."""
    section, dot, name = field.rpartition(".")
    return f"{section}{dot}\n{name}" if dot else field


def _metric_label(name: str) -> str:
    if is_accuracy(name):
        return f"{name} (share of right answers)"
    is_loss = name.startswith((EVAL_LOSS, EVAL_TEXT_LOSS))
    return f"{name} ({'nats per token' if is_loss else 'bits per byte of text'})"


def render_page(
    sweep: SweepConfig,
    base: AnyTrainConfig,
    trials: Sequence[TrialRecord],
    picture: bytes,
    findings: Sequence[Finding],
) -> str:
    """Return the page as a single HTML file without scripts."""
    others = shown_metrics(sweep, trials)
    head = ["trial", "state", *map(_metric_label, [sweep.metric, *others]), "at step", "seconds"]
    head += ["violates"] if sweep.constraints else []
    names = "".join(f"<th>{escape(name)}</th>" for name in [*head, *sweep.space, "cause"])
    best = find_best(sweep, base, trials)
    rows = [_trial_row(sweep, base, trial, others, is_best=trial is best) for trial in trials]
    image = base64.b64encode(picture).decode()
    items = "\n".join(f"<li>{_finding_item(finding)}</li>" for finding in findings)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Sweep</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Sweep <code>{escape(sweep.place.name)}</code></h1>\n"
        f"<ul>\n{items}\n</ul>\n"
        f'<img alt="curves, importance, parallel coordinates" src="data:image/png;base64,{image}">'
        f"\n<table><thead><tr>{names}</tr></thead><tbody>\n" + "\n".join(rows) + "\n"
        f"</tbody></table>\n{render_packs(sweep.place, trials)}\n</body></html>\n"
    )


def _trial_row(
    sweep: SweepConfig,
    base: AnyTrainConfig,
    trial: TrialRecord,
    others: Sequence[str],
    *,
    is_best: bool,
) -> str:
    """Return the row of a trial in the page's table, with these metrics besides the sweep's."""
    found = score_trial(trial, base, sweep.mode)
    step, value = (str(found[0]), f"{found[1]:.5f}") if found else (str(trial.step), "")
    known = trial.others.get(found[0], {}) if found else {}
    shown = [f"{other:.5f}" if (other := known.get(name)) is not None else "" for name in others]
    cells = [str(trial.number), STATE_NAMES[trial.state], value, *shown, step]
    cells.append(f"{trial.seconds:.0f}")
    violations = check_trial(sweep, base, trial)
    cells += ["; ".join(map(str, violations))] if sweep.constraints else []
    cells += [_cell(trial.sample[field]) for field in sweep.space]
    row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    classes = f"{trial.state} {'best' if is_best else ''} {'violating' if violations else ''}"
    cause = f'<td class="cause">{escape(trial.cause or "")}</td>'
    return f'<tr class="{classes}">{row}{cause}</tr>'


def _finding_item(finding: Finding) -> str:
    text = escape(finding.text)
    return text if finding.command is None else f"{text}<pre>{escape(finding.command)}</pre>"


def _cell(value: Any) -> str:  # noqa: ANN401
    return f"{value:.4g}" if isinstance(value, float) else str(value)
