"""Promise: a tracker gets every value once, whenever it answers, and never holds up what trains."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LOSS, MetricsLog
from raytune_llama.train.monitoring.trackers import feed
from raytune_llama.train.monitoring.trackers.feed import Feed, RunProgress
from raytune_llama.train.monitoring.trackers.state import read_addresses
from raytune_llama.train.monitoring.trackers.tracker import EndState, TrackedRun
from tests.train.monitoring.trackers.fake_tracker import FakeRun, FakeTracker


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(feed, "RETRY_SECONDS", 0.01)


def tracked(run_dir: Place, parent: Place | None = None) -> TrackedRun:
    return TrackedRun(
        run_dir, run_dir.name, "pretrain", {"seed": 1}, {"raytune.base": "model"}, None, parent
    )


class Runs:
    """Runs in one directory that are written to and end as the test says."""

    def __init__(self, *runs: TrackedRun) -> None:
        self.progress = [RunProgress(run) for run in runs]

    def __call__(self) -> list[RunProgress]:
        return self.progress

    def end(self, state: EndState = "finished", result: Place | None = None) -> None:
        self.progress = [replace(one, ended=state, result=result) for one in self.progress]


def write(run_dir: Place, resumed_step: int, steps: range, name: str = LOSS) -> None:
    with MetricsLog(run_dir, resumed_step=resumed_step, tensorboard=False) as log:
        for step in steps:
            log.write(step, {name: step / 2})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def losses(run: FakeRun) -> dict[int, float]:
    """Return the training loss by step; a step that was sent twice is an error."""
    found = [(step, value) for name, step, value in run.points if name == LOSS]
    assert len(dict(found)) == len(found)
    return dict(found)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_feed_sends_config_metrics_files_and_the_end(run_dir: Place) -> None:
    server, runs = FakeTracker(), Runs(tracked(run_dir))
    (run_dir / "run.yaml").write_bytes(b"url: http://me:secret@host/x\n")
    with Feed(server, runs):
        write(run_dir, 0, range(1, 6))
        (run_dir / "loss.png").write_bytes(b"picture")
        files = {"adapter_model.safetensors": "blake3:ab", "adapter_config.json": "blake3:cd"}
        (run_dir / "result" / "manifest.json").write_json({"files": files, "step": 5})
        runs.end(result=run_dir / "result")
    (run,) = server.runs.values()
    assert run.config == {"seed": 1}
    assert losses(run) == {step: step / 2 for step in range(1, 6)}
    assert run.files["run.yaml"] == b"url: http://host/x\n"
    assert run.files["loss.png"] == b"picture"
    assert "result/manifest.json" in run.files
    assert run.tags["raytune.result_hash"] == "blake3:ab"
    assert run.tags["raytune.state"] == "finished"
    assert run.ends == ["finished"]
    assert read_addresses(run_dir)["mlflow"]["id"] == "0"


def test_feed_of_a_tracker_that_was_down_sends_what_it_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place.local(tmp_path)
    server, runs = FakeTracker(), Runs(tracked(place))
    with caplog.at_level(logging.INFO), Feed(server, runs):
        write(place, 0, range(1, 4))
        wait_for(lambda: bool(server.runs) and len(losses(server.runs["0"])) == 3)
        server.is_down = True
        write(place, 3, range(4, 9))
        calls = server.num_calls
        wait_for(lambda: server.num_calls > calls + 3)
        assert len(losses(server.runs["0"])) == 3
        server.is_down = False
        wait_for(lambda: len(losses(server.runs["0"])) == 8)
        write(place, 8, range(9, 11))
        runs.end()
    assert list(server.runs) == ["0"]
    assert list(losses(server.runs["0"])) == list(range(1, 11))
    # One for all attempts, and none at the end.
    assert len(warnings_of(caplog)) == 1


def test_feed_of_a_tracker_that_hangs_ends_in_time_and_a_later_start_sends_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place.local(tmp_path)
    server, runs = FakeTracker(), Runs(tracked(place))
    server.released.clear()
    start = time.monotonic()
    with Feed(server, runs, close_seconds=0.3):
        write(place, 0, range(1, 8))
        runs.end()
    assert 0.3 <= time.monotonic() - start < 5
    assert any("7 values of 1 runs were not sent" in text for text in warnings_of(caplog))
    later = FakeTracker()
    with Feed(later, runs):
        pass
    assert len(losses(later.runs["0"])) == 7
    assert later.runs["0"].ends == ["finished"]
    # Nothing is left to do for a third start.
    calls = later.num_calls
    with Feed(later, runs):
        pass
    assert later.num_calls == calls
    server.released.set()


def test_feed_of_a_resumed_run_continues_in_the_same_run_and_repeats_no_step(
    run_dir: Place,
) -> None:
    server, runs = FakeTracker(), Runs(tracked(run_dir))
    with Feed(server, runs):
        write(run_dir, 0, range(1, 6))
        runs.end("interrupted")
    runs.progress = [RunProgress(tracked(run_dir))]
    with Feed(server, runs):
        # From the checkpoint at step 3: steps 4 and 5 run again.
        write(run_dir, 3, range(4, 8))
        write(run_dir, 7, range(7, 8), EVAL_LOSS)
        runs.end()
    (run,) = server.runs.values()
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6, 7]
    assert (EVAL_LOSS, 7, 3.5) in run.points
    assert run.ends == ["interrupted", "finished"]


def test_feed_of_a_resumed_run_on_another_server_begins_with_the_first_step(
    tmp_path: Path,
) -> None:
    place = Place.local(tmp_path)
    first, second = FakeTracker(), FakeTracker("http://two")
    for server, resumed, steps in ((first, 0, range(1, 4)), (second, 3, range(4, 6))):
        runs = Runs(tracked(place))
        with Feed(server, runs):
            write(place, resumed, steps)
            runs.end("interrupted")
    assert list(losses(second.runs["0"])) == [1, 2, 3, 4, 5]


def test_feed_of_a_run_that_was_deleted_in_the_tracker_makes_a_new_one(tmp_path: Path) -> None:
    place = Place.local(tmp_path)
    server, runs = FakeTracker(), Runs(tracked(place))
    with Feed(server, runs):
        write(place, 0, range(1, 4))
        runs.end("interrupted")
    server.runs["9"] = server.runs.pop("0")
    runs.progress = [RunProgress(tracked(place))]
    with Feed(server, runs):
        write(place, 3, range(4, 6))
        runs.end()
    assert list(losses(server.runs["1"])) == [1, 2, 3, 4, 5]
    assert server.runs["1"].config == {"seed": 1}


def test_feed_counts_what_a_tracker_refuses_and_sends_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place.local(tmp_path)
    server, runs = FakeTracker(), Runs(tracked(place))
    server.refused.add("odd")
    with Feed(server, runs):
        write(place, 0, range(1, 3), "odd")
        wait_for(lambda: bool(server.runs) and server.num_calls > 2)
        write(place, 2, range(3, 6))
        runs.end()
    run = server.runs["0"]
    assert {step for _, step, _ in run.points} <= {3, 4, 5}
    assert run.ends == ["finished"]
    assert any("refused" in text for text in warnings_of(caplog))


def test_feed_of_a_sweep_puts_its_trials_below_it(tmp_path: Path) -> None:
    sweep = tracked(Place.local(tmp_path))
    trials = [tracked(sweep.run_dir / "trials" / str(number), sweep.run_dir) for number in (0, 1)]
    server, runs = FakeTracker(), Runs(sweep, *trials)
    with Feed(server, runs):
        for trial in trials:
            write(trial.run_dir, 0, range(1, 3))
        runs.end()
    assert [run.parent for run in server.runs.values()] == [None, "0", "0"]
    assert [len(losses(run)) for run in server.runs.values()] == [0, 2, 2]


def test_feed_of_a_value_that_is_not_finite_sends_nan(tmp_path: Path) -> None:
    place = Place.local(tmp_path)
    server, runs = FakeTracker(), Runs(tracked(place))
    with Feed(server, runs):
        with MetricsLog(place, resumed_step=0, tensorboard=False) as log:
            log.write(1, {LOSS: float("inf")})
        runs.end()
    ((_, _, value),) = server.runs["0"].points
    assert value != value  # noqa: PLR0124  # NaN
