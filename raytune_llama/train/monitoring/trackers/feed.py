"""Sends runs to one tracker, from what they write to their directories.

    with Feed(tracker, source) as feed:     # a thread of its own
        ...                                 # train
    # sent, or reported what was not

`metrics.jsonl` is the queue: it has every value, whatever the tracker does. So nothing is dropped
while a tracker is down, memory is bounded, and what is left at the end can be sent later. A resumed
run continues in the same run of the tracker.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import TracebackType
from typing import Self

from raytune_llama.logs import waiting
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import read_metrics
from raytune_llama.train.monitoring.trackers.description import (
    END_FILES,
    START_FILES,
    end_tags,
    redact_file,
)
from raytune_llama.train.monitoring.trackers.state import SentState
from raytune_llama.train.monitoring.trackers.tail import MetricsTail
from raytune_llama.train.monitoring.trackers.tracker import (
    EndState,
    MetricPoint,
    MissingRunError,
    OpenRun,
    RefusedError,
    TrackedRun,
    Tracker,
    UnreachableError,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between looks at the run directories."""

RETRY_SECONDS = 5.0
"""Seconds between attempts while a tracker does not answer."""

CLOSE_SECONDS = 60.0
"""Seconds that the end of a run waits for its trackers at most."""

RECORD_SECONDS = 10.0
"""Seconds between records of what was sent; a killed driver sends these values again."""

BATCH_POINTS = 1000
"""Values per request; MLflow's limit."""


@dataclass(frozen=True)
class RunProgress:
    """A run, and how it has ended."""

    run: TrackedRun
    """The run."""

    ended: EndState | None = None
    """How it has ended; None: it has not."""

    result: Place | None = None
    """Directory of its result; None: it has none."""


Source = Callable[[], Sequence[RunProgress]]
"""Returns all runs to send, a sweep before its trials; called about once per second."""


class FollowedRun:
    """Sends one run to one tracker; continues after errors where it has stopped."""

    def __init__(self, run: TrackedRun, tracker: Tracker) -> None:
        """Read what was sent at earlier starts."""
        self._run, self._tracker = run, tracker
        self._tail = MetricsTail(run.run_dir)
        self._state = SentState.read(run.run_dir, tracker.key)
        if self._state.address is not None and not tracker.is_own(self._state.address):
            logger.info("%s of %s is new: logging from the first step", tracker.name, run.run_dir)
            self._state = SentState()
        self._open: OpenRun | None = None
        self._pending: list[MetricPoint] = []
        self._uploaded: set[str] = set()
        self._recorded_at = 0.0
        self.num_refused = 0
        """Number of values and files that the tracker has refused."""
        self.is_done = False
        """Whether the run has ended and everything has been sent."""

    @property
    def tracker_id(self) -> str | None:
        """Identifier of the run in the tracker; None before the tracker was reached."""
        return self._state.address.id if self._state.address else None

    def send(self, progress: RunProgress, parent: str | None) -> None:
        """Send what is new.

        Args:
            progress: the run now.
            parent: identifier of its sweep's run.

        Raises:
            UnreachableError: the tracker does not answer.
        """
        is_final = progress.ended not in {None, "interrupted"}
        if self._open is None and is_final and self._state.ended == progress.ended:
            self.is_done = True  # by an earlier driver
            return
        try:
            self._send_all(self._open or self._start(parent), progress)
        except UnreachableError:
            if self._open is not None:
                self._record()
            # Opened again once the tracker answers: it may have lost the run.
            self._open = None
            raise

    def _send_all(self, run: OpenRun, progress: RunProgress) -> None:
        self._describe(run)
        self._send_metrics(run)
        if progress.ended is None:
            return
        for name, data in _end_files(progress):
            self._upload(run, name, data)
        tags = end_tags(progress.ended, progress.result)
        self._try("tags", lambda: run.tag(tags))
        self._try("its state", lambda: run.end(progress.ended))
        self._state.ended = progress.ended
        self._record()
        self.is_done = True

    def count_unsent(self) -> int:
        """Return the number of values in `metrics.jsonl` that have not been sent."""
        return sum(1 for _ in self._points(read_metrics(self._run.run_dir)))

    def _start(self, parent: str | None) -> OpenRun:
        try:
            run = self._tracker.open(self._run, self.tracker_id, parent)
        except MissingRunError as error:
            logger.warning("%s: %s; logging to a new run", self._tracker.name, error)
            self._state = SentState()
            run = self._tracker.open(self._run, None, parent)
        if self._state.address is None or self._state.address.id != run.address.id:
            logger.info("%s: %s", self._tracker.name, run.address.url or run.address.id)
        self._state.address, self._state.ended = run.address, None
        self._record()
        self._open = run
        return run

    def _describe(self, run: OpenRun) -> None:
        """Send the config, and its file as it is at this start."""
        if not self._state.is_configured:
            self._try("the config", lambda: run.configure(self._run.config))
            self._state.is_configured = True
        for name in START_FILES:
            if name not in self._uploaded and (self._run.run_dir / name).status() is not None:
                self._upload(run, name, (self._run.run_dir / name).read_bytes())

    def _send_metrics(self, run: OpenRun) -> None:
        while True:
            if not self._pending:
                records = self._tail.read()
                if not records:
                    break
                self._pending = list(self._points(records))
            while self._pending:
                batch = self._pending[:BATCH_POINTS]
                self._try(f"{len(batch)} values", lambda batch=batch: run.log(batch), len(batch))
                self._state.last_steps |= {point.name: point.step for point in batch}
                self._pending = self._pending[BATCH_POINTS:]
            if time.monotonic() - self._recorded_at > RECORD_SECONDS:
                self._record()

    def _points(self, records: Iterable[Mapping[str, float | None]]) -> Iterator[MetricPoint]:
        """Yield the values that have not been sent."""
        # A value that is sent again after an error has the same time, so that MLflow keeps it once.
        now = time.time()
        for record in records:
            step = int(record["step"] or 0)
            for name, value in record.items():
                if name != "step" and not self._state.is_sent(name, step):
                    finite = float("nan") if value is None else value
                    yield MetricPoint(name, finite, step, now)

    def _upload(self, run: OpenRun, name: str, data: bytes) -> None:
        if name not in self._uploaded:
            self._try(name, lambda: run.upload(name, redact_file(name, data)))
            self._uploaded.add(name)

    def _try(self, what: str, call: Callable[[], None], count: int = 1) -> None:
        """Send something, and count what the tracker refuses."""
        try:
            call()
        except RefusedError as error:
            if not self.num_refused:
                logger.warning(
                    "%s refuses %s of %s: %s; they are in the run directory",
                    self._tracker.name,
                    what,
                    self._run.run_dir,
                    error,
                )
            self.num_refused += count

    def _record(self) -> None:
        self._state.write(self._run.run_dir, self._tracker.key)
        self._recorded_at = time.monotonic()


def _end_files(progress: RunProgress) -> Iterator[tuple[str, bytes]]:
    """Yield the files that a run has at its end, by the names under which a tracker shows them."""
    files = [progress.run.run_dir / name for name in END_FILES]
    if progress.result is not None:
        files.append(progress.result / "manifest.json")
    for file in files:
        if file.status() is not None:
            yield (
                PurePosixPath(file.relative_to(progress.run.run_dir)).as_posix(),
                file.read_bytes(),
            )


class Feed:
    """A context manager that sends runs to one tracker in a thread of its own."""

    def __init__(
        self, tracker: Tracker, source: Source, *, close_seconds: float = CLOSE_SECONDS
    ) -> None:
        """Set what is sent where.

        Args:
            tracker: tracker to send to.
            source: returns the runs to send.
            close_seconds: seconds that the end of the block waits for the tracker at most.
        """
        self._tracker, self._source, self._close_seconds = tracker, source, close_seconds
        self._runs: dict[Place, FollowedRun] = {}
        self._closing = threading.Event()
        self._down_since: float | None = None
        self._error: BaseException | None = None
        # A daemon: a tracker that never answers must not keep the process.
        self._thread = threading.Thread(
            target=self._main, name=f"tracker {tracker.key}", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        limit = f"seconds, at most {self._close_seconds:.0f}"
        with waiting(logger, f"sending the rest to {self._tracker.name}", usually=limit):
            self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._tracker.abandon()
        self._report()

    def _main(self) -> None:
        try:
            while True:
                is_closing = self._closing.is_set()
                is_sent = self._send_all()
                if is_closing and is_sent:
                    return
                wait = POLL_SECONDS if self._down_since is None else RETRY_SECONDS
                if is_closing:
                    time.sleep(POLL_SECONDS)
                else:
                    self._closing.wait(wait)
        except BaseException as error:  # a tracker must not end a run
            self._error = error
            logger.warning("%s: logging has failed", self._tracker.name, exc_info=error)

    def _send_all(self) -> bool:
        """Send what is new of all runs; return whether the tracker answers."""
        try:
            for progress in self._source():
                self._follow(progress)
        except (UnreachableError, RefusedError) as error:
            if self._down_since is None:
                self._down_since = time.monotonic()
                logger.warning(
                    "%s cannot be logged to now (%s); training continues, and metrics.jsonl keeps "
                    "what is to be sent",
                    self._tracker.name,
                    error,
                )
            return False
        except OSError as error:
            # Of the run directory.
            logger.warning(
                "%s: cannot read or write a run directory: %s", self._tracker.name, error
            )
            return False
        if self._down_since is not None:
            seconds = time.monotonic() - self._down_since
            logger.info("%s can be logged to again, after %.0f s", self._tracker.name, seconds)
            self._down_since = None
        return True

    def _follow(self, progress: RunProgress) -> None:
        place, parent_dir = progress.run.run_dir, progress.run.parent_dir
        if place not in self._runs:
            self._runs[place] = FollowedRun(progress.run, self._tracker)
        followed = self._runs[place]
        if not followed.is_done:
            parent = self._runs.get(parent_dir) if parent_dir else None
            followed.send(progress, parent.tracker_id if parent else None)

    def _report(self) -> None:
        """Log what was not sent."""
        num_refused = sum(run.num_refused for run in self._runs.values())
        if num_refused:
            logger.warning("%s refused %d values or files", self._tracker.name, num_refused)
        left = [progress.run for progress in self._source() if not self._is_done(progress)]
        if not left:
            return
        followed = (self._runs.get(run.run_dir) or FollowedRun(run, self._tracker) for run in left)
        num_values = sum(each.count_unsent() for each in followed)
        logger.warning(
            "%s was not reached within %.0f s at the end: %d values of %d runs were not sent (%s); "
            "the same command sends them later",
            self._tracker.name,
            self._close_seconds,
            num_values,
            len(left),
            left[0].run_dir,
        )

    def _is_done(self, progress: RunProgress) -> bool:
        followed = self._runs.get(progress.run.run_dir)
        return followed is not None and followed.is_done
