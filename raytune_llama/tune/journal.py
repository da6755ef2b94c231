"""The state of a sweep: an append-only journal of its trials.

`journal.jsonl` in the sweep's directory has a line for each start of a trial, for each of its
evaluations and for its end. It is the only state of a sweep: a restarted driver reads it, knows
every result, and continues with the trials that have not ended.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"

TrialState = Literal["running", "finished", "stopped", "diverged", "failed"]
"""State of a trial. Stopped: by the scheduler. Diverged: an evaluation was not finite."""


@dataclass(frozen=True)
class SlotUse:
    """A span of time in which a trial trained in a pack."""

    pack: int
    """Number of the pack."""

    slot: int
    """Place among the runs of the pack, from 0."""

    started: float
    """Start, in seconds since the epoch."""

    ended: float | None = None
    """Its last evaluation or its end, in seconds since the epoch; None before."""


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

    others: dict[int, dict[str, float | None]] = field(default_factory=dict)
    """Other metrics that the sweep shows or limits, by step and name: at each evaluation the newest
    value, None if not finite. Step 0 is before training."""

    seconds: float = 0.0
    """Seconds from the first start to the newest report, without pauses between drivers."""

    cause: str | None = None
    """Why the trial failed or diverged; None if it did neither."""

    slot_uses: tuple[SlotUse, ...] = ()
    """When and where the trial has trained in a pack; empty if it had workers of its own."""

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
            _apply(self.trials, json.loads(line))

    def start(self, number: int, sample: dict[str, Any]) -> None:
        """Record that a trial starts, with its sample."""
        self._append({"event": "start", "trial": number, "sample": sample})

    def join(self, number: int, pack: int, slot: int) -> None:
        """Record that a trial joins a pack.

        Args:
            number: number of the trial.
            pack: number of the pack.
            slot: place among the runs of the pack.
        """
        self._append({"event": "join", "trial": number, "pack": pack, "slot": slot})

    def report(
        self,
        number: int,
        step: int,
        value: float,
        seconds: float,
        others: Mapping[int, Mapping[str, float | None]] | None = None,
    ) -> None:
        """Record an evaluation of a trial.

        Args:
            number: number of the trial.
            step: step of the evaluation.
            value: the sweep's metric.
            seconds: seconds that the trial has run.
            others: other metrics by step and name, those before training at step 0.
        """
        event = {"event": "report", "trial": number, "step": step, "value": value}
        event |= {"seconds": seconds}
        # JSON has no integer keys.
        event |= (
            {"others": {str(at): dict(found) for at, found in others.items()}} if others else {}
        )
        self._append(event)

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
        _apply(self.trials, event)


def read_trials(sweep_dir: Place) -> dict[int, TrialRecord]:
    """Return the trials of a sweep by number, without writing: its driver may be running.

    Raises:
        ValueError: a line other than the last is damaged.
        OSError: the journal cannot be read.
    """
    place = sweep_dir / JOURNAL_FILE
    trials: dict[int, TrialRecord] = {}
    lines = place.read_bytes().decode().split("\n") if place.status() is not None else [""]
    for line in lines[:-1]:  # the last one is being written, or was cut off by a crash
        _apply(trials, json.loads(line))
    return trials


def _apply(trials: dict[int, TrialRecord], event: dict[str, Any]) -> None:
    """Update the trials by an event of the journal."""
    number = event["trial"]
    match event["event"]:
        case "start":
            trials[number] = TrialRecord(number, event["sample"])
        case "join":
            trial = trials[number]
            use = SlotUse(event["pack"], event["slot"], event["time"])
            trials[number] = replace(trial, slot_uses=(*trial.slot_uses, use))
        case "report":
            trial = trials[number]
            values = {**trial.values, event["step"]: event["value"]}
            slot_uses = _seen(trial.slot_uses, event["time"])
            added = {int(at): found for at, found in event.get("others", {}).items()}
            trials[number] = replace(
                trial,
                values=values,
                others={**trial.others, **added},
                seconds=event["seconds"],
                slot_uses=slot_uses,
            )
        case _:
            trial = trials[number]
            slot_uses = _seen(trial.slot_uses, event["time"])
            trials[number] = replace(
                trial, state=event["state"], cause=event["cause"], slot_uses=slot_uses
            )


def _seen(slot_uses: tuple[SlotUse, ...], now: float) -> tuple[SlotUse, ...]:
    """Return the uses of slots by a trial, the last of which lasts at least until now."""
    return (*slot_uses[:-1], replace(slot_uses[-1], ended=now)) if slot_uses else ()
