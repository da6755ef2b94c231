"""One trial: a training run, and its reports to Tune while it runs.

A trial's process imports only this module: the sweep's driver has already checked the run.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from raytune_llama.config.errors import UserError
from raytune_llama.logs import setup_logging
from raytune_llama.signals import StopSignal
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import (
    EVAL_LOSS,
    EVAL_SECONDS,
    STEP_SECONDS,
    read_metrics,
)
from raytune_llama.train.orchestration.launch import PreparedRun, launch
from raytune_llama.train.result import RetriesExhaustedError, RunResult
from raytune_llama.tune.journal import TrialState, trial_dir

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0

WORST_OBJECTIVE = 1e30
"""Objective reported for a non-finite evaluation: schedulers take quantiles, which infinities
break."""

OBJECTIVE_KEY = "objective"
STEP_KEY = "step"


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation of a run."""

    step: int
    """Number of optimizer steps before the evaluation."""

    value: float | None
    """Value of the metric; None if not finite."""

    seconds: float
    """Time that the run had spent on steps and evaluations, in seconds."""


@dataclass(frozen=True)
class EvaluationReader:
    """Reads a run's evaluations from its directory."""

    run_dir: Place
    """Directory of the run."""

    metric: str
    """Name of the metric to read."""

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
                raise UserError(f"metric: {self.metric} is not evaluated; available: {names}")
            if record["step"] > 0:
                found.append(Evaluation(int(record["step"]), record[self.metric], seconds))
        return found


class RunThread(threading.Thread):
    """Trains in the background, while the run's evaluations are followed.

    A daemon thread: Tune stops a trial by ending its process, and the workers end with it.
    """

    _result: RunResult | None = None

    def __init__(self, run: PreparedRun | None, stop_signal: StopSignal | None = None) -> None:
        """Set the run to launch.

        Args:
            run: run to launch; None: it already has its result.
            stop_signal: what asks it to save and stop; None: nothing does.
        """
        super().__init__(name="trial", daemon=True)
        self._launch = run
        self._stop_signal = stop_signal
        self._error: BaseException | None = None

    @property
    def was_stopped(self) -> bool:
        """Whether the run has saved and stopped before its end."""
        return self._result is not None and self._result.status == "stopped"

    def run(self) -> None:
        """Train."""
        try:
            if self._launch is not None:
                self._result = launch(self._launch, self._stop_signal)
        except BaseException as error:  # noqa: BLE001  # raised again by `check`
            self._error = error

    def check(self) -> None:
        """Raise the error of the run, if it has failed."""
        if self._error is not None:
            raise self._error


def forward_stop(channel: Any, stop_signal: StopSignal) -> None:  # noqa: ANN401  # an actor
    """Wait until the sweep's driver asks the trials to stop, and ask this trial's run.

    Args:
        channel: a `ChannelActor` of the sweep's driver.
        stop_signal: stop signal of the run.
    """
    try:
        ray.get(channel.wait_for_stop.remote())
    except RayError as error:
        # The driver has ended, and Tune ends its trials.
        logger.debug("the sweep's driver does not answer: %s", error)
        return
    stop_signal.request()


def build_trainable(
    sweep_dir: Place,
    metric: str,
    mode: str,
    max_steps: int,
    channel: Any,  # noqa: ANN401  # an actor
) -> Callable[[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Return the trainable that Tune runs in a trial's process: a generator of reports.

    Args:
        sweep_dir: directory of the sweep.
        metric: metric by which trials are compared.
        mode: "min" or "max".
        max_steps: optimizer steps of a trial that is not stopped early.
        channel: a `ChannelActor` by which the sweep's driver asks its trials to save and stop.
    """

    def run_trial(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        setup_logging()
        stop = StopSignal()
        run = RunThread(config["run"], stop)
        threading.Thread(target=forward_stop, args=(channel, stop), daemon=True).start()
        follower = EvaluationReader(trial_dir(sweep_dir, config["number"]), metric)
        sign = 1.0 if mode == "min" else -1.0
        # Schedulers look for both keys in every report, the last one included.
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
            if run.was_stopped:
                yield {**last, "state": "interrupted"}
        except FloatingPointError as error:
            yield {**last, "state": "diverged", "cause": str(error)}
        except (ValueError, RetriesExhaustedError) as error:
            # Another attempt would fail the same way, or the retries are exhausted.
            logger.exception("trial %d failed", config["number"])
            yield {**last, "state": "failed", "cause": str(error)}

    return run_trial


def follow_run(
    run: RunThread, follower: EvaluationReader, last_step: int
) -> Iterator[tuple[Evaluation, TrialState]]:
    """Start a run and yield its evaluations as they appear, each with the trial's state.

    The last one is held back until the run has written its result: a scheduler that stopped the
    trial because of it would prevent the result. A run that is stopped before its end has no last.

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
            if run.was_stopped:
                return
            if not found:
                raise UserError(f"{follower.metric}: the run has ended without an evaluation")
            yield found[-1], "finished"
            return
        run.join(POLL_SECONDS)
