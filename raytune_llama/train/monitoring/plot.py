"""Plot of a run: loss in training, of validation data and of texts, and learning rate by step."""

import io

from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import (
    EVAL_LOSS,
    EVAL_TEXT_LOSS,
    LEARNING_RATE,
    LOSS,
    read_metrics,
)

LOSS_PLOT_FILE = "loss.png"
SMOOTHING_STEPS = 20


def write_plot(run_dir: Place) -> Place:
    """Plot a run's metrics to `loss.png` in the run directory, and return its place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    steps, losses = _series(records, LOSS)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot(steps, losses, color="0.75", linewidth=0.8, label="training, each step")
    window = min(SMOOTHING_STEPS, max(1, len(losses) // 5))
    upper.plot(steps, _smoothed(losses, window), color="C0", label=f"training, mean of {window}")
    for name, color, label in ((EVAL_LOSS, "C3", "validation"), (EVAL_TEXT_LOSS, "C1", "text")):
        evaluations = _series(records, name)
        if evaluations[0]:
            upper.plot(*evaluations, color=color, marker="o", label=label)
    upper.set_ylabel("loss (nats per token)")
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot(*_series(records, LEARNING_RATE), color="C2")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    lower.grid(alpha=0.3)
    # A folder's name may contain dollar signs, which are not math.
    figure.suptitle(run_dir.name, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    file = run_dir / LOSS_PLOT_FILE
    file.write_bytes(buffer.getvalue())
    return file


def _series(records: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smoothed(values: list[float], window: int) -> list[float]:
    """Return the trailing mean at each value, over `window` values at most."""
    starts = [max(0, end - window) for end in range(1, len(values) + 1)]
    return [sum(values[a:b]) / (b - a) for b, a in enumerate(starts, start=1)]
