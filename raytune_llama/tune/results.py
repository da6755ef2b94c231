"""Results of a sweep: the leaderboard and the best trial's config."""

import csv
import io
import shlex
from collections.abc import Sequence

from raytune_llama.config.settings import override, to_yaml
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.tune.config import SweepConfig, build_trial_config
from raytune_llama.tune.constraints import Violation, find_violations, sum_violations
from raytune_llama.tune.journal import TrialRecord, trial_dir

LEADERBOARD_FILE = "leaderboard.csv"
BEST_FILE = "best.yaml"
RESOLVED_SWEEP_FILE = "sweep.yaml"
"""The sweep's own config, in its directory."""
BEST_RUN = "best"
"""Subdirectory of the sweep for a run of the best trial's config."""


def score_trial(trial: TrialRecord, base: AnyTrainConfig, mode: str) -> tuple[int, float] | None:
    """Return the step and the metric by which a trial is ranked, or None if it has none.

    The newest evaluation, since the result of a run is its last step; the best one if runs keep
    the best (`checkpoint.result: best`).
    """
    if not trial.values or trial.state in {"failed", "diverged"}:
        return None
    if base.checkpoint.result == "best":
        best = min if mode == "min" else max
        value = best(trial.values.values())
        return next(step for step, found in trial.values.items() if found == value), value
    return trial.step, trial.values[trial.step]


def check_trial(
    sweep: SweepConfig, base: AnyTrainConfig, trial: TrialRecord
) -> tuple[Violation, ...]:
    """Return the constraints that a trial with a score violates at the step of its score."""
    found = score_trial(trial, base, sweep.mode)
    return find_violations(sweep.constraints, trial.others.get(found[0], {})) if found else ()


def rank_trials(
    sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord]
) -> list[TrialRecord]:
    """Return the trials, best first.

    Those that violate a constraint follow the others, the nearest to meeting it first; those
    without a score come last.
    """
    sign = 1.0 if sweep.mode == "min" else -1.0

    def key(trial: TrialRecord) -> tuple[bool, float, float, int]:
        found = score_trial(trial, base, sweep.mode)
        excess = sum_violations(check_trial(sweep, base, trial))
        return found is None, excess, sign * found[1] if found else 0.0, trial.number

    return sorted(trials, key=key)


def find_best(
    sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord]
) -> TrialRecord | None:
    """Return the best trial; None if no trial has a score and meets all constraints.

    Args:
        sweep: config of the sweep.
        base: config of every trial, without its sample.
        trials: trials, best first.
    """
    best = trials[0] if trials else None
    if best is None or score_trial(best, base, sweep.mode) is None:
        return None
    return None if check_trial(sweep, base, best) else best


def shown_metrics(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> list[str]:
    """Return the metrics to show besides the sweep's: limited ones, and others of the trials."""
    others = [name for trial in trials for found in trial.others.values() for name in found]
    return [name for name in dict.fromkeys([*sweep.constraints, *others]) if name != sweep.metric]


def write_leaderboard(
    sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord]
) -> Place:
    """Write `leaderboard.csv` with one row per trial, best first; return its place.

    A trial that violates a constraint, or has no score, has no rank.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    others = shown_metrics(sweep, trials)
    head = ["rank", "trial", "state", sweep.metric, *others, "at_step", "last_step", "seconds"]
    violated = ["violates"] if sweep.constraints else []
    writer.writerow([*head, *violated, *sweep.space, "run_dir", "cause"])
    for position, trial in enumerate(rank_trials(sweep, base, trials), start=1):
        found = score_trial(trial, base, sweep.mode)
        step, value = found or ("", "")
        violations = check_trial(sweep, base, trial)
        rank = position if found and not violations else ""
        shown = trial.others.get(found[0], {}) if found else {}
        row = [rank, trial.number, trial.state, value, *(shown.get(name) for name in others)]
        row += [step, trial.step, f"{trial.seconds:.1f}"]
        row += ["; ".join(map(str, violations))] if sweep.constraints else []
        row += [trial.sample[field] for field in sweep.space]
        writer.writerow([*row, trial_dir(sweep.place, trial.number), trial.cause or ""])
    file = sweep.place / LEADERBOARD_FILE
    file.write_bytes(buffer.getvalue().encode())
    return file


def build_best_config(
    sweep: SweepConfig, base: AnyTrainConfig, best: TrialRecord
) -> AnyTrainConfig:
    """Return the config of a run that repeats the best trial, up to the step where it ended."""
    config = build_trial_config(base, best.sample, sweep.place / BEST_RUN)
    return override(config, {"stop_step": best.step if best.step < sweep.max_steps else None})


def write_best(sweep: SweepConfig, base: AnyTrainConfig, best: TrialRecord) -> Place:
    """Write `best.yaml`, a complete config for the sweep's job; return its place."""
    found = score_trial(best, base, sweep.mode)
    assert found is not None
    step, value = found
    horizon = f"its learning rate schedule spans {sweep.max_steps} steps"
    file = sweep.place / BEST_FILE
    # Configs are read from disks only.
    run = shlex.join(["raytune", sweep.job, str(file)])
    if not file.is_local:
        run = f"copy it to the current folder, then raytune {sweep.job} {BEST_FILE}"
    head = [
        f"Best trial of a sweep: trial {best.number}, {best.state} at step {best.step}; {horizon}.",
        f"{sweep.metric} {value!r} at step {step}.",
        f"Run it: {run}",
    ]
    text = "".join(f"# {line}\n" for line in head) + to_yaml(build_best_config(sweep, base, best))
    file.write_bytes(text.encode())
    return file
