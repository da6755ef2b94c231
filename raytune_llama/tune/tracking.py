"""A sweep in the trackers of its base config: a run of its own, and one below it for each trial."""

import contextlib
from collections.abc import Iterator

import raytune_llama
from raytune_llama.config.settings import to_dict
from raytune_llama.storage.files import OUTPUT_MANIFEST
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.identity import read_identity
from raytune_llama.train.monitoring.trackers.description import describe_run, name_tags, redact
from raytune_llama.train.monitoring.trackers.feed import RunProgress
from raytune_llama.train.monitoring.trackers.session import ended_by, track
from raytune_llama.train.monitoring.trackers.tracker import EndState, TrackedRun
from raytune_llama.tune.config import SweepConfig, build_trial_config
from raytune_llama.tune.journal import Journal, TrialRecord, trial_dir


class TrackedSweep:
    """A sweep and its trials as they are now, for `track`; all trials, however they run."""

    def __init__(self, sweep: SweepConfig, base: AnyTrainConfig, journal: Journal) -> None:
        """Describe the sweep.

        Args:
            sweep: config of the sweep.
            base: config of every trial, without its sample, with absolute paths.
            journal: journal of the sweep, which its driver keeps up to date.
        """
        tags = {
            "run_dir": str(sweep.place),
            "version": raytune_llama.__version__,
            "base": base.model.path,
            "store": base.data.store_dir,
        }
        self._run = TrackedRun(
            run_dir=sweep.place,
            name=sweep.place.name,
            job="sweep",
            config=redact(to_dict(sweep)),
            tags=name_tags(tags),
        )
        self._base, self._journal = base, journal
        self._trials: dict[int, TrackedRun] = {}
        self._ended: EndState | None = None
        self._has_started = False

    def start(self) -> None:
        """Note that the directory belongs to this driver; nothing is sent before."""
        self._has_started = True

    def end(self, state: EndState) -> None:
        """Set how the sweep has ended; the first call counts."""
        self._ended = self._ended or state

    def progress(self) -> list[RunProgress]:
        """Return the sweep, and the trials that have started."""
        if not self._has_started:
            return []
        found = [RunProgress(self._run, self._ended)]
        for number, trial in list(self._journal.trials.items()):
            run = self._describe_trial(number, trial)
            if run is not None:
                found.append(RunProgress(run, self._end_of(trial), self._result_of(run)))
        return found

    def _describe_trial(self, number: int, trial: TrialRecord) -> TrackedRun | None:
        """Return a trial; None before its run was prepared."""
        if number not in self._trials:
            place = trial_dir(self._run.run_dir, number)
            identity = read_identity(place)
            if not identity:
                return None
            config = build_trial_config(self._base, trial.sample, place)
            self._trials[number] = describe_run(config, identity, self._run)
        return self._trials[number]

    def _end_of(self, trial: TrialRecord) -> EndState | None:
        if trial.state == "running":
            # A trial that has not ended continues when the sweep is resumed.
            return "interrupted" if self._ended else None
        return trial.state

    def _result_of(self, run: TrackedRun) -> Place | None:
        result = run.run_dir / self._base.result_name
        return result if (result / OUTPUT_MANIFEST).status() is not None else None


@contextlib.contextmanager
def track_sweep(
    sweep: SweepConfig, base: AnyTrainConfig, journal: Journal
) -> Iterator[TrackedSweep]:
    """Send a sweep and its trials to the trackers of its base during the block; see `TrackedSweep`.

    Nothing is sent before `TrackedSweep.start` was called.
    """
    tracked = TrackedSweep(sweep, base, journal)
    with track(base.logging, tracked.progress), ended_by(tracked.end):
        yield tracked
