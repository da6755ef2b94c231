"""Heartbeats of a worker, which the driver's stall detector reads.

The loop updates its progress counters, at no measurable cost; a thread sends them to the driver
about once per second, with the loop's current code location. A stopped process sends nothing.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import ray
from ray.exceptions import RayError

import raytune_llama
from raytune_llama.storage.process import ProcessIdentity
from raytune_llama.train.progress import Phase, Progress

HEARTBEAT_SECONDS = 1.0

# The package's own folder: a checkout may have the same name, and its .venv inside.
_PACKAGE = f"{Path(raytune_llama.__file__).parent}{os.sep}"
_COLLECTIVES = ("distributed_c10d.py", "c10d_logger.py", "_functional_collectives.py")


@dataclass(frozen=True)
class Heartbeat:
    """State of a worker, as it last reported it."""

    attempt: int
    """Attempt that the worker belongs to, from 1."""

    rank: int
    """Rank of the worker."""

    process: ProcessIdentity
    """Process of the worker."""

    node_id: str
    """Ray's id of the worker's node."""

    ticks: int
    """Monotonic progress counter, incremented identically on every worker."""

    step: int
    """Optimizer steps done."""

    phase: Phase
    """Phase that the worker is in."""

    slowest_step_seconds: float
    """Duration of the slowest step since the last heartbeat; 0 without one."""

    location: str
    """Current file, line and function of the loop."""

    is_in_collective: bool
    """Whether the worker waits in a collective for the others."""

    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    """Newest metrics since the last heartbeat by run; empty except on rank 0."""

    def __str__(self) -> str:
        return (
            f"worker {self.rank} ({self.process}, Ray node {self.node_id[:8]}): {self.phase} after "
            f"step {self.step}, at {self.location}"
        )


class HeartbeatSender:
    """Context manager that sends heartbeats of the thread that enters it."""

    def __init__(self, actor: Any, progress: Progress, *, attempt: int, rank: int) -> None:  # noqa: ANN401
        self._actor = actor
        self._progress = progress
        self._attempt, self._rank = attempt, rank
        self._process = ProcessIdentity.current()
        self._node_id = ray.get_runtime_context().get_node_id()
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        self._progress.enter_phase("over")
        # The last heartbeat of this process, so its delivery is awaited.
        with contextlib.suppress(RayError):
            ray.get(self._actor.put_heartbeat.remote(self._now()), timeout=HEARTBEAT_SECONDS)

    def _send_heartbeats(self) -> None:
        sent: list[Any] = []
        while True:
            # One in flight at a time, so that they do not queue up for a slow driver.
            if not sent or ray.wait(sent, timeout=0)[0]:
                sent = [self._actor.put_heartbeat.remote(self._now())]
            if self._closed.wait(HEARTBEAT_SECONDS):
                return

    def _now(self) -> Heartbeat:
        watched = self._progress.thread_id or self._watched
        location, is_in_collective = locate_frame(sys._current_frames().get(watched))
        progress = self._progress
        return Heartbeat(
            attempt=self._attempt,
            rank=self._rank,
            process=self._process,
            node_id=self._node_id,
            ticks=progress.ticks,
            step=progress.step,
            phase=progress.phase,
            slowest_step_seconds=progress.pop_slowest_seconds(),
            location=location,
            is_in_collective=is_in_collective,
            values=progress.pop_values(),
        )


def locate_frame(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost frame of this package, and whether the thread is in a collective."""
    waits = frame is not None and frame.f_code.co_filename.endswith(_COLLECTIVES)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            name = file.removeprefix(_PACKAGE)
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "outside raytune_llama", waits
