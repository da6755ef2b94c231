"""The state of a sweep: an append-only journal of its trials.

`journal.jsonl` in the sweep's directory has a line for each start of a trial, for each of its
evaluations and for its end. It is the only state of a sweep: a restarted driver reads it, knows
every result, and continues with the trials that have not ended.
"""

import json
import logging
import os
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"

TrialState = Literal["running", "finished", "stopped", "diverged", "failed"]
"""State of a trial. Stopped: by the scheduler. Diverged: an evaluation was not finite."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial as recorded in the journal."""

    number: int
    """Number of the trial, counted from 0."""

    sample: dict[str, Any]
    """Sampled values by dotted field."""

    state: TrialState = "running"
    """State of the trial. Running: it has not ended; a resumed sweep starts it again."""

    values: dict[int, float] = field(default_factory=dict)
    """Metric of each finite evaluation, by step."""

    seconds: float = 0.0
    """Seconds from the first start to the newest report, without pauses between drivers."""

    cause: str | None = None
    """Why the trial failed or diverged; None if it did neither."""

    @property
    def step(self) -> int:
        """Step of the newest evaluation; 0 before the first."""
        return max(self.values, default=0)

    @property
    def value(self) -> float | None:
        """Metric of the newest evaluation; None before the first."""
        return self.values[self.step] if self.values else None

    @property
    def has_ended(self) -> bool:
        """Whether the trial has ended."""
        return self.state != "running"


def trial_dir(sweep_dir: Place, number: int) -> Place:
    """Return the run directory of a trial."""
    return sweep_dir / "trials" / f"{number:04d}"


class Journal:
    """The journal of a sweep, in memory and in its directory.

    On a local disk each line is appended and synced; in object storage, which has no append, the
    full file is rewritten. A last line that a crash has truncated is dropped.
    """

    def __init__(self, sweep_dir: Place) -> None:
        self._place = sweep_dir / JOURNAL_FILE
        self.trials: dict[int, TrialRecord] = {}
        self._text = ""
        if self._place.status() is None:
            return
        text = self._place.read_bytes().decode()
        self._text = text[: text.rfind("\n") + 1]
        if len(self._text) < len(text):
            logger.warning("%s: dropped the last line, which is truncated", self._place)
            self._place.write_bytes(self._text.encode())
        for line in self._text.splitlines():
            self._apply(json.loads(line))

    def start(self, number: int, sample: dict[str, Any]) -> None:
        """Record that a trial starts, with its sample."""
        self._append({"event": "start", "trial": number, "sample": sample})

    def report(self, number: int, step: int, value: float, seconds: float) -> None:
        """Record an evaluation of a trial."""
        self._append(
            {"event": "report", "trial": number, "step": step, "value": value, "seconds": seconds}
        )

    def end(self, number: int, state: TrialState, cause: str | None = None) -> None:
        """Record that a trial has ended, and how."""
        self._append({"event": "end", "trial": number, "state": state, "cause": cause})

    def _append(self, event: dict[str, Any]) -> None:
        event["time"] = time.time()
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        self._text += line
        if self._place.is_local:
            self._place.path.parent.mkdir(parents=True, exist_ok=True)
            with self._place.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        else:
            self._place.write_bytes(self._text.encode())
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        number = event["trial"]
        match event["event"]:
            case "start":
                self.trials[number] = TrialRecord(number, event["sample"])
            case "report":
                trial = self.trials[number]
                values = {**trial.values, event["step"]: event["value"]}
                self.trials[number] = replace(trial, values=values, seconds=event["seconds"])
            case _:
                ended = replace(self.trials[number], state=event["state"], cause=event["cause"])
                self.trials[number] = ended
