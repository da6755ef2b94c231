"""What Tune's schedulers decide with our settings, and after a driver was started again."""

from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raytune_llama.tune.config import load_base
from raytune_llama.tune.journal import Journal
from raytune_llama.tune.scheduler import build_scheduler, replay_journal
from raytune_llama.tune.trial import OBJECTIVE_KEY, STEP_KEY, WORST_OBJECTIVE
from tests.tune.conftest import MakeSweep

NOBODY: Any = None


def begin(scheduler: TrialScheduler, name: str) -> Trial:
    trial = Trial("test", trial_id=name, stub=True)
    scheduler.on_trial_add(NOBODY, trial)
    return trial


def tell(scheduler: TrialScheduler, trial: Trial, step: int, objective: float) -> str:
    return scheduler.on_trial_result(NOBODY, trial, {STEP_KEY: step, OBJECTIVE_KEY: objective})


def scheduler_of(make_sweep: MakeSweep, **fields: object) -> TrialScheduler:
    sweep = make_sweep(scheduler=fields)
    return build_scheduler(sweep, load_base(sweep))


def test_asha_stops_the_worse_at_a_rung_and_nobody_at_the_end(make_sweep: MakeSweep) -> None:
    scheduler = scheduler_of(make_sweep, kind="asha", reduction_factor=2.0)
    good, bad = begin(scheduler, "good"), begin(scheduler, "bad")
    assert tell(scheduler, good, 3, 1.0) == "CONTINUE"
    assert tell(scheduler, bad, 3, 2.0) == "STOP"
    # The rungs are 3 and 6; at the last step a trial has its result.
    assert [tell(scheduler, good, step, 1.0) for step in (6, 9, 12)] == ["CONTINUE"] * 3
    late = begin(scheduler, "late")
    assert tell(scheduler, late, 3, 0.5) == "CONTINUE"
    assert tell(scheduler, late, 6, 3.0) == "STOP"


def test_median_stops_what_is_worse_than_most_and_never_pauses(make_sweep: MakeSweep) -> None:
    scheduler = scheduler_of(make_sweep, kind="median")
    for number in range(3):
        trial = begin(scheduler, f"t{number}")
        assert [tell(scheduler, trial, step, 1.0) for step in (3, 6)] == ["CONTINUE"] * 2
    bad = begin(scheduler, "bad")
    assert tell(scheduler, bad, 3, 2.0) == "STOP"


def test_none_stops_nobody(make_sweep: MakeSweep) -> None:
    scheduler = scheduler_of(make_sweep, kind="none")
    trials = [begin(scheduler, str(number)) for number in range(5)]
    assert {tell(scheduler, trial, 3, float(n)) for n, trial in enumerate(trials)} == {"CONTINUE"}


@pytest.mark.parametrize("kind", ["asha", "median"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_scheduler_after_a_crash_decides_by_the_journals_trials(
    make_sweep: MakeSweep, kind: str, mode: str
) -> None:
    sweep = make_sweep(scheduler={"kind": kind}, mode=mode)
    journal = Journal(sweep.place)
    sign = 1.0 if mode == "min" else -1.0
    for number in range(4):
        journal.start(number, {})
        for step in (3, 6, 9, 12):
            journal.report(number, step, sign * (1.0 + 0.01 * number), 1.0)
        journal.end(number, "finished")
    journal.start(4, {})
    journal.report(4, 3, sign * 1.5, 1.0)  # runs still, and will tell it again

    scheduler = build_scheduler(sweep, load_base(sweep))
    replay_journal(scheduler, journal, sweep)
    assert tell(scheduler, begin(scheduler, "bad"), 3, 1.5) == "STOP"
    assert tell(scheduler, begin(scheduler, "good"), 3, 0.9) == "CONTINUE"

    fresh = build_scheduler(sweep, load_base(sweep))
    assert tell(fresh, begin(fresh, "bad"), 3, 1.5) == "CONTINUE"


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_scheduler_counts_diverged_trials_as_bad(make_sweep: MakeSweep, kind: str) -> None:
    scheduler = scheduler_of(make_sweep, kind=kind, reduction_factor=2.0)
    for number in range(3):
        diverged = begin(scheduler, f"diverged-{number}")
        tell(scheduler, diverged, 3, WORST_OBJECTIVE)
        scheduler.on_trial_complete(NOBODY, diverged, {STEP_KEY: 3, OBJECTIVE_KEY: WORST_OBJECTIVE})
    trials = [begin(scheduler, f"good-{number}") for number in range(4)]
    assert [tell(scheduler, trial, 3, 1.0) for trial in trials] == ["CONTINUE"] * 4
