"""Early stopping: Tune's schedulers, and replaying the journal of an interrupted sweep to them."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import Journal
from raytune_llama.tune.metric_checks import evaluation_interval
from raytune_llama.tune.trial import (
    OBJECTIVE_KEY,
    STEP_KEY,
    WORST_OBJECTIVE,
    compute_objective,
)


def build_scheduler(sweep: SweepConfig, base: AnyTrainConfig) -> TrialScheduler:
    """Return the Tune scheduler, which gets optimizer steps and an objective to minimize."""
    config = sweep.scheduler
    grace = config.grace_steps or evaluation_interval(sweep, base) or sweep.max_steps
    common: dict[str, Any] = {"time_attr": STEP_KEY, "metric": OBJECTIVE_KEY, "mode": "min"}
    match config.kind:
        case "asha":
            return ASHAScheduler(
                **common,
                # No rung at the last step, where stopping a trial saves nothing.
                max_t=sweep.max_steps - 1,
                grace_period=grace,
                reduction_factor=config.reduction_factor,
                stop_last_trials=False,
            )
        case "median":
            # Never pauses a trial: that would need a Tune checkpoint.
            return MedianStoppingRule(**common, grace_period=grace, min_time_slice=float("inf"))  # pyright: ignore[reportArgumentType]
        case _:
            return FIFOScheduler()


def replay_journal(scheduler: TrialScheduler, journal: Journal, sweep: SweepConfig) -> None:
    """Report the ended trials to a scheduler; resumed ones report everything again."""
    nobody: Any = None
    # The median rule rejects results of a trial that it would have stopped in this order.
    is_median = isinstance(scheduler, MedianStoppingRule)
    report: Any = scheduler.on_trial_complete if is_median else scheduler.on_trial_result
    for trial in journal.trials.values():
        if not trial.has_ended:
            continue
        ended = Trial("ended", trial_id=f"ended-{trial.number}", stub=True)
        scheduler.on_trial_add(nobody, ended)
        values = {
            step: compute_objective(sweep, value, trial.others.get(step, {}))
            for step, value in trial.values.items()
        }
        if trial.state == "diverged":
            values[trial.step + 1] = WORST_OBJECTIVE
        for step, value in values.items():
            report(nobody, ended, {STEP_KEY: step, OBJECTIVE_KEY: value})
