"""One trial: a training run, and what it tells Tune while it runs.

This is all that a trial's process imports: the sweep's driver has checked the run.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raytune_llama.config.errors import UserError
from raytune_llama.logs import setup_logging
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import (
    EVAL_LOSS,
    EVAL_SECONDS,
    STEP_SECONDS,
    read_metrics,
)
from raytune_llama.train.orchestration.launch import PreparedRun, launch
from raytune_llama.train.result import RetriesExhaustedError
from raytune_llama.tune.journal import TrialState, trial_dir

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0

WORST_OBJECTIVE = 1e30
"""Objective of an evaluation that is not finite: schedulers take quantiles, which infinities
break."""

OBJECTIVE_KEY = "objective"
STEP_KEY = "step"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of a run has found."""

    step: int
    """After this many optimizer steps."""

    value: float | None
    """The metric; None where it was not finite."""

    seconds: float
    """Time that the run had spent on steps and evaluations."""


@dataclass(frozen=True)
class EvaluationReader:
    """Reads a run's evaluations from its directory."""

    run_dir: Place
    """Of the run."""

    metric: str
    """Name of what is read."""

    def read_evaluations(self) -> list[Evaluation]:
        """Return all evaluations so far, except the one before the first step.

        Raises:
            ValueError: the run's evaluations have no such metric.
        """
        found: list[Evaluation] = []
        seconds = 0.0
        for record in read_metrics(self.run_dir):
            seconds += record.get(STEP_SECONDS) or 0.0
            seconds += record.get(EVAL_SECONDS) or 0.0
            if EVAL_LOSS not in record:
                continue
            if self.metric not in record:
                names = ", ".join(name for name in record if name.startswith("eval/"))
                raise UserError(f"metric: {self.metric} is not evaluated; there is {names}")
            if record["step"] > 0:
                found.append(Evaluation(int(record["step"]), record[self.metric], seconds))
        return found


class RunThread(threading.Thread):
    """Runs a training run beside what follows it.

    A thread that does not outlive its process: Tune stops a trial by ending its process, and with
    it go the workers.
    """

    def __init__(self, run: PreparedRun | None) -> None:
        """Make ready to run; None: a run that has its result already."""
        super().__init__(name="trial", daemon=True)
        self._launch = run
        self._error: BaseException | None = None

    def run(self) -> None:
        """Train."""
        try:
            if self._launch is not None:
                launch(self._launch)
        except BaseException as error:  # noqa: BLE001  # raised again by whoever waits
            self._error = error

    def check(self) -> None:
        """Raise what the run has raised, once it has ended."""
        if self._error is not None:
            raise self._error


def build_trainable(
    sweep_dir: Place, metric: str, mode: str, max_steps: int
) -> Callable[[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Return what Tune runs in a trial's process: a generator of its reports.

    Args:
        sweep_dir: of the sweep.
        metric: what trials are compared by.
        mode: "min" or "max".
        max_steps: of a trial that is not stopped.
    """

    def run_trial(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        setup_logging()
        run = RunThread(config["run"])
        follower = EvaluationReader(trial_dir(sweep_dir, config["number"]), metric)
        sign = 1.0 if mode == "min" else -1.0
        # Schedulers keep every report, the last one too, and look for both of these in it.
        last = {STEP_KEY: 1, OBJECTIVE_KEY: WORST_OBJECTIVE}
        try:
            for evaluation, state in follow_run(run, follower, max_steps):
                value = evaluation.value
                last[STEP_KEY] = evaluation.step + 1
                yield {
                    STEP_KEY: evaluation.step,
                    OBJECTIVE_KEY: WORST_OBJECTIVE if value is None else sign * value,
                    "value": value,
                    "seconds": evaluation.seconds,
                    "state": state,
                }
        except FloatingPointError as error:
            yield {**last, "state": "diverged", "cause": str(error)}
        except (ValueError, RetriesExhaustedError) as error:
            # Another attempt would end alike; or there were as many as are allowed.
            logger.exception("failed")
            yield {**last, "state": "failed", "cause": str(error)}

    return run_trial


def follow_run(
    run: RunThread, follower: EvaluationReader, last_step: int
) -> Iterator[tuple[Evaluation, TrialState]]:
    """Start a run and yield its evaluations as they come, each with the trial's state.

    The last one is held back until the run has written its result: a scheduler that stopped the
    trial for it would leave it without.

    Raises:
        Whatever the run raises.
    """
    run.start()
    seen = 0
    while True:
        is_over = not run.is_alive()
        found = follower.read_evaluations()
        for evaluation in found:
            if evaluation.value is None:
                yield evaluation, "diverged"
                return
            if seen < evaluation.step < last_step:
                seen = evaluation.step
                yield evaluation, "running"
        if is_over:
            run.check()
            if not found:
                raise UserError(f"{follower.metric}: the run has ended without an evaluation")
            yield found[-1], "finished"
            return
        run.join(POLL_SECONDS)
