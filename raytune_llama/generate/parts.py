"""The finished rows of a job, kept in part files until the output is complete.

    run_dir/parts/000003.jsonl   finished rows, in the order in which they were finished
    run_dir/outputs.jsonl        all rows in the order of the input, once every row is finished
    run_dir/manifest.json        what the output was made from, and counts; written last

A part appears complete or not at all, and holds rows of one driver, which has the lease of the
directory: a driver that is killed loses only the rows that it has not written yet.
"""

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from raytune_llama.storage.lease import Fence
from raytune_llama.storage.place import Place

OUTPUT_FILE: Final = "outputs.jsonl"
"""File with a line per row of the input, in its order."""

_PARTS_FOLDER: Final = "parts"
_FLUSH_SECONDS: Final = 1.0


@dataclass
class RowCounts:
    """Counts of finished rows and of their tokens."""

    rows: int = 0
    """Number of rows."""
    too_long: int = 0
    """Number of rows whose prompt has no room in the context."""
    unusable: int = 0
    """Number of rows that can't be read or rendered."""
    prompt_tokens: int = 0
    """Number of tokens of all answered prompts."""
    output_tokens: int = 0
    """Number of generated tokens."""
    finish_reasons: dict[str, int] = field(default_factory=dict)
    """Number of rows by `finish_reason`."""
    unanswered: list[dict[str, Any]] = field(default_factory=list)
    """Index, number of tokens and error of each row without an answer."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a row's output."""
        reason = record["finish_reason"]
        self.rows += 1
        self.finish_reasons[reason] = self.finish_reasons.get(reason, 0) + 1
        self.too_long += reason == "too_long"
        self.unusable += reason == "unusable"
        if record["output"] is None:
            keys = ("index", "num_prompt_tokens", "error")
            self.unanswered.append({key: record[key] for key in keys})
            return
        self.prompt_tokens += record["num_prompt_tokens"]
        self.output_tokens += record["num_output_tokens"]


class Parts:
    """Finished rows of a job in its directory."""

    def __init__(self, run_dir: Place) -> None:
        """Read which rows are finished; nothing is written."""
        self._run_dir, self._folder = run_dir, run_dir / _PARTS_FOLDER
        self._files = [
            place for place in self._folder.files() if place.name.removesuffix(".jsonl").isdecimal()
        ]
        last = max((int(file.name.removesuffix(".jsonl")) for file in self._files), default=-1)
        self._next, self._waiting, self._flushed = last + 1, list[str](), time.monotonic()
        self.counts = RowCounts()
        """Counts of the finished rows."""
        self.finished: set[int] = set()
        """Indices of the finished rows."""
        for file in self._files:
            for line in file.read_bytes().splitlines():
                self._count(json.loads(line))

    def add(self, records: Iterable[str], fence: Fence) -> None:
        """Keep finished rows; they are written at once, but at most every second.

        Args:
            records: output of each row, in JSON.
            fence: lease that permits writing.

        Raises:
            LeaseError: another driver has taken over the directory.
        """
        for record in records:
            self._count(json.loads(record))
            self._waiting.append(record)
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush(fence)

    def flush(self, fence: Fence) -> None:
        """Write the rows that are not written yet."""
        if not self._waiting:
            return
        fence.check()
        file = self._folder / f"{self._next:06d}.jsonl"
        file.write_bytes("".join(f"{record}\n" for record in self._waiting).encode())
        self._files.append(file)
        self._next, self._waiting, self._flushed = self._next + 1, [], time.monotonic()

    def publish(self) -> Place:
        """Write the output file, all rows in the order of the input, and return its place."""
        lines: dict[int, bytes] = {}
        for file in self._files:
            for line in file.read_bytes().splitlines():
                lines[json.loads(line)["index"]] = line
        assert lines.keys() == self.finished, "a part was changed since it was written"
        with tempfile.TemporaryDirectory(prefix="raytune-outputs-") as folder:
            path = Path(folder, OUTPUT_FILE)
            with path.open("wb") as out:
                out.writelines(lines[index] + b"\n" for index in sorted(lines))
            (self._run_dir / OUTPUT_FILE).upload(path)
        return self._run_dir / OUTPUT_FILE

    def delete(self) -> None:
        """Delete the parts, once the output and its manifest are written."""
        self._folder.delete()

    def _count(self, record: Mapping[str, Any]) -> None:
        assert record["index"] not in self.finished, "a row was answered twice"
        self.finished.add(record["index"])
        self.counts.add(record)
