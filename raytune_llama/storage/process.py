"""Which process is meant, when its number may long be another's."""

import os
import platform
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class ProcessIdentity:
    """A process of some machine, told apart from those that get its number later."""

    host: str
    """Name of the machine, for people."""

    boot: str
    """Start of the machine and namespace of its process numbers: processes can be looked up only
    from where this is the same, which containers of one machine do not have."""

    pid: int
    """Its number there."""

    started: int
    """When it started, in clock ticks since the machine did."""

    @classmethod
    def current(cls) -> Self:
        """Return this process."""
        pid = os.getpid()
        started = _start_of(pid)
        assert started is not None, "it runs"
        return cls(platform.node(), _boot(), pid, started)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return what `to_json` was made from."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def has_exited(self) -> bool | None:
        """Whether it has ended; None where this process cannot see it."""
        if self.boot != _boot():
            return None
        return _start_of(self.pid) != self.started

    def kill(self) -> bool:
        """End it with SIGKILL, which a stopped process obeys too; False if it is not here."""
        if self.has_exited is not False:
            return False
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def kill_process(process: ProcessIdentity) -> bool:
    """End a process, as a task on its node does; see `ProcessIdentity.kill`."""
    return process.kill()


def _boot() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _start_of(pid: int) -> int | None:
    """Return when a process started, in ticks; None where there is none, or a dead one's entry."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in brackets, may have anything in it.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in {"Z", "X"} else int(fields[18])
