"""Plots of a sweep, and the HTML page that shows them."""

import base64
import io
import math
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import TrialRecord
from raytune_llama.tune.results import score_trial
from raytune_llama.tune.search import build_study, optuna_distributions
from raytune_llama.tune.space import Distribution, drawn_parameters

SWEEP_PLOT_FILE = "sweep.png"
SWEEP_PAGE_FILE = "sweep.html"

MIN_IMPORTANCE_TRIALS = 4
"""Minimum number of trials with a score for computing importances."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2127; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } img { max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .9em; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d8dde3; text-align: right; }
th { color: #56606b; font-weight: 600; } tr.best td { background: #e8f1fb; }
tr.failed td, tr.diverged td { color: #a03a22; } td.cause { text-align: left; }
"""


def write_page(
    sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord]
) -> Place | None:
    """Write `sweep.png` and, with it and the leaderboard, `sweep.html`.

    Args:
        sweep: config of the sweep.
        base: config of every trial, without its sample.
        trials: trials, best first.

    Returns:
        The page, or None if no trial has been evaluated yet.
    """
    if not any(trial.values for trial in trials):
        return None
    picture = draw_sweep(sweep, base, trials)
    (sweep.place / SWEEP_PLOT_FILE).write_bytes(picture)
    page = sweep.place / SWEEP_PAGE_FILE
    page.write_bytes(render_page(sweep, base, trials, picture).encode())
    return page


def field_importances(
    sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord]
) -> dict[str, float]:
    """Return the importance of each field of the space for the score; importances sum to 1.

    Uses PED-ANOVA (Watanabe, Bansal, Hutter 2023) on the trials that have a score; empty if there
    are too few or all scores are equal.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    scored = [
        (trial, found[1]) for trial in trials if (found := score_trial(trial, base, sweep.mode))
    ]
    if len(scored) < MIN_IMPORTANCE_TRIALS or len({value for _, value in scored}) == 1:
        return {}
    # Stopped trials count like the others here, by the score that they reached.
    study = build_study(sweep.space, sweep.mode, [])
    for trial, value in scored:
        study.add_trial(
            create_trial(
                params=drawn_parameters(sweep.space, trial.sample),
                distributions=optuna_distributions(sweep.space),
                value=value,
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def draw_sweep(sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord]) -> bytes:
    """Draw curves, parallel coordinates and importances; return a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    upper, lower = halves
    curves, bars = upper.subplots(1, 2, width_ratios=[2, 1])
    _draw_curves(curves, sweep, trials)
    _draw_importances(bars, field_importances(sweep, base, trials))
    _draw_coordinates(lower.subplots(), sweep, base, trials)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _draw_curves(axes: Any, sweep: SweepConfig, trials: Sequence[TrialRecord]) -> None:  # noqa: ANN401
    # The best is drawn last, on top of the others.
    for position, trial in reversed(list(enumerate(trials))):
        if not trial.values:
            continue
        steps, values = list(trial.values), list(trial.values.values())
        is_best = position == 0
        color = "C3" if is_best else "0.7"
        label = f"best: trial {trial.number}" if is_best else None
        axes.plot(steps, values, color=color, marker=".", linewidth=1 + is_best, label=label)
        if trial.state == "stopped":
            axes.plot(steps[-1], values[-1], color=color, marker="x")
    axes.set_xlabel("optimizer step (x: stopped)")
    axes.set_ylabel(sweep.metric, parse_math=False)
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_importances(axes: Any, parts: dict[str, float]) -> None:  # noqa: ANN401
    axes.set_title("importance (PED-ANOVA)", fontsize="medium")
    if not parts:
        axes.text(0.5, 0.5, "too few trials", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    fields = list(parts)[::-1]
    axes.barh(fields, [parts[field] for field in fields], color="C0")
    axes.set_xlim(0, 1)


def _draw_coordinates(
    axes: Any,  # noqa: ANN401
    sweep: SweepConfig,
    base: AnyTrainConfig,
    trials: Sequence[TrialRecord],
) -> None:
    """Draw one line per trial through its value on each field's axis, colored by its score."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    fields = [name for name, kind in sweep.space.items() if kind.multiple_of is None]
    scored = [
        (trial, found[1]) for trial in trials if (found := score_trial(trial, base, sweep.mode))
    ]
    if not scored:
        axes.set_axis_off()
        return
    scores = [value for _, value in scored]
    spread = Normalize(min(scores), max(scores) if max(scores) > min(scores) else None)
    colors = colormaps["viridis" if sweep.mode == "max" else "viridis_r"]
    for trial, value in reversed(scored):
        heights = [_height(sweep.space[name], trial.sample[name]) for name in fields]
        heights.append(float(spread(value)) if max(scores) > min(scores) else 0.5)
        axes.plot(heights, color=colors(spread(value)), linewidth=1.5, alpha=0.8)
    names = [*fields, sweep.metric]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([])
    for position, name in enumerate(names):
        axes.axvline(position, color="0.6", linewidth=0.8)
        ends = [min(scores), max(scores)] if name == sweep.metric else None
        for height, text in _ticks(sweep.space[name]) if ends is None else _ends(ends):
            axes.annotate(text, (position, height), fontsize="small", va="center")


def _height(kind: Distribution, value: Any) -> float:  # noqa: ANN401
    """Return the position of a value on its axis, from 0 to 1."""
    if kind.choice is not None:
        return kind.choice_index(value) / max(len(kind.choice) - 1, 1)
    if kind.loguniform is not None:
        low, high = map(math.log, kind.loguniform)
        return (math.log(value) - low) / (high - low)
    low, high = kind.uniform or kind.randint or (0.0, 1.0)
    return (value - low) / (high - low)


def _ticks(kind: Distribution) -> list[tuple[float, str]]:
    if kind.choice is not None:
        return [(_height(kind, value), f" {value}") for value in kind.choice]
    low, high = kind.loguniform or kind.uniform or kind.randint or (0, 1)
    return _ends([low, high])


def _ends(values: list[float]) -> list[tuple[float, str]]:
    return [(0.0, f" {values[0]:.4g}"), (1.0, f" {values[1]:.4g}")]


def render_page(
    sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord], picture: bytes
) -> str:
    """Return the page as a single HTML file without scripts."""
    fields = list(sweep.space)
    head = ["trial", "state", sweep.metric, "at step", "seconds", *fields, "cause"]
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    rows: list[str] = []
    for position, trial in enumerate(trials):
        found = score_trial(trial, base, sweep.mode)
        step, value = (str(found[0]), f"{found[1]:.5f}") if found else (str(trial.step), "")
        cells = [str(trial.number), trial.state, value, step, f"{trial.seconds:.0f}"]
        cells += [_cell(trial.sample[field]) for field in fields]
        best = "best" if position == 0 and found else ""
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        cause = f'<td class="cause">{escape(trial.cause or "")}</td>'
        rows.append(f'<tr class="{trial.state} {best}">{row}{cause}</tr>')
    image = base64.b64encode(picture).decode()
    counts = {state: sum(trial.state == state for trial in trials) for state in _STATES}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Sweep</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Sweep <code>{escape(sweep.place.name)}</code></h1>\n"
        f"<p>{len(trials)} trials of up to {sweep.max_steps} steps: {summary}.</p>\n"
        f'<img alt="curves, importance, parallel coordinates" src="data:image/png;base64,{image}">'
        f"\n<table><thead><tr>{names}</tr></thead><tbody>\n" + "\n".join(rows) + "\n"
        "</tbody></table>\n</body></html>\n"
    )


_STATES = ("finished", "stopped", "diverged", "failed", "running")


def _cell(value: Any) -> str:  # noqa: ANN401
    return f"{value:.4g}" if isinstance(value, float) else str(value)
