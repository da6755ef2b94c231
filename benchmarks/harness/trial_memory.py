"""Peak memory of the Ray processes below this one that belong to trials: workers and drivers."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_SAMPLE_SECONDS = 0.5


class TrialMemory:
    """Samples the proportional set size of all `ray::` processes while the block runs.

    Ray's own idle workers (`ray::IDLE`) and the cluster's services are not counted.
    """

    peak_mib: float = 0.0
    """Largest sum of a sample, in MiB."""

    peak_processes: int = 0
    """Largest number of processes of a sample."""

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            sizes = [size for size in map(_pss_mib, _trial_processes()) if size]
            self.peak_mib = max(self.peak_mib, sum(sizes))
            self.peak_processes = max(self.peak_processes, len(sizes))


def _trial_processes() -> list[int]:
    found: list[int] = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::") and not title.startswith(("ray::IDLE", "ray::Dashboard")):
            found.append(process.pid)
    return found


def _pss_mib(pid: int) -> float:
    """Return the proportional set size of a process; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    line = next((line for line in text.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) / 1024
