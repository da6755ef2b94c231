"""A tracker in memory that can be down, refuse, or never answer."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_llama.train.monitoring.trackers.tracker import (
    EndState,
    MetricPoint,
    MissingRunError,
    RefusedError,
    RunAddress,
    TrackedRun,
    UnreachableError,
)


@dataclass
class FakeRun:
    """A run as the server holds it."""

    server: "FakeTracker"
    address: RunAddress
    parent: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    points: list[tuple[str, int, float]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    ends: list[EndState | None] = field(default_factory=list)

    def configure(self, config: Mapping[str, Any]) -> None:
        self.server.answer()
        assert not self.config, "the config is sent once"
        self.config |= config

    def log(self, points: Sequence[MetricPoint]) -> None:
        self.server.answer()
        if any(point.name in self.server.refused for point in points):
            raise RefusedError("illegal name")
        self.points += [(point.name, point.step, point.value) for point in points]

    def tag(self, tags: Mapping[str, str]) -> None:
        self.server.answer()
        self.tags |= tags

    def upload(self, name: str, data: bytes) -> None:
        self.server.answer()
        self.files[name] = data

    def end(self, state: EndState | None) -> None:
        self.server.answer()
        self.ends.append(state)


class FakeTracker:
    """A server with its runs; `is_down` and `hangs` may be set from outside at any time."""

    key = "mlflow"
    name = "the fake"

    def __init__(self, server: str = "http://one") -> None:
        self.runs: dict[str, FakeRun] = {}
        self.refused: set[str] = set()
        self.is_down = False
        self.server = server
        self.released = threading.Event()
        """Clear it to let every call wait."""
        self.released.set()
        self.num_calls = 0

    def answer(self) -> None:
        self.num_calls += 1
        self.released.wait()
        if self.is_down:
            raise UnreachableError("connection refused")

    def is_own(self, address: RunAddress) -> bool:
        return address.server == self.server

    def check(self) -> None:
        self.answer()

    def open(self, run: TrackedRun, known: str | None, parent: str | None) -> FakeRun:
        self.answer()
        if known is None:
            number = f"{len(self.runs)}"
            address = RunAddress(self.server, "project", number)
            self.runs[number] = FakeRun(self, address, parent, tags=dict(run.tags))
            return self.runs[number]
        if known not in self.runs:
            raise MissingRunError(f"the run {known} does not exist")
        return self.runs[known]

    def abandon(self) -> None:
        self.is_down = True

    def reopen(self, address: RunAddress) -> FakeRun:
        self.answer()
        return self.runs[address.id]
