"""Run a command to its end while workers, nodes and the command itself are killed.

A side writes one line of JSON with `step` and `train/loss` for each step to a file that is made
anew, under its name, whenever its workers start: so our loop does, and the peers do it likewise.
"""

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raytune_llama.train.monitoring.metrics import LOSS

from .nodes import LocalNodes

KillKind = Literal["worker", "node", "driver"]
KILL_KINDS: tuple[KillKind, ...] = ("worker", "node", "driver")

POLL_INTERVAL_SECONDS = 0.02
NODE_RESTART_SECONDS = 10.0
"""After which a lost node is started anew."""


@dataclass(frozen=True)
class MeasuredJob:
    """What is run, and where it writes its steps."""

    name: str
    command: Sequence[str]
    steps_file: Path
    num_steps: int


@dataclass(frozen=True)
class Kill:
    """One that hit; times are seconds of one clock."""

    kind: KillKind
    at: float
    start: int
    """The start of the workers that it ended, from 1."""


@dataclass(frozen=True)
class ObservedStep:
    """A step that was seen to end."""

    number: int
    at: float
    start: int
    """Of the workers, from 1."""


@dataclass
class RunRecord:
    """What was seen of one side."""

    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    is_finished: bool = False
    num_interventions: int = 0
    """Ends of the command that nobody had asked for, and that did not end the run."""
    steps: list[ObservedStep] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    @property
    def wall_seconds(self) -> float:
        """From the first start of the command to the end of the last."""
        return self.ended - self.began

    @property
    def step_seconds(self) -> float:
        """From step to step in a run that was not disturbed, saving included."""
        first, last = self.steps[0], self.steps[-1]
        return (last.at - first.at) / (last.number - first.number)

    @property
    def num_done(self) -> int:
        """Steps that the run got to."""
        return max((step.number for step in self.steps), default=0)

    @property
    def num_starts(self) -> int:
        """Of the workers."""
        return self.steps[-1].start if self.steps else 0

    def recoveries(self, kind: KillKind | None = None) -> list[float]:
        """Return the seconds from each kill to the first step of later workers."""
        found: list[float] = []
        for kill in self.kills:
            later = [step.at for step in self.steps if step.start > kill.start]
            if later and kind in (None, kill.kind):
                found.append(later[0] - kill.at)
        return found


class _Reader:
    """Follows a file of steps through the starts of the workers."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._inode = self._position = self._seen = 0
        self.start = 0

    def read(self) -> list[ObservedStep]:
        try:
            with self._file.open() as lines:
                inode = os.fstat(lines.fileno()).st_ino
                is_new = inode != self._inode
                if is_new:
                    # What stands in it already was taken over from before.
                    self.start += 1
                    self._inode, self._position = inode, 0
                lines.seek(self._position)
                text = lines.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind("\n") + 1]
        self._position += len(whole.encode())
        records = [json.loads(line) for line in whole.splitlines()]
        now = time.monotonic()
        numbers = [record["step"] for record in records if LOSS in record]
        return [ObservedStep(number, now, self.start) for number in ([] if is_new else numbers)]


def run_job_under_kills(
    side: MeasuredJob,
    nodes: LocalNodes,
    *,
    limit_seconds: float,
    every_seconds: float | None = None,
    seed: int = 0,
    log: Path,
) -> RunRecord:
    """Run a side to its end, or as long as it may; whoever ends it is noted.

    Args:
        side: what to run; its command is given again whenever it ends before the run does.
        nodes: of the cluster; all are alive again behind it.
        limit_seconds: after which it is ended.
        every_seconds: between two kills; None: nothing is killed.
        seed: decides what is killed.
        log: takes the command's output.
    """
    reader, record = _Reader(side.steps_file), RunRecord()
    killer = _Killer(nodes, random.Random(seed))
    due = record.began + (every_seconds or math.inf)
    command = _Command(side, nodes, log)
    try:
        while True:
            time.sleep(POLL_INTERVAL_SECONDS)
            now = time.monotonic()
            record.steps += reader.read()
            status = command.process.poll()
            if status == 0 or now - record.began > limit_seconds:
                break
            if status is not None:
                record.num_interventions += 1
                command.start()
            elif now >= due and every_seconds is not None:
                due += every_seconds
                kind = killer.kill(command.process)
                if kind is not None:
                    record.kills.append(Kill(kind, now, reader.start))
                if kind == "driver":
                    command.start()
    finally:
        command.end()
        killer.close()
    record.is_finished = status == 0
    record.ended = now
    return record


class _Command:
    """A side's command, which is given again and again."""

    def __init__(self, side: MeasuredJob, nodes: LocalNodes, log: Path) -> None:
        self._side, self._nodes, self._log = side, nodes, log
        self.process = self._open()

    def _open(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as output:
            return subprocess.Popen(
                self._side.command,
                stdout=output,
                stderr=output,
                env=self._nodes.environment,
                cwd=self._log.parent,
            )

    def start(self) -> None:
        self.process = self._open()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class _Killer:
    """Kills what a seed chooses, and starts lost nodes anew."""

    def __init__(self, nodes: LocalNodes, chance: random.Random) -> None:
        self._nodes, self._chance = nodes, chance
        self._returning: list[threading.Thread] = []

    def kill(self, process: subprocess.Popen[bytes]) -> KillKind | None:
        """Kill something; None where what was chosen is not there, between two starts."""
        kind = self._chance.choice(KILL_KINDS)
        if kind == "driver":
            process.send_signal(signal.SIGKILL)
            process.wait()
            return kind
        training = sorted(self._nodes.training())
        if not training:
            return None
        number = self._chance.choice(training)
        if kind == "worker":
            self._nodes.kill_worker(number)
            return kind
        self._nodes.run("kill", number)
        thread = threading.Thread(target=self._bring_back)
        thread.start()
        self._returning.append(thread)
        return kind

    def _bring_back(self) -> None:
        time.sleep(NODE_RESTART_SECONDS)
        self._nodes.run("add")

    def close(self) -> None:
        for thread in self._returning:
            thread.join()


def describe(record: RunRecord, step_seconds: float, num_steps: int) -> str:
    """Return a disturbed run in a line or two."""
    goodput = record.num_done * step_seconds / record.wall_seconds
    state = "finished" if record.is_finished else f"at step {record.num_done} of {num_steps}"
    seconds = record.recoveries()
    lines = [
        f"goodput {goodput:.1%} ({state} in {record.wall_seconds:.0f} s, {step_seconds:.3f} s a "
        f"step), {len(record.kills)} kills, {record.num_starts} starts of workers, "
        f"{record.num_interventions} ends without being killed"
    ]
    if seconds:
        kinds = ", ".join(
            f"{kind} {statistics.median(found):.1f} s"
            for kind in KILL_KINDS
            if (found := record.recoveries(kind))
        )
        lines.append(
            f"  first step after a kill: median {statistics.median(seconds):.1f} s, worst "
            f"{max(seconds):.1f} s ({kinds})"
        )
    return "\n".join(lines)


def python(*arguments: object) -> list[str]:
    """Return the command of a program of this repository."""
    return [sys.executable, *map(str, arguments)]
