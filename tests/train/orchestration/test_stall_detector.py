"""Promise: a worker that does not get on is found in time and named; one that does, never."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.storage.process import ProcessIdentity
from raytune_llama.train.orchestration.config import StallDetectorConfig
from raytune_llama.train.orchestration.heartbeat import Heartbeat
from raytune_llama.train.orchestration.stall_detector import Stall, StallDetector

CONFIG = StallDetectorConfig(min_seconds=10.0, factor=5.0, slow_seconds=100.0)


def beat(rank: int, marks: int, **fields: object) -> Heartbeat:
    process = ProcessIdentity("host", "boot", 100 + rank, 1)
    made = Heartbeat(
        1, rank, process, f"node{rank}", marks, marks, "training", 1.0, "loop.py:1", False
    )
    return replace(made, **fields)  # pyright: ignore[reportArgumentType]  # fields of any type


class Clock:
    """Feeds a watch, second by second."""

    def __init__(self, config: StallDetectorConfig = CONFIG) -> None:
        self.now = 1000.0
        self.watch = StallDetector(config, self.now)

    def tell(self, *beats: Heartbeat) -> None:
        self.now += 1
        self.watch.observe(beats, self.now)
        assert self.watch.check(self.now) is None

    def until_stuck(self, *beats: Heartbeat) -> tuple[Stall, float]:
        """Repeat the beats every second; return what is found, and after how long."""
        start = self.now
        while self.now < start + 1000:
            self.now += 1
            self.watch.observe(beats, self.now)
            stuck = self.watch.check(self.now)
            if stuck is not None:
                return stuck, self.now - start
        pytest.fail("never found")


def ranks(stuck: Stall) -> list[int]:
    return [beat.rank for beat in stuck.culprits]


def test_silent_worker_is_found_and_the_one_that_waits_for_it_is_not() -> None:
    clock = Clock()
    for marks in range(5):
        clock.tell(beat(0, marks), beat(1, marks, is_in_collective=True))
    # Stopped in a collective, which where the first is looks like work.
    stuck, seconds = clock.until_stuck(beat(0, 4))
    assert ranks(stuck) == [1]
    assert seconds == pytest.approx(10, abs=1)
    for word in ("worker 1", "process 101 on host", "node1", "step 4"):
        assert word in str(stuck)


def test_worker_behind_the_others_is_the_culprit() -> None:
    clock = Clock()
    clock.tell(beat(0, 7), beat(1, 6), beat(2, 7))
    stuck, _ = clock.until_stuck(beat(0, 7), beat(1, 6), beat(2, 7))
    assert ranks(stuck) == [1]


def test_worker_outside_of_the_collective_is_the_culprit() -> None:
    clock = Clock()
    beats = [
        beat(0, 3, is_in_collective=True),
        beat(1, 3, is_in_collective=True),
        beat(2, 3, location="batches.py:7"),
    ]
    stuck, _ = clock.until_stuck(*beats)
    assert ranks(stuck) == [2]
    assert "batches.py:7" in str(stuck)


def test_workers_that_cannot_be_told_apart_are_all_named() -> None:
    stuck, _ = Clock().until_stuck(
        beat(0, 3, is_in_collective=True), beat(1, 3, is_in_collective=True)
    )
    assert ranks(stuck) == [0, 1]


def test_deadline_of_a_step_follows_the_slowest_of_the_recent() -> None:
    clock = Clock()
    clock.tell(beat(0, 1, slowest_step_seconds=2.0))
    clock.tell(beat(0, 2, slowest_step_seconds=7.0))
    clock.tell(beat(0, 3, slowest_step_seconds=3.0))
    _, seconds = clock.until_stuck(beat(0, 3, slowest_step_seconds=0.0))
    assert seconds == pytest.approx(5 * 7.0, abs=1)


@pytest.mark.parametrize("phase", ["starting", "evaluating", "saving", "finishing"])
def test_what_is_no_step_may_take_longer(phase: str) -> None:
    clock = Clock()
    clock.tell(beat(0, 3))
    _, seconds = clock.until_stuck(beat(0, 4, phase=phase, slowest_step_seconds=0.0))
    assert seconds == pytest.approx(100, abs=2)


def test_first_step_may_take_longer() -> None:
    # It has not ended: no step's time is known yet.
    _, seconds = Clock().until_stuck(beat(0, 1, slowest_step_seconds=0.0))
    assert seconds == pytest.approx(100, abs=2)


def test_replaced_group_is_heard_no_more_and_the_next_is() -> None:
    clock = Clock()
    clock.tell(beat(0, 5), beat(1, 5))
    clock.watch.reset(clock.now)
    clock.watch.reset(clock.now)  # two have found it
    for _ in range(50):
        clock.tell(beat(1, 5))  # on its way when it was killed
    stuck, _ = clock.until_stuck(beat(0, 2, attempt=2), beat(1, 1, attempt=2))
    assert ranks(stuck) == [1]


def test_nobody_heard_of_is_found_too() -> None:
    stuck, seconds = Clock().until_stuck()
    assert ranks(stuck) == []
    assert seconds == pytest.approx(100, abs=2)
    assert "no heartbeat from any worker" in str(stuck)


def test_group_that_is_over_is_given_time_to_end() -> None:
    clock = Clock()
    clock.tell(beat(0, 5, phase="over"))
    _, seconds = clock.until_stuck()
    assert seconds == pytest.approx(100, abs=2)


@given(st.lists(st.floats(0.1, 9.0), min_size=20, max_size=60), st.integers(1, 4))
def test_group_that_gets_on_is_never_stuck(steps: list[float], num_workers: int) -> None:
    watch, now, done = StallDetector(CONFIG, 0.0), 0.0, 0.0
    for marks, seconds in enumerate(steps):
        done += seconds
        # Once a second all tell how far they are, one of them always one mark behind.
        while now < done:
            now += 1.0
            late = [
                beat(r, marks + (r > 0), slowest_step_seconds=seconds) for r in range(num_workers)
            ]
            watch.observe(late, now)
            assert watch.check(now) is None


def test_nobody_is_missed_while_nodes_are_waited_for() -> None:
    clock = Clock()
    for _ in range(300):
        clock.watch.restart_timer(clock.now)
        clock.tell()
    _, seconds = clock.until_stuck()
    assert seconds == pytest.approx(100, abs=2)
