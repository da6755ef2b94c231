"""SIGTERM handling: the driver saves and stops."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

SIGNAL_POLL_SECONDS = 0.2


class StopSignal:
    """Context manager in which SIGTERM asks the run to save and stop.

    Enter it after Ray has installed its own handler.
    """

    def __init__(self) -> None:
        self.is_requested = False
        """Whether SIGTERM was received."""
        self._callback: Callable[[], None] | None = None
        self._before: Any = None

    def set_callback(self, request: Callable[[], None]) -> None:
        """Set the function to call on SIGTERM; calls it at once if SIGTERM was received before."""
        self._callback = request
        if self.is_requested:
            request()

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for SIGTERM; return whether it was received."""
        deadline = time.monotonic() + seconds
        # Not an Event: the code that a handler interrupts may hold its lock.
        while not self.is_requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(SIGNAL_POLL_SECONDS, left))
        return self.is_requested

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; in a sweep's trial, that thread is Ray's.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # Python's
        # Logging could deadlock on a lock that the interrupted code holds.
        os.write(2, b"SIGTERM: saving a checkpoint after this step, then stopping\n")
        self.is_requested = True
        if self._callback is not None:
            self._callback()
