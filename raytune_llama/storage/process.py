"""Process identity that survives PID reuse."""

import os
import platform
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class ProcessIdentity:
    """A process on some machine, distinguished from later processes with the same PID."""

    host: str
    """Host name, for people."""

    boot: str
    """Boot id and PID namespace of the machine: processes can be looked up only from a process
    with the same value. Containers on one machine have different ones."""

    pid: int
    """PID in that namespace."""

    started: int
    """Start time of the process, in clock ticks since boot."""

    @classmethod
    def current(cls) -> Self:
        """Return the identity of this process."""
        pid = os.getpid()
        started = _start_of(pid)
        assert started is not None, "this process is running"
        return cls(platform.node(), _boot(), pid, started)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return the identity that `to_json` was called on."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def has_exited(self) -> bool | None:
        """Whether the process has exited; None if it is not visible from this process."""
        if self.boot != _boot():
            return None
        return _start_of(self.pid) != self.started

    def kill(self) -> bool:
        """Send SIGKILL, which also ends a stopped process; False if it is not running here."""
        if self.has_exited is not False:
            return False
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def kill_process(process: ProcessIdentity) -> bool:
    """Kill a process; run it as a task on the process's node. See `ProcessIdentity.kill`."""
    return process.kill()


def _boot() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _start_of(pid: int) -> int | None:
    """Return a process's start time, in ticks; None if it does not exist or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may contain any character.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in {"Z", "X"} else int(fields[18])
