"""A slot: one run's training loop in a thread of its own, which takes turns with the others.

Between `resume` and its return, the slot's loop alone runs; at all other times its thread waits.
So the loops of a pack, and what they compute together, never run at the same time: they share the
random generator, the device and the process group as one program does. All workers resume their
slots in the same order, so that the slots' collectives match without groups of their own.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from raytune_llama.train.pack.shared_model import Part, Scale
from raytune_llama.train.result import RunResult

THREAD_PREFIX = "run "
"""What the names of the slots' threads begin with; the number of the run follows."""


@dataclass(frozen=True)
class HandIn:
    """A micro-batch that a slot hands in to be computed with those of the others."""

    part: Part
    """The micro-batch."""

    scale: Scale | None
    """Given its loss, what to differentiate; None: an evaluation, without gradients."""


class LeftPackError(Exception):
    """Raised in a slot's thread when the slot leaves the pack before its run has ended."""


class Slot:
    """A run's thread, seen from the pack: `resume` it, and answer what it hands in."""

    def __init__(self, number: int, run: Callable[["Slot"], RunResult]) -> None:
        """Prepare the thread, which `start` starts.

        Args:
            number: number of the run, which names the thread and so its log records.
            run: runs the loop, given this slot.
        """
        self._answers: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        self._turns: queue.SimpleQueue[HandIn | None] = queue.SimpleQueue()
        self._run = run
        self._thread = threading.Thread(
            target=self._main, name=f"{THREAD_PREFIX}{number}", daemon=True
        )
        self.handed_in: HandIn | None = None
        """The micro-batch that the slot waits for; None before the start and after the end."""
        self.result: RunResult | None = None
        """Result of the run, once it has ended without an error."""
        self.error: BaseException | None = None
        """Error of the run, once it has failed."""

    @property
    def name(self) -> str:
        """Name of the slot's thread."""
        return self._thread.name

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended."""
        return self.result is not None or self.error is not None

    def start(self) -> None:
        """Let the loop run until it hands in its first micro-batch, or ends."""
        self._thread.start()
        self.handed_in = self._turns.get()

    def resume(self, answer: Tensor | BaseException) -> None:
        """Let the loop continue until it hands in its next micro-batch, or ends.

        Args:
            answer: summed loss of the last one, or an error to raise in the loop.
        """
        assert self.handed_in is not None, "it waits for an answer"
        self._answers.put(answer)
        self.handed_in = self._turns.get()

    def leave(self) -> None:
        """End the run where it is, without a checkpoint."""
        if not self.has_ended:
            self.resume(LeftPackError(f"{self.name} has left the pack"))
        assert self.has_ended, "the loop does not catch it"

    def exchange(self, hand_in: HandIn) -> Tensor:
        """Hand in a micro-batch; return its summed loss once the pack has computed it.

        Called by the slot's engine, in the slot's thread.
        """
        self._turns.put(hand_in)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _main(self) -> None:
        try:
            self.result = self._run(self)
        except (LeftPackError, FloatingPointError) as error:
            # The frames of its traceback hold the engine, whose memory the next run needs.
            self.error = error.with_traceback(None)
        except BaseException as error:  # noqa: BLE001  # the pack decides what it means
            self.error = error
        self._turns.put(None)
