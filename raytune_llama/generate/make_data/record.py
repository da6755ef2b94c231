"""The files of a run directory: a journal of requests, and what is made of it.

    requests.jsonl    the journal: one line per request, with its rows and all that was rejected
    alpaca.json       the rows: one JSON array, for `raytune sft`
    quarantine.jsonl  what was rejected, with the reason and the reply
    manifest.json     counts, models, prompts and config, once the job has ended

A request counts once its line is in the journal and synced; a last line that a crash has cut is
dropped, and its request is sent again. `alpaca.json` is replaced atomically, so that it is valid at
every moment. Writing it costs in proportion to its size: it is replaced at the end and, in between,
as often as takes at most a twentieth of the time. So it may lack the newest rows of the journal.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, find_differences
from raytune_llama.generate.make_data.counts import Counts, RequestRecord
from raytune_llama.storage.files import (
    OUTPUT_MANIFEST,
    sync,
    write_bytes_atomic,
    write_json_atomic,
)
from raytune_llama.storage.hashes import hash_bytes
from raytune_llama.storage.lease import LEASE_FOLDER, Fence

logger = logging.getLogger(__name__)

JOURNAL_FILE, DATA_FILE = "requests.jsonl", "alpaca.json"
QUARANTINE_FILE = "quarantine.jsonl"

_FORMAT = 1
_PUBLISHING_SHARE = 0.05
_MIN_PUBLISHING_SECONDS = 1.0


def check_target(folder: Path) -> None:
    """Check that a run directory is new, or that this job has made it.

    Raises:
        ConfigError: It is a file, or contains other files.
    """
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir() if path.name != LEASE_FOLDER)
        if not names or JOURNAL_FILE in names or all(name.endswith(".tmp") for name in names):
            return
        found = f"contains {', '.join(names[:5])} and no {JOURNAL_FILE}"
    elif folder.exists():
        found = "is a file"
    else:
        return
    raise ConfigError([f"run_dir: {folder} {found}; choose a new or empty directory"])


class DataRecord:
    """All that is known of a job, in memory and on disk; only one process may write it."""

    def __init__(self, folder: Path, identity: dict[str, Any], fence: Fence) -> None:
        """Read what earlier starts have left; nothing is written before the first `append`.

        Args:
            folder: Run directory, which may be missing or empty.
            identity: What the rows depend on; see `describe_identity`.
            fence: Permission to write, checked before each write.

        Raises:
            ConfigError: The rows in the directory depend on something else, each difference on one
                line.
            UserError: The journal is damaged.
        """
        self._folder, self._identity, self._fence = folder, identity, fence
        self._rows: list[bytes] = []
        self._num_published = 0
        self._published_at = -float("inf")
        self._publishing_seconds = 0.0
        self.counts = Counts()
        self.numbers: set[int] = set()
        """Numbers of the requests that are done."""
        self.instructions: list[str] = []
        """Instructions of the rows that are kept."""
        if self._journal.exists():
            self._read()

    @property
    def _journal(self) -> Path:
        return self._folder / JOURNAL_FILE

    @property
    def data_file(self) -> Path:
        """Path of the rows."""
        return self._folder / DATA_FILE

    def append(self, record: RequestRecord) -> None:
        """Record a request, durably.

        Raises:
            LeaseError: Another process has taken over the directory.
        """
        self._fence.check()
        if not self._journal.exists():
            header = {"format": _FORMAT, "identity": self._identity}
            write_bytes_atomic(self._journal, _line(header))
        _append(self._journal, _line(record.to_json()))
        sync(self._journal)
        self._take(record)
        _append(self._folder / QUARANTINE_FILE, b"".join(_quarantine_lines(record)))

    def publish_if_due(self) -> float:
        """Replace `alpaca.json` if there are new rows and the last time is long enough ago.

        Returns:
            Seconds until it is due; infinity if there are no new rows.
        """
        if self._num_published == len(self._rows):
            return float("inf")
        pause = max(_MIN_PUBLISHING_SECONDS, self._publishing_seconds / _PUBLISHING_SHARE)
        left = self._published_at + pause - time.monotonic()
        if left > 0:
            return left
        self.publish()
        return float("inf")

    def publish(self) -> None:
        """Replace `alpaca.json` by all rows that are kept.

        Raises:
            LeaseError: Another process has taken over the directory.
        """
        self._fence.check()
        start = time.monotonic()
        write_bytes_atomic(self.data_file, self._array())
        self._num_published = len(self._rows)
        self._published_at = time.monotonic()
        self._publishing_seconds = self._published_at - start

    def restore(self) -> None:
        """Make the other files what the journal says, after a start that was killed."""
        if not self.numbers:
            return
        (self._folder / OUTPUT_MANIFEST).unlink(missing_ok=True)
        for name in (DATA_FILE, QUARANTINE_FILE, JOURNAL_FILE, OUTPUT_MANIFEST):
            for leftover in self._folder.glob(f".{name}.*.tmp"):
                leftover.unlink()
        # Again from its start, as the lines of the last request may be missing.
        lines = [line for record in self._read_records() for line in _quarantine_lines(record)]
        write_bytes_atomic(self._folder / QUARANTINE_FILE, b"".join(lines))
        self.publish()

    def close(self, status: str, config: dict[str, Any]) -> None:
        """Publish all rows and write the manifest; nothing if no request was recorded.

        Args:
            status: How the job ended.
            config: Config of the job.

        Raises:
            LeaseError: Another process has taken over the directory.
        """
        if not self.numbers:
            return
        self.publish()
        rows = {"file": DATA_FILE, "rows": len(self._rows), "hash": hash_bytes(self._array())}
        content = {
            "format": _FORMAT,
            "status": status,
            "data": rows,
            "counts": self.counts.to_json(),
            "identity": self._identity,
            "config": config,
        }
        write_json_atomic(self._folder / OUTPUT_MANIFEST, content)

    def _array(self) -> bytes:
        return b"[\n" + b",\n".join(self._rows) + b"\n]\n"

    def _take(self, record: RequestRecord) -> None:
        self.counts.add(record)
        self.numbers.add(record.number)
        self.instructions += [row["instruction"] for row in record.rows]
        self._rows += [_line(row).rstrip(b"\n") for row in record.rows]

    def _read(self) -> None:
        """Read the journal, after its last line is complete, and check whose it is."""
        content = self._journal.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            logger.warning(
                "%s: dropped its last line, which a crash has cut; its request is sent again",
                self._journal,
            )
            os.truncate(self._journal, len(complete))
            sync(self._journal)
        header = self._parse(complete.partition(b"\n")[0], 1)
        differences = find_differences(header.get("identity", {}), self._identity)
        if differences:
            raise ConfigError(
                [
                    f"run_dir: the rows in {self._folder} were made with another config; use that "
                    "one, or set another run_dir",
                    *differences,
                ]
            )
        for record in self._read_records():
            self._take(record)

    def _read_records(self) -> list[RequestRecord]:
        lines = self._journal.read_bytes().splitlines()[1:]
        try:
            return [
                RequestRecord(**self._parse(line, number))
                for number, line in enumerate(lines, start=2)
            ]
        except TypeError as error:
            raise UserError(f"{self._journal}: written by another release ({error})") from error

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            content = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{self._journal}: line {number} is damaged ({error}); restore the file, or "
                "set another run_dir"
            ) from error
        if not isinstance(content, dict) or content.get("format", _FORMAT) != _FORMAT:
            raise UserError(f"{self._journal}: written by another release; set another run_dir")
        return content


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False) + "\n"
    # A lone surrogate, which only a rejected item may have, becomes its JSON escape.
    return text.encode("utf-8", "backslashreplace")


def _quarantine_lines(record: RequestRecord) -> list[bytes]:
    return [_line({"request": record.number, **item}) for item in record.rejected]


def _append(path: Path, data: bytes) -> None:
    if data:
        with path.open("ab") as file:
            file.write(data)
