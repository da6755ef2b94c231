"""Reads a run's `metrics.jsonl` while it grows."""

import json
from typing import Any

from raytune_llama.storage.place import FileStatus, Place
from raytune_llama.train.monitoring.metrics import METRICS_FILE

_READ_BYTES = 2**20


class MetricsTail:
    """Returns the records that were appended since the last call.

    A run that resumes removes the records after its checkpoint and writes them again: then the file
    is read from the start, and records are returned twice.
    """

    def __init__(self, run_dir: Place) -> None:
        self._file = run_dir / METRICS_FILE
        self._offset = 0
        self._last_line = b""
        self._status: FileStatus | None = None
        """Status of the file when it was last read to its end."""

    def read(self) -> list[dict[str, Any]]:
        """Return new records, at most 1 MiB of them; empty if there are none."""
        status = self._file.status()
        if status is None or status == self._status:
            return []
        with self._file.open() as file:
            size = file.size()
            if size < self._offset or not self._is_continued(file):
                self._offset, self._last_line = 0, b""
            file.seek(self._offset)
            data: bytes = file.read(_READ_BYTES)
        # Only a line that ends with a line break was fully written.
        *lines, _ = data.split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines)
        if lines:
            self._last_line = lines[-1] + b"\n"
        if len(data) < _READ_BYTES:
            self._status = status
        return [json.loads(line) for line in lines if line]

    def _is_continued(self, file: Any) -> bool:  # noqa: ANN401  # pyarrow's, which has no stubs
        """Whether the last line that was read is still where it was."""
        file.seek(self._offset - len(self._last_line))
        return file.read(len(self._last_line)) == self._last_line
