"""Promise: a worker that dies or hangs is replaced, and the run is the undisturbed one."""

import logging
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest

from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import RESTARTS, read_metrics
from raytune_llama.train.result import InvalidRunError, RetriesExhaustedError
from raytune_llama.train.trainer import run_training
from tests.chaos.conftest import (
    ADAPTER,
    MakeRun,
    assert_equal_runs,
    at_step,
    end,
    pids_of,
    worker_pids,
)
from tests.pipeline.conftest import losses

WATCH = {"min_seconds": 12.0, "factor": 20.0, "slow_seconds": 300.0}


def restarts(config: PretrainConfig) -> list[float]:
    return [record[RESTARTS] for record in read_metrics(config.run_place) if RESTARTS in record]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_worker_that_is_killed_or_stopped_is_replaced_and_nothing_is_lost(
    make_run: MakeRun, whole: PretrainConfig, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    config = make_run(scale__watch=WATCH)
    struck: list[int] = []

    def strike() -> None:
        struck.append(worker_pids()[-1])
        os.kill(struck[0], number)

    try:
        with caplog.at_level(logging.ERROR), at_step(config, 60, strike):
            assert run_training(config).status == "finished"
    finally:
        end(struck)
    assert_equal_runs(config, whole)
    assert restarts(config) == [1]
    if number == signal.SIGSTOP:
        found = [
            r for r in caplog.records if r.name == "raytune_llama.train.orchestration.supervisor"
        ]
        assert f"process {struck[0]} on" in found[0].getMessage()


def spoil_store(config: PretrainConfig) -> None:
    """Put ids that the model does not have into the middle of the tokens, as they lie there."""
    (shard,) = Path(config.data.store_dir).glob("train-*.arrow")
    content = shard.read_bytes()
    tokens = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0).column("tokens").values
    data = memoryview(tokens.buffers()[1])
    with shard.open("r+b") as file:
        # In place: the workers have it mapped.
        file.seek(content.index(bytes(data[:64])) + data.nbytes // 2)
        file.write(b"\xff" * 256)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_bug_that_comes_back_at_one_step_ends_the_run_after_three_failures(
    make_run: MakeRun, tmp_path: Path
) -> None:
    # A store of its own, since it is spoilt.
    config = make_run(data__store_dir=str(tmp_path / "store"))
    with (
        at_step(config, 30, lambda: spoil_store(config)),
        pytest.raises(RetriesExhaustedError) as caught,
    ):
        run_training(config)
    message = str(caught.value)
    assert "3 times in a row" in message
    assert message.count("IndexError") >= 3
    assert not (Path(config.run_dir) / ADAPTER).exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_file_that_is_missing_ends_the_run_at_once_and_is_named(
    make_run: MakeRun, tmp_path: Path
) -> None:
    # A store of its own, since it is spoilt.
    config = make_run(data__store_dir=str(tmp_path / "store"))

    def strike() -> None:
        (tmp_path / "store" / "manifest.json").unlink()
        os.kill(worker_pids()[0], signal.SIGKILL)

    with at_step(config, 30, strike), pytest.raises(InvalidRunError, match="store"):
        run_training(config)
    # The start that found it was the last one.
    assert restarts(config) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_controller_of_ray_that_hangs_is_replaced(make_run: MakeRun, whole: PretrainConfig) -> None:
    config = make_run(scale__watch={**WATCH, "slow_seconds": 90.0})
    stopped: list[int] = []

    def strike() -> None:
        stopped.extend(pids_of("TrainController"))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    try:
        with at_step(config, 30, strike):
            # The workers end the run, and nobody is there to say so.
            assert run_training(config).status == "finished"
    finally:
        end(stopped)
    assert len(stopped) == 1
    assert_equal_runs(config, whole)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_run_that_fails_ever_again_but_gets_on_is_finished(
    make_run: MakeRun, whole: PretrainConfig
) -> None:
    config = make_run(scale__max_failures=2)
    kills = []

    def strike() -> None:
        kills.append(os.kill(worker_pids()[0], signal.SIGKILL))

    # More often than two in a row would be allowed.
    steps = iter((60, 120, 180))

    def strike_again_and_again() -> None:
        strike()
        for step in steps:
            while max(losses(config), default=0) < step + 30:
                time.sleep(0.1)
            strike()

    with at_step(config, 30, strike_again_and_again):
        assert run_training(config).status == "finished"
    assert len(kills) == 4
    assert_equal_runs(config, whole)
    assert restarts(config)[-1] == 4
