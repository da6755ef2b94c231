"""One trial: a training run, and its reports to Tune while it runs.

A trial's process imports only this module: the sweep's driver has already checked the run.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from raytune_llama.config.errors import UserError
from raytune_llama.logs import setup_logging
from raytune_llama.signals import StopSignal
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import (
    EVAL_SECONDS,
    STEP_SECONDS,
    read_metrics,
)
from raytune_llama.train.orchestration.launch import PreparedRun, launch
from raytune_llama.train.result import RetriesExhaustedError, RunResult
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.constraints import constrained_objective, find_violations
from raytune_llama.tune.journal import TrialState, trial_dir

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0

MAX_READ_FAILURES = 30
"""Failures in a row to read a run's metrics after which its trial fails too."""

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

    others: Mapping[int, Mapping[str, float | None]] = field(default_factory=dict)
    """Newest value of each other metric at this step, and before training as step 0."""


@dataclass(frozen=True)
class EvaluationReader:
    """Reads a run's evaluations from its directory."""

    run_dir: Place
    """Directory of the run."""

    metric: str
    """Name of the metric to read."""

    others: Sequence[str] = ()
    """Names of the other metrics to read."""

    def read_evaluations(self) -> list[Evaluation]:
        """Return all evaluations of the metric so far, except the one before the first step.

        Raises:
            ValueError: the evaluation before the first step lacks one of the metrics.
        """
        found: list[Evaluation] = []
        seconds = 0.0
        before: dict[str, float | None] = {}
        newest: dict[str, float | None] = {}
        for record in read_metrics(self.run_dir):
            seconds += record.get(STEP_SECONDS) or 0.0
            seconds += record.get(EVAL_SECONDS) or 0.0
            if EVAL_SECONDS not in record:
                continue
            step = int(record["step"])
            newest |= {name: record[name] for name in self.others if name in record}
            if step == 0:
                _check_names([self.metric, *self.others], record)
                before = dict(newest)
            elif self.metric in record:  # tasks are not part of every evaluation
                others = {0: before, step: dict(newest)} if self.others else {}
                found.append(Evaluation(step, record[self.metric], seconds, others))
        return found


def _check_names(names: Sequence[str], record: Mapping[str, float]) -> None:
    available = ", ".join(name for name in record if name.startswith("eval/"))
    for name in names:
        if name not in record:
            raise UserError(f"metric: {name} is not evaluated; available: {available}")


class FollowedRun(Protocol):
    """A run whose evaluations are followed while it trains elsewhere."""

    @property
    def was_stopped(self) -> bool:
        """Whether the run has saved and stopped before its end."""
        ...

    def start(self) -> None:
        """Start the run."""
        ...

    def is_alive(self) -> bool:
        """Whether the run has started and not ended."""
        ...

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the end of the run."""
        ...

    def check(self) -> None:
        """Raise the error of the run, if it has failed."""
        ...


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


def compute_objective(
    sweep: SweepConfig, value: float | None, others: Mapping[str, float | None]
) -> float:
    """Return what a scheduler minimizes at an evaluation.

    Args:
        sweep: config of the sweep, with its constraints.
        value: the sweep's metric; None if it is not finite.
        others: other metrics at the evaluation.
    """
    if value is None:
        return WORST_OBJECTIVE
    signed = value if sweep.mode == "min" else -value
    return constrained_objective(signed, find_violations(sweep.constraints, others))


def build_trainable(
    sweep: SweepConfig,
    others: Sequence[str],
    channel: Any,  # noqa: ANN401  # an actor
) -> Callable[[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Return the trainable that Tune runs in a trial's process: a generator of reports.

    Args:
        sweep: config of the sweep.
        others: metrics to report besides that of the sweep.
        channel: a `ChannelActor` by which the sweep's driver asks its trials to save and stop.
    """

    def run_trial(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        setup_logging()
        stop = StopSignal()
        run = RunThread(config["run"], stop)
        threading.Thread(target=forward_stop, args=(channel, stop), daemon=True).start()
        yield from report_run(sweep, config["number"], run, others)

    return run_trial


def report_run(
    sweep: SweepConfig, number: int, run: FollowedRun, others: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Start a trial's run, and yield its evaluations and its end as Tune's schedulers read them.

    Args:
        sweep: config of the sweep.
        number: number of the trial.
        run: its run.
        others: metrics to report besides that of the sweep.
    """
    follower = EvaluationReader(trial_dir(sweep.place, number), sweep.metric, others)
    # Schedulers look for both keys in every report, the last one included.
    last = {STEP_KEY: 1, OBJECTIVE_KEY: WORST_OBJECTIVE}
    try:
        for evaluation, state in follow_run(run, follower, sweep.max_steps):
            last[STEP_KEY] = evaluation.step + 1
            newest = evaluation.others.get(evaluation.step, {})
            yield {
                STEP_KEY: evaluation.step,
                OBJECTIVE_KEY: compute_objective(sweep, evaluation.value, newest),
                "value": evaluation.value,
                "others": evaluation.others,
                "seconds": evaluation.seconds,
                "state": state,
            }
        if run.was_stopped:
            yield {**last, "state": "interrupted"}
    except FloatingPointError as error:
        yield {**last, "state": "diverged", "cause": str(error)}
    except (ValueError, RetriesExhaustedError) as error:
        # Another attempt would fail the same way, or the retries are exhausted.
        logger.exception("trial %d failed", number)
        yield {**last, "state": "failed", "cause": str(error)}


def follow_run(
    run: FollowedRun, follower: EvaluationReader, last_step: int
) -> Iterator[tuple[Evaluation, TrialState]]:
    """Start a run and yield its evaluations as they appear, each with the trial's state.

    The last one is held back until the run has written its result: a scheduler that stopped the
    trial because of it would prevent the result. A run that is stopped before its end has no last.

    Raises:
        Whatever the run raises.
    """
    run.start()
    seen, failures = 0, 0
    while True:
        is_over = not run.is_alive()
        try:
            found = follower.read_evaluations()
        except OSError as error:
            # The run continues meanwhile: a storage that fails for a moment is asked again.
            failures += 1
            if failures == MAX_READ_FAILURES:
                raise
            logger.warning("cannot read the metrics of %s: %s", follower.run_dir, error)
            time.sleep(POLL_SECONDS)
            continue
        failures = 0
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
