"""A job in a terminal of its own, in which a test presses Ctrl-C, or which it closes."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[1]

# Makes the terminal that of the session, and SIGINT as in a shell, wherever the tests were started.
_BEGIN = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Terminal:
    """A pseudo-terminal, and the command that is its foreground job."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        nohup: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start a command.

        Args:
            command: command and arguments.
            nohup: start it as `nohup` does.
            environment: its environment; None: that of the tests.
        """
        self._master, slave = pty.openpty()
        self._printed: list[bytes] = []
        on_hangup = "SIG_IGN" if nohup else "SIG_DFL"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, on_hangup, *command],
            cwd=ROOT,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # The end is an error: the other side of the terminal is closed.
        with contextlib.suppress(OSError):
            while not self._closed.is_set():
                if select.select([self._master], [], [], 0.1)[0]:
                    self._printed.append(os.read(self._master, 65536))

    @property
    def printed(self) -> str:
        """What the command has printed so far."""
        return b"".join(self._printed).decode(errors="replace").replace("\r\n", "\n")

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return once something holds; fail if the command ends before."""
        deadline = time.monotonic() + 500
        while not holds():
            assert self.process.poll() is None, f"it ended before: {self.printed[-4000:]}"
            assert time.monotonic() < deadline, f"not in time: {self.printed[-4000:]}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Type a text."""
        os.write(self._master, text.encode())

    def press_ctrl_c(self) -> None:
        """Press Ctrl-C: SIGINT for the whole foreground group."""
        os.write(self._master, b"\x03")

    def press_ctrl_c_until_it_ends(self) -> float:
        """Press Ctrl-C as often as it takes; return the seconds."""
        start = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() - start < 120, self.printed[-4000:]
            self.press_ctrl_c()
            time.sleep(0.25)
        return time.monotonic() - start

    def close(self) -> None:
        """Close the terminal, of which its shell tells the job's group, too."""
        self._stop_reading()
        os.close(self._master)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGHUP)

    def wait(self) -> int:
        """Wait for the command's end; return its status."""
        status = self.process.wait(timeout=500)
        self._stop_reading()
        return status

    def _stop_reading(self) -> None:
        self._closed.set()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
