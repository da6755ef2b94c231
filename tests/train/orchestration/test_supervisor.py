"""Whether a run that is asked to stop has anything to save."""

from typing import Any

from raytune_llama.storage.process import ProcessIdentity
from raytune_llama.train.orchestration.heartbeat import Heartbeat
from raytune_llama.train.orchestration.supervisor import StepWatch

PROCESS = ProcessIdentity.current()


def beat(**fields: Any) -> Heartbeat:  # noqa: ANN401
    values: dict[str, Any] = {
        "attempt": 1,
        "rank": 0,
        "process": PROCESS,
        "node_id": "a",
        "ticks": 0,
        "step": 0,
        "phase": "starting",
        "slowest_step_seconds": 0.0,
        "location": "train/loop.py:1 in train",
        "is_in_collective": False,
    }
    return Heartbeat(**{**values, **fields})


def test_step_watch_before_the_first_step_has_not_begun() -> None:
    watch = StepWatch()
    assert not watch.has_begun
    # Loading and the first evaluation leave nothing that is lost.
    watch.observe([beat(), beat(rank=1, phase="evaluating")], has_failed=False)
    assert not watch.has_begun


def test_step_watch_after_a_step_or_while_saving_has_begun() -> None:
    for done in (beat(step=1, phase="training"), beat(phase="saving"), beat(phase="finishing")):
        watch = StepWatch()
        watch.observe([beat(rank=1), done], has_failed=False)
        watch.observe([beat(rank=1)], has_failed=False)
        assert watch.has_begun


def test_step_watch_of_a_group_that_failed_begins_anew_with_the_next() -> None:
    watch = StepWatch()
    watch.observe([beat(step=7, phase="training")], has_failed=True)
    assert not watch.has_begun
    # A late message of the group that has ended says nothing of the next.
    watch.observe([beat(step=8, phase="training")], has_failed=False)
    assert not watch.has_begun
    watch.observe([beat(attempt=2)], has_failed=False)
    assert not watch.has_begun
    watch.observe([beat(attempt=2, step=8, phase="training")], has_failed=False)
    assert watch.has_begun
