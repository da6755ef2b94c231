"""The loop of a pack: slots take turns, and what they hand in is computed together.

    source = ...  # says which runs join and leave
    run_pack(shared, source, workers)

A round computes one micro-batch of every slot. A slot whose step has more micro-batches than
another's takes more rounds for it; no slot waits for another's step.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.loop import train
from raytune_llama.train.monitoring.replica_check import ReplicaError
from raytune_llama.train.pack.engine import build_slot_engine
from raytune_llama.train.pack.shared_model import SharedModel
from raytune_llama.train.pack.slot import Slot
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.result import USER_ERRORS, RunResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlotRun:
    """A run that joins a pack."""

    number: int
    """Number of the run, which no other run of the pack has."""

    config: AnyTrainConfig
    """Config of the run."""

    stop_requested: Callable[[], bool]
    """Whether the run is asked to save and stop; called once per step."""


@dataclass(frozen=True)
class Changes:
    """Which runs join and leave a pack; the same on every worker."""

    joining: Sequence[SlotRun] = ()
    """Runs that join."""

    leaving: Sequence[int] = ()
    """Numbers of the running runs that end where they are, without a checkpoint."""

    is_last: bool = False
    """Whether no run joins any more: the pack ends with its last run."""


class RunSource(Protocol):
    """Says which runs join and leave a pack, and takes their results."""

    def changes(self, *, is_idle: bool) -> Changes:
        """Return the changes since the last call; collective.

        Args:
            is_idle: whether no run is in the pack; then wait for a change.
        """
        ...

    def gives_up(self, number: int, error: Exception) -> bool:
        """Count a failure that a restart may fix; return whether it was the run's last attempt."""
        ...

    def ended(self, number: int, outcome: RunResult | BaseException) -> None:
        """Take the result of a run, or the error that it has failed with."""
        ...


def run_pack(shared: SharedModel, source: RunSource, workers: ProcessGroup) -> None:
    """Train the runs that a source gives, until it gives no more and all have ended; collective.

    A run whose loss or gradient is not finite ends alone. With one worker, so does a run with an
    error of its config or files, which would repeat, and one that has failed too often in another
    way; with several, the others may wait for this one.

    Raises:
        Whatever else a run has failed with: a restart may help, and resumes every run.
    """
    slots: dict[int, Slot] = {}
    try:
        while True:
            changes = source.changes(is_idle=not slots)
            for number in changes.leaving:
                if number in slots:
                    slots.pop(number).leave()
            for run in changes.joining:
                logger.info("run %d joins: %s", run.number, run.config.run_dir)
                workers.progress.enter_phase("starting")
                slots[run.number] = Slot(run.number, partial(_train, run, shared, workers))
                slots[run.number].start()
            _take_ended(slots, source, workers)
            if changes.is_last and not slots:
                return
            compute_round(shared, list(slots.values()))
            workers.progress.record_round()
            _take_ended(slots, source, workers)
    finally:
        for slot in slots.values():
            slot.leave()


def _train(run: SlotRun, shared: SharedModel, workers: ProcessGroup, slot: Slot) -> RunResult:
    """Run the loop of a slot, in its thread."""
    build = partial(build_slot_engine, shared=shared, slot=slot)
    workers.progress.thread_id = threading.get_ident()
    try:
        return train(run.config, workers, run.stop_requested, build)
    finally:
        workers.progress.thread_id = None


def _take_ended(slots: dict[int, Slot], source: RunSource, workers: ProcessGroup) -> None:
    """Pass the results of ended runs on, in the order in which they joined."""
    for number, slot in list(slots.items()):
        if not slot.has_ended:
            continue
        del slots[number]
        outcome = slot.error if slot.error is not None else slot.result
        assert outcome is not None
        if isinstance(outcome, BaseException) and not _ends_alone(outcome, number, source, workers):
            raise outcome
        source.ended(number, outcome)


def _ends_alone(
    error: BaseException, number: int, source: RunSource, workers: ProcessGroup
) -> bool:
    """Whether an error ends its own run only."""
    # Workers that hold unlike copies of the base are wrong for every run.
    if isinstance(error, ReplicaError) or not isinstance(error, Exception):
        return False
    if isinstance(error, FloatingPointError):
        return True
    if workers.world_size > 1:
        return False
    return isinstance(error, USER_ERRORS) or source.gives_up(number, error)


def compute_round(shared: SharedModel, slots: Sequence[Slot]) -> None:
    """Compute what the slots have handed in, and let each run until it hands in the next."""
    trained = [(slot, slot.handed_in) for slot in slots if slot.handed_in and slot.handed_in.scale]
    evaluated = [
        (slot, slot.handed_in) for slot in slots if slot.handed_in and not slot.handed_in.scale
    ]
    answers = {}
    if trained:
        parts = [hand_in.part for _, hand_in in trained]
        losses = shared.train(parts, [h.scale for _, h in trained if h.scale is not None])
        answers |= dict(zip((slot for slot, _ in trained), losses, strict=True))
    if evaluated:
        losses = shared.evaluate([hand_in.part for _, hand_in in evaluated])
        answers |= dict(zip((slot for slot, _ in evaluated), losses, strict=True))
    for slot in slots:
        slot.resume(answers[slot])
