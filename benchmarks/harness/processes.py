"""What the processes of an endpoint take of the machine: CPU, memory, threads and open files.

All is read in /proc, for this process and those below it.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .endpoint import MODEL_NAME

CLIENT, HAPROXY, PROXY, GATEWAY = "client", "haproxy", "Serve's proxy", "gateway"
CONTROLLER, REPLICA, OTHERS = "controller", "replica", "others"
ENGINE, OUTSIDE = "replica's engine", "replica outside it"

PATH_PARTS = (HAPROXY, PROXY, GATEWAY, OUTSIDE)
"""Parts that a request passes between the client and the engine. In front of HAProxy's replicas,
`Serve's proxy` is the process that configures HAProxy and the Python proxy in reserve."""

PARTS = (*PATH_PARTS, ENGINE, CLIENT, CONTROLLER, OTHERS)
"""All parts that CPU time is divided into."""

_ENGINE_THREAD = "engine"
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20

# An endpoint with one model has the application `llm`; otherwise it is called as the model.
_COMMANDS = {
    "ray::ServeReplica:llm:model": REPLICA,
    f"ray::ServeReplica:{MODEL_NAME}:model": REPLICA,
    "ray::ServeReplica:gateway:gateway": GATEWAY,
    "ray::HAProxyManager": PROXY,
    "ray::ProxyActor": PROXY,
    "ray::ServeController": CONTROLLER,
}


@dataclass(frozen=True)
class EndpointProcess:
    """A process."""

    pid: int
    part: str
    """Which part of the endpoint it is."""

    name: str
    """Its own name, for parts that consist of several."""


@dataclass(frozen=True)
class ProcessUsage:
    """What a process holds at one time."""

    rss_mib: float
    """Resident memory, shared pages included."""

    num_threads: int
    num_files: int
    """Open files and sockets."""


def find_processes() -> list[EndpointProcess]:
    """Return this process and those below it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        fields = _stat_fields(folder) if folder.name.isdecimal() else None
        if fields is not None:
            parents[int(folder.name)] = int(fields[1])
    own = os.getpid()
    found: list[EndpointProcess] = []
    for pid in parents:
        ancestor = pid
        while ancestor not in {own, 0}:
            ancestor = parents.get(ancestor, 0)
        if ancestor == own:
            found.append(EndpointProcess(pid, *_part(pid)))
    return found


def read_cpu_seconds() -> dict[str, float]:
    """Return the CPU seconds of each part since its start.

    A replica is divided by threads: its engine is the thread of that name and the OpenMP workers
    that it started, which bear its name (see `serve_endpoint`); outside of it are HTTP, the
    application and tokenization on the main thread, and Ray's own threads. A process that has ended
    is not counted.
    """
    seconds: dict[str, float] = defaultdict(float)
    for process in find_processes():
        total = _cpu_seconds(Path(f"/proc/{process.pid}"))
        if process.part == REPLICA:
            engine = sum(_cpu_seconds(task) for task in _engine_threads(process.pid))
            seconds[ENGINE] += engine
            seconds[OUTSIDE] += total - engine
        else:
            seconds[process.part] += total
    return dict(seconds)


def read_usage(pid: int) -> ProcessUsage | None:
    """Return what a process holds now; None if it has ended."""
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        return ProcessUsage(pages * _PAGE_MIB, _count(folder / "task"), _count(folder / "fd"))
    except OSError:
        return None


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


def _part(pid: int) -> tuple[str, str]:
    """Return which part a process is, and its name."""
    if pid == os.getpid():
        return CLIENT, CLIENT
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().strip()
    except OSError:
        return OTHERS, OTHERS
    name = command.rpartition("/")[2]
    if name == HAPROXY:
        return HAPROXY, HAPROXY
    for actor, part in _COMMANDS.items():
        # While a method runs, Ray appends its name.
        if command == actor or command.startswith(f"{actor}."):
            return part, actor.removeprefix("ray::") if part == PROXY else part
    return OTHERS, OTHERS


def _engine_threads(pid: int) -> Iterator[Path]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            if (task / "comm").read_text().strip() == _ENGINE_THREAD:
                yield task
        except OSError:
            continue  # It has just ended.


def _cpu_seconds(folder: Path) -> float:
    """Return the CPU seconds of a process or thread, in user and system mode."""
    fields = _stat_fields(folder)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / _TICKS


def _stat_fields(folder: Path) -> list[str] | None:
    """Return the fields of a `stat` after the name; None if the process or thread has ended."""
    try:
        # The name before the last bracket may hold blanks.
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
