"""What a job does on Ctrl-C (SIGINT), a closed terminal (SIGHUP) and SIGTERM.

    with Interruption():            # a whole job: the signals raise KeyboardInterrupt
        ...
        with StopSignal() as stop:  # a part that can save: they ask it to save and stop
            stop.set_callback(request)

The first signal ends the block in order; Ctrl-C after it ends the process at once. A signal that
the process was started to ignore stays ignored: SIGHUP by `nohup`, SIGINT in a script's background.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, Never, Self

EXIT_INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells give it: 128 and the number of SIGINT."""

SIGNAL_POLL_SECONDS = 0.2

REPEAT_SECONDS = 0.5
"""Seconds in which a second Ctrl-C is the same one: a launcher may pass it on to its child, which
has received it from the terminal too."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = b"\x1b[?25h"


class SignalHandler:
    """Context manager that handles SIGINT, SIGTERM and SIGHUP; in other threads it does nothing.

    Contexts may be nested: the innermost one handles the signals, and what it has received counts
    as received by the outer one when it ends.
    """

    def __init__(self, plan: str) -> None:
        """Set what the first signal does, in words."""
        self._plan = plan
        self.is_requested = False
        """Whether a signal was received."""
        self.name = ""
        """Name of the first signal that was received, such as SIGINT."""
        self._received_at = 0.0
        self._is_deferring = False
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
                outer = _owner(handler)
                if outer is not None and outer.is_requested:
                    # What it raised was lost, as it is in a callback of the garbage collector.
                    self._adopt(outer)

    def _adopt(self, other: "SignalHandler") -> None:
        self.is_requested, self.name = True, other.name
        self._received_at = other._received_at

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python cannot install again.
            if handler is not None:
                signal.signal(number, handler)
            outer = _owner(handler)
            if outer is not None and self.is_requested:
                outer._adopt(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # Python's
        now = time.monotonic()
        if self.is_requested:
            # A closed terminal sends SIGHUP more than once.
            if number == signal.SIGINT and now - self._received_at > REPEAT_SECONDS:
                _end_at_once()
            return
        self.is_requested, self.name = True, signal.Signals(number).name
        self._received_at = now
        if number == signal.SIGHUP:
            leave_closed_terminal()
        _tell(f"{self.name}: {self._plan}; Ctrl-C again ends at once")
        if not self._is_deferring:
            self._stop()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Act on a signal that comes during the block only at its end; a second Ctrl-C at once."""
        before = self.is_requested
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False
            if self.is_requested and not before:
                self._stop()

    def _stop(self) -> None:
        """Act on the first signal; called in the handler."""
        raise NotImplementedError


class Interruption(SignalHandler):
    """Context manager in which SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt."""

    def __init__(self) -> None:
        super().__init__("stopping")

    def finish(self) -> None:
        """Note that the job is over: from now on, Ctrl-C ends the process at once."""
        self.is_requested = True

    def _stop(self) -> None:
        raise KeyboardInterrupt


class StopSignal(SignalHandler):
    """Context manager in which SIGINT, SIGTERM or SIGHUP asks the run to save and stop.

    Ray replaces the handler of SIGTERM when it starts: enter it afterwards.
    """

    def __init__(self, plan: str = "saving a checkpoint after this step, then stopping") -> None:
        super().__init__(plan)
        self._callback: Callable[[], None] | None = None

    def set_callback(self, request: Callable[[], None]) -> None:
        """Set the function to call on a signal; it is called at once if there was one before."""
        self._callback = request
        if self.is_requested:
            request()

    def request(self) -> None:
        """Act as on a signal; any thread may call it."""
        self.is_requested = True
        self._stop()

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for a signal; return whether one was received."""
        deadline = time.monotonic() + seconds
        # Not an Event: the code that a handler interrupts may hold its lock.
        while not self.is_requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(SIGNAL_POLL_SECONDS, left))
        return self.is_requested

    def _stop(self) -> None:
        if self._callback is not None:
            self._callback()


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Keep this process's signals its own while the block starts Ray.

    Ray replaces the handler of SIGTERM. And its processes are in the group of this one, to which a
    closed terminal sends SIGHUP: they inherit it blocked, or a run could not save its step. Ray
    itself blocks SIGINT in them.

    What a handler raises while Ray forks would be lost, and with it the lock of `logging`, which is
    released after a fork: it is raised at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    ours = _owner(handler)
    with contextlib.nullcontext() if ours is None else ours.deferred():
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            yield
        finally:
            if callable(handler):
                signal.signal(signal.SIGTERM, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _owner(handler: object) -> SignalHandler | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, SignalHandler) else None


def leave_closed_terminal() -> None:
    """Replace standard streams whose terminal is closed, so that writing to them is no error."""
    for descriptor in range(3):
        try:
            os.tcgetpgrp(descriptor)
        except OSError as error:
            # Others, such as ENOTTY: it is no terminal, or one that is not ours.
            if error.errno == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)


def _end_at_once() -> Never:
    if sys.stderr.isatty():
        # A live table may have hidden it.
        with contextlib.suppress(OSError):
            os.write(2, _SHOW_CURSOR)
    _tell("SIGINT again: ended at once")
    os._exit(EXIT_INTERRUPTED)


def _tell(line: str) -> None:
    """Write a line to standard error from a handler.

    Logging could deadlock on a lock that the interrupted code holds.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
