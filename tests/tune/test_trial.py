"""What a trial tells of a run, from what the run writes down."""

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import METRICS_FILE, read_metrics
from raytune_llama.tune import trial
from raytune_llama.tune.trial import (
    MAX_READ_FAILURES,
    Evaluation,
    EvaluationReader,
    RunThread,
    follow_run,
)


def write(run_dir: Path, *records: dict[str, float | None]) -> None:
    run_dir.mkdir(exist_ok=True)
    with (run_dir / METRICS_FILE).open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def step(number: int) -> dict[str, float | None]:
    return {"step": number, "train/loss": 9.0, "time/step_seconds": 2.0}


def evaluation(number: int, loss: float | None) -> dict[str, float | None]:
    return {"step": number, "eval/loss": loss, "eval/loss/a": 1.0, "time/eval_seconds": 0.5}


class Running(RunThread):
    """A run that does what a test says."""

    def __init__(self, work: Callable[[], None]) -> None:
        threading.Thread.__init__(self, daemon=True)
        self._work = work
        self._error = None

    def run(self) -> None:
        try:
            self._work()
        except ValueError as error:
            self._error = error


def test_follower_reads_every_evaluation_but_the_first_with_the_time_spent(tmp_path: Path) -> None:
    follower = EvaluationReader(Place.local(tmp_path / "run"), "eval/loss")
    assert follower.read_evaluations() == []
    write(tmp_path / "run", evaluation(0, 5.0), step(1), step(2), evaluation(2, 4.0), step(3))
    assert follower.read_evaluations() == [Evaluation(2, 4.0, 5.0)]


def test_follower_of_a_metric_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    write(tmp_path / "run", evaluation(0, 5.0))
    follower = EvaluationReader(Place.local(tmp_path / "run"), "eval/bits_per_byte")
    with pytest.raises(ValueError, match="available: eval/loss, eval/loss/a"):
        follower.read_evaluations()


def test_follow_tells_each_evaluation_once_and_the_last_when_the_result_is_there(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    goes_on = threading.Event()

    def work() -> None:
        write(run_dir, evaluation(0, 5.0), step(1), evaluation(1, 4.0))
        goes_on.wait()
        write(run_dir, step(2), evaluation(2, 3.0), step(3), evaluation(3, 2.0))

    told = follow_run(Running(work), EvaluationReader(Place.local(run_dir), "eval/loss"), 3)
    assert next(told) == (Evaluation(1, 4.0, 3.0), "running")
    goes_on.set()
    assert list(told) == [
        (Evaluation(2, 3.0, 5.5), "running"),
        (Evaluation(3, 2.0, 8.0), "finished"),
    ]


@pytest.mark.parametrize("num_failures", [MAX_READ_FAILURES - 1, MAX_READ_FAILURES])
def test_follow_asks_a_storage_that_fails_for_a_moment_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    left = num_failures

    def read(run_dir: Place) -> list[dict[str, Any]]:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.ESTALE, "stale file handle")
        return read_metrics(run_dir)

    monkeypatch.setattr(trial, "read_metrics", read)
    monkeypatch.setattr(trial, "POLL_SECONDS", 0.001)
    write(tmp_path / "run", evaluation(0, 5.0), step(1), evaluation(1, 4.0))
    follower = EvaluationReader(Place.local(tmp_path / "run"), "eval/loss")
    found = follow_run(Running(lambda: None), follower, last_step=1)
    if num_failures == MAX_READ_FAILURES:
        with pytest.raises(OSError, match="stale"):
            list(found)
    else:
        assert [state for _, state in found] == ["finished"]


def test_follow_ends_at_an_evaluation_that_is_not_finite(tmp_path: Path) -> None:
    forever = threading.Event()

    def wait() -> None:
        forever.wait()

    write(tmp_path / "run", evaluation(1, 4.0), evaluation(2, None), evaluation(3, 4.0))
    follower = EvaluationReader(Place.local(tmp_path / "run"), "eval/loss")
    told = follow_run(Running(wait), follower, 9)
    assert [(e.step, e.value, state) for e, state in told] == [
        (1, 4.0, "running"),
        (2, None, "diverged"),
    ]


def test_follow_of_a_run_that_fails_raises_its_error(tmp_path: Path) -> None:
    write(tmp_path / "run", evaluation(1, 4.0))

    def work() -> None:
        raise ValueError("no such file")

    told = follow_run(
        Running(work), EvaluationReader(Place.local(tmp_path / "run"), "eval/loss"), 9
    )
    with pytest.raises(ValueError, match="no such file"):
        list(told)


def test_follow_of_a_run_without_an_evaluation_says_so(tmp_path: Path) -> None:
    told = follow_run(
        Running(lambda: None), EvaluationReader(Place.local(tmp_path / "run"), "eval/loss"), 9
    )
    with pytest.raises(ValueError, match="without an evaluation"):
        list(told)


def test_follow_of_a_run_that_was_stopped_tells_what_it_had_and_no_end(tmp_path: Path) -> None:
    write(tmp_path / "run", evaluation(1, 4.0))

    class Stopped(Running):
        @property
        def was_stopped(self) -> bool:
            return True

    follower = EvaluationReader(Place.local(tmp_path / "run"), "eval/loss")
    told = follow_run(Stopped(lambda: None), follower, 9)
    assert list(told) == [(Evaluation(1, 4.0, 0.5), "running")]
