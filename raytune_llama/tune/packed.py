"""Trials that share workers: packs of runs, driven by the searcher and scheduler of the sweep.

A pack is a group of workers that holds the base model once (`train.pack`). Here its driver decides
with Tune's own schedulers which trials continue, as Tune does for trials with workers of their own;
a trial needs no process, only a thread that reads its evaluations.
"""

import logging
import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_llama.config.settings import override
from raytune_llama.signals import StopSignal
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.orchestration.launch import PreparedRun, launch
from raytune_llama.train.orchestration.pack_assignments import PackAssignments
from raytune_llama.train.result import RunResult
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.display import ProgressDisplay
from raytune_llama.tune.journal import Journal, trial_dir
from raytune_llama.tune.search import TrialSearcher, count_remaining
from raytune_llama.tune.trial import POLL_SECONDS, report_run

logger = logging.getLogger(__name__)

_Report = dict[str, Any] | BaseException | None
"""A trial's report, an error of its follower, or None after its last report."""


class PackedRun:
    """A trial's run in a pack, as its follower sees it (`FollowedRun`)."""

    def __init__(self, number: int, run: PreparedRun | None, pack: "Pack") -> None:
        """Prepare the run.

        Args:
            number: number of the trial.
            run: run to train; None: it already has its result.
            pack: pack that trains it.
        """
        self._number, self._run, self._pack = number, run, pack
        self._has_ended = threading.Event()
        self._result: RunResult | None = None

    def start(self) -> None:
        """Add the run to its pack."""
        if self._run is None:
            self._has_ended.set()
        else:
            self._pack.add(self._number, self, self._run.config)

    def leave(self) -> None:
        """End the run where it is, if it has not ended."""
        if not self._has_ended.is_set():
            self._pack.remove(self._number)
            self._has_ended.set()

    def set_result(self, result: RunResult) -> None:
        """Take the result of the run."""
        self._result = result
        self._has_ended.set()

    @property
    def was_stopped(self) -> bool:
        """Whether the run has saved and stopped before its end."""
        return self._result is not None and self._result.status == "stopped"

    def is_alive(self) -> bool:
        """Whether the run has not ended."""
        return not self._has_ended.is_set()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the end of the run."""
        self._has_ended.wait(timeout)

    def check(self) -> None:
        """Raise the error of the run, if it has failed."""
        if self._result is not None and self._result.abort_reason is not None:
            raise self._result.abort_reason.to_exception()


class Pack:
    """A group of workers for packed runs, launched when the first run is added."""

    def __init__(self, number: int, sweep_dir: Place, num_slots: int) -> None:
        """Start the actor that holds the assignments.

        Args:
            number: number of the pack in the sweep.
            sweep_dir: directory of the sweep.
            num_slots: number of runs that it trains at once.
        """
        self.number, self.num_slots = number, num_slots
        self.error: BaseException | None = None
        """Error that the workers have failed with for good."""
        self._sweep_dir = sweep_dir
        self._runs: dict[int, PackedRun] = {}
        self._lock = threading.Lock()
        self._stop_signal = StopSignal()
        actor: Any = ray.remote(PackAssignments)
        # On the driver's node, so that the loss of another node does not end it.
        node_id = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        self._assignments: Any = actor.options(num_cpus=0, scheduling_strategy=here).remote()
        self._launcher: threading.Thread | None = None
        self.has_ended = False
        """Whether the workers have ended: no run can be added any more."""
        self.is_last = False
        """Whether the workers end after the runs that they have: none is added any more."""

    def start(self, run: PreparedRun) -> None:
        """Launch the workers; `run` is any of the runs, for what they share."""
        if self._launcher is not None:
            return
        place = self._sweep_dir / "packs" / f"{self.number:04d}"
        config: AnyTrainConfig = pickle.loads(run.config)  # noqa: S301  # made by this driver
        launched = PreparedRun(
            config=pickle.dumps(override(config, {"run_dir": str(place)})),
            scale=run.scale,
            run_dir=place,
            fence=run.fence,
            assignments=self._assignments,
        )
        self._launcher = threading.Thread(
            target=self._launch, args=(launched,), name=f"pack-{self.number}", daemon=True
        )
        self._launcher.start()
        threading.Thread(target=self._take_results, daemon=True).start()

    def add(self, number: int, run: PackedRun, config: bytes) -> None:
        """Add a run; it starts between two steps of the others."""
        with self._lock:
            if self.has_ended:
                run.set_result(RunResult("stopped", 0))
                return
            self._runs[number] = run
        run_dir = trial_dir(self._sweep_dir, number)
        ray.get(self._assignments.add.remote(number, config, run_dir))

    def remove(self, number: int) -> None:
        """Let a run end where it is."""
        with self._lock:
            self._runs.pop(number, None)
        ray.get(self._assignments.remove.remote(number))

    def request_stop(self) -> None:
        """Ask all runs to save and stop; safe in a signal handler."""
        self._stop_signal.request()

    def finish(self) -> None:
        """Let the workers end after their last run; none is added any more."""
        if not self.is_last:
            self.is_last = True
            ray.get(self._assignments.close.remote())

    def close(self) -> None:
        """Wait for the last run and the end of the workers."""
        self.finish()
        if self._launcher is not None:
            self._launcher.join()
        ray.kill(self._assignments)

    def _launch(self, run: PreparedRun) -> None:
        try:
            launch(run, self._stop_signal)
        except BaseException as error:  # noqa: BLE001  # raised again by the driver's loop
            self.error = error
        # The workers end before the last run only if they fail for good or are asked to stop.
        with self._lock:
            self.has_ended = True
            for packed in self._runs.values():
                packed.set_result(RunResult("stopped", 0))

    def _take_results(self) -> None:
        """Pass results from the actor to the runs, until it ends."""
        while True:
            try:
                number, result = ray.get(self._assignments.next_result.remote())
            except RayError as error:
                logger.debug("pack %d takes no more results: %s", self.number, error)
                return
            with self._lock:
                run = self._runs.pop(number, None)
            if run is not None:
                run.set_result(result)


@dataclass
class RunningTrial:
    """A trial that trains in a pack."""

    number: int
    """Number of the trial."""

    pack: Pack
    """Pack that trains it."""

    slot: int
    """Its place among the runs of the pack, from 0."""

    run: PackedRun
    """Its run."""

    trial: Trial
    """What the scheduler knows it by."""

    last: dict[str, Any] = field(default_factory=dict)
    """Its last report."""


class TrialRecorder(Protocol):
    """Takes the reports and ends of trials."""

    def record_report(self, number: int, report: Mapping[str, Any]) -> None:
        """Record an evaluation of a trial."""
        ...

    def record_end(self, number: int, report: Mapping[str, Any]) -> None:
        """Record how a trial has ended, from its last report."""
        ...


class PackedTrials:
    """Runs the trials of a sweep in packs, until all have ended or it is interrupted."""

    def __init__(
        self,
        sweep: SweepConfig,
        journal: Journal,
        searcher: TrialSearcher,
        scheduler: TrialScheduler,
        recorder: TrialRecorder,
        *,
        others: Sequence[str],
    ) -> None:
        """Set what decides about the trials.

        Args:
            sweep: config of the sweep.
            journal: journal of the sweep.
            searcher: gives the next trial.
            scheduler: decides after each evaluation whether a trial continues.
            recorder: takes reports and ends.
            others: metrics to report besides that of the sweep.
        """
        self._sweep, self._journal, self._others = sweep, journal, others
        self._searcher, self._scheduler, self._recorder = searcher, scheduler, recorder
        self._running: dict[int, RunningTrial] = {}
        self._reports: queue.SimpleQueue[tuple[int, _Report]] = queue.SimpleQueue()

    def run_in(self, num_packs: int, num_slots: int, display: ProgressDisplay) -> None:
        """Run the trials in packs.

        Args:
            num_packs: number of packs.
            num_slots: number of trials that each trains at once.
            display: shows the progress.

        Raises:
            Whatever the workers of a pack have failed with for good.
        """
        logger.info(
            "%d trials remaining, at most %d at a time in each of %d packs",
            count_remaining(self._sweep, self._journal),
            num_slots,
            num_packs,
        )
        with (
            open_packs(self._sweep.place, num_packs, num_slots, self._searcher) as packs,
            display.show(),
        ):
            self._run(packs, display.refresh)

    def _run(self, packs: Sequence[Pack], refresh: Callable[[], None]) -> None:
        is_over = False
        while self._running or not is_over:
            for pack in packs:
                if pack.error is not None:
                    raise pack.error
            is_over = self._fill(packs)
            for pack in packs:
                # Another pack may wait for the resources of its workers.
                if is_over and not self._slots(pack):
                    pack.finish()
            self._take_reports()
            refresh()

    def _fill(self, packs: Sequence[Pack]) -> bool:
        """Start trials in free slots; return whether the searcher has no more."""
        packs = [pack for pack in packs if not (pack.has_ended or pack.is_last)]
        if not packs:
            # They were asked to stop, or too few nodes remain for their workers.
            return True
        limit = self._sweep.max_concurrent or sum(pack.num_slots for pack in packs)
        while len(self._running) < limit:
            # Spread over the packs: a round of a pack takes as long as its runs are many.
            num_used, _, pack = min((len(self._slots(each)), each.number, each) for each in packs)
            if num_used >= pack.num_slots:
                return False
            suggested = self._searcher.suggest("")
            if not isinstance(suggested, dict):
                return True
            self._start(suggested["number"], suggested["run"], pack)
        return False

    def _slots(self, pack: Pack) -> set[int]:
        return {each.slot for each in self._running.values() if each.pack is pack}

    def _start(self, number: int, prepared: PreparedRun | None, pack: Pack) -> None:
        used = self._slots(pack)
        slot = next(slot for slot in range(pack.num_slots) if slot not in used)
        trial = Trial("packed", trial_id=f"packed-{number}", stub=True)
        running = RunningTrial(number, pack, slot, PackedRun(number, prepared, pack), trial)
        self._running[number] = running
        self._scheduler.on_trial_add(_NOBODY, trial)
        if prepared is not None:
            self._journal.join(number, pack.number, slot)
            pack.start(prepared)
        threading.Thread(target=self._follow, args=(running,), daemon=True).start()

    def _follow(self, running: RunningTrial) -> None:
        """Put the reports of a trial into the queue; in the trial's thread."""
        number = running.number
        try:
            for report in report_run(self._sweep, number, running.run, self._others):
                self._reports.put((number, report))
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread
            self._reports.put((number, error))
        else:
            self._reports.put((number, None))

    def _take_reports(self) -> None:
        """Wait a moment for reports, and act on all that have come."""
        try:
            self._take(*self._reports.get(timeout=POLL_SECONDS))
            while True:
                self._take(*self._reports.get_nowait())
        except queue.Empty:
            return

    def _take(self, number: int, report: _Report) -> None:
        running = self._running.get(number)
        if running is None:
            # It was stopped, and its thread has seen one more evaluation.
            return
        if isinstance(report, BaseException):
            raise report
        if report is None:
            self._end(running)
            return
        running.last = report
        if report["state"] == "interrupted":
            return
        self._recorder.record_report(number, report)
        decision = self._scheduler.on_trial_result(_NOBODY, running.trial, report)
        if decision == TrialScheduler.STOP and report["state"] == "running":
            self._end(running)

    def _end(self, running: RunningTrial) -> None:
        """Record the end of a trial, and free its slot."""
        del self._running[running.number]
        running.run.leave()
        if running.last.get("state") == "interrupted":
            # Its pack has ended before it: another one may continue it.
            self._searcher.put_back(running.number)
        else:
            self._scheduler.on_trial_complete(_NOBODY, running.trial, running.last)
        self._recorder.record_end(running.number, running.last)


_NOBODY: Any = None
"""In place of Tune's controller, which these schedulers do not use."""


@contextmanager
def open_packs(
    sweep_dir: Place, num_packs: int, num_slots: int, searcher: TrialSearcher
) -> Iterator[list[Pack]]:
    """Open packs that SIGINT, SIGHUP or SIGTERM asks to save and stop; wait for their workers.

    Args:
        sweep_dir: directory of the sweep.
        num_packs: number of packs.
        num_slots: number of runs that each trains at once.
        searcher: searcher that then gives no more trials.
    """
    packs = [Pack(number, sweep_dir, num_slots) for number in range(num_packs)]
    plan = "saving the running trials after this step, then stopping"

    def request() -> None:
        searcher.stop()
        for pack in packs:
            pack.request_stop()

    with StopSignal(plan) as stop:
        stop.set_callback(request)
        try:
            yield packs
        except BaseException:
            request()
            raise
        finally:
            for pack in packs:
                pack.close()
