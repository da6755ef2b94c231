"""What a worker is doing, for whoever watches it.

The loop sets a few numbers, which costs nothing; a thread sends them to the driver about once a
second, with where in the code the loop is. A worker that is stopped sends nothing.
"""

import contextlib
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

import ray
from ray.exceptions import RayError

from raytune_llama.storage.process import ProcessIdentity
from raytune_llama.train.progress import Phase, Progress

HEARTBEAT_SECONDS = 1.0

_PACKAGE = "/raytune_llama/"
_COLLECTIVES = ("distributed_c10d.py", "c10d_logger.py", "_functional_collectives.py")


@dataclass(frozen=True)
class Heartbeat:
    """What a worker tells of itself."""

    attempt: int
    """Number of its group of workers."""

    rank: int
    """Its own number in the group."""

    process: ProcessIdentity
    """Its process."""

    node_id: str
    """Ray's name of its node."""

    ticks: int
    """Grows as it gets on; in the same way on every worker."""

    step: int
    """Optimizer steps done."""

    phase: Phase
    """What it is at."""

    slowest_step_seconds: float
    """Of the steps that have ended since its last word; 0 without one."""

    location: str
    """Where in the code it is."""

    is_in_collective: bool
    """Whether it is in a collective, in which it waits for the others."""

    def __str__(self) -> str:
        return (
            f"worker {self.rank} ({self.process}, Ray node {self.node_id[:8]}): {self.phase} after "
            f"step {self.step}, at {self.location}"
        )


class HeartbeatSender:
    """Sends the pulse of the thread that enters it, while it is in the block."""

    def __init__(self, actor: Any, pulse: Progress, *, attempt: int, rank: int) -> None:  # noqa: ANN401
        self._actor = actor
        self._pulse = pulse
        self._attempt, self._rank = attempt, rank
        self._process = ProcessIdentity.current()
        self._node_id = ray.get_runtime_context().get_node_id()
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        self._pulse.enter_phase("over")
        # Sent, and waited for: it is the last word of this process.
        with contextlib.suppress(RayError):
            ray.get(self._actor.put_heartbeat.remote(self._now()), timeout=HEARTBEAT_SECONDS)

    def _beat(self) -> None:
        sent: list[Any] = []
        while True:
            # One at a time: where nobody listens, nothing heaps up.
            if not sent or ray.wait(sent, timeout=0)[0]:
                sent = [self._actor.put_heartbeat.remote(self._now())]
            if self._closed.wait(HEARTBEAT_SECONDS):
                return

    def _now(self) -> Heartbeat:
        where, waits = locate_frame(sys._current_frames().get(self._watched))
        pulse = self._pulse
        return Heartbeat(
            attempt=self._attempt,
            rank=self._rank,
            process=self._process,
            node_id=self._node_id,
            ticks=pulse.ticks,
            step=pulse.step,
            phase=pulse.phase,
            slowest_step_seconds=pulse.pop_slowest_seconds(),
            location=where,
            is_in_collective=waits,
        )


def locate_frame(frame: FrameType | None) -> tuple[str, bool]:
    """Return where in our code a thread is, and whether it waits in a collective."""
    waits = frame is not None and frame.f_code.co_filename.endswith(_COLLECTIVES)
    while frame is not None:
        file = frame.f_code.co_filename
        if _PACKAGE in file:
            name = file.rpartition(_PACKAGE)[2]
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "no code of ours", waits
