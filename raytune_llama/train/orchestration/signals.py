"""SIGTERM: how a driver is asked to save and stop."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

SIGNAL_POLL_SECONDS = 0.2


class StopSignal:
    """Lets SIGTERM save and stop the run, while it is in the block.

    Entered after Ray has set its own handler.
    """

    def __init__(self) -> None:
        self.is_requested = False
        """Whether SIGTERM has come."""
        self._tell: Callable[[], None] | None = None
        self._before: Any = None

    def set_callback(self, request: Callable[[], None]) -> None:
        """Set what is called when it comes; at once where it has come already."""
        self._tell = request
        if self.is_requested:
            request()

    def wait(self, seconds: float) -> bool:
        """Wait until it comes, or so many seconds; return whether it has."""
        deadline = time.monotonic() + seconds
        # No event: its lock may be held by the very code that a handler interrupts.
        while not self.is_requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(SIGNAL_POLL_SECONDS, left))
        return self.is_requested

    def __enter__(self) -> Self:
        # Handlers belong to the main thread, which in a sweep's trials is Ray's.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # Python's
        # Logging could wait for a lock that the interrupted code holds.
        os.write(2, b"SIGTERM: saving a checkpoint after this step, then stopping\n")
        self.is_requested = True
        if self._tell is not None:
            self._tell()
