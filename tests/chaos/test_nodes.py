"""Promise: nodes may be lost and may return while a run trains; what it computes does not change.

The oracle is the run that nothing happened to. Where the number of workers stays, the weights are
equal by hash; where it changes, the losses agree, and each step has the same samples, once.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.nodes import LocalNodes
from raytune_llama.config.settings import override, write_yaml
from raytune_llama.storage.hashes import hash_file
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import FILLER_SEQUENCES, TARGET_TOKENS, read_metrics
from tests.pipeline.conftest import ROOT, MakeJob, job_inputs, losses, make_job
from tests.train.conftest import run_here

__all__ = ["job_inputs", "make_job"]

# A busy machine takes minutes to start a node or a job, and is no failure.
SECONDS = 500
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3 * SECONDS)]

Start = Callable[..., subprocess.Popen[bytes]]

ADAPTER = "pt_lora_model/adapter_model.safetensors"
# Steps of many small passes, so that a run outlasts the start of a node; 15 is odd, so that two
# workers have a filler sequence in each step and one has none.
EVERY = 20
STEPS = {
    "batch__sequences_per_step": 15,
    "batch__micro_batch_sequences": 1,
    "checkpoint__every_steps": EVERY,
    "checkpoint__keep_best": False,
    "eval__every_steps": None,
    "engine": {"precision": "fp32", "strategy": "ddp"},
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalNodes]:
    cluster = LocalNodes()
    try:
        cluster.run("up", "2")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first job writes the token store, for all of them."""
    return tmp_path_factory.mktemp("stores") / "store"


@pytest.fixture
def make(make_job: MakeJob, store: Path) -> MakeJob:
    """Build the config of a job of many steps; keywords replace its fields."""

    def made(name: str, **fields: Any) -> PretrainConfig:  # noqa: ANN401
        return make_job(name, data__store_dir=str(store), **STEPS, **fields)

    return made


@pytest.fixture
def start(nodes: LocalNodes, tmp_path: Path) -> Iterator[Start]:
    """Start `python jobs/pretrain.py` on the cluster; the log is in the test's folder."""
    started: list[subprocess.Popen[bytes]] = []

    def start_job(config: PretrainConfig, log: str = "job.log") -> subprocess.Popen[bytes]:
        file = (tmp_path / log).with_suffix(".yaml")
        write_yaml(config, file)
        command = [sys.executable, "jobs/pretrain.py", str(file)]
        with (tmp_path / log).open("ab") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, env=nodes.environment
            )
        started.append(process)
        return process

    yield start_job
    for process in started:
        process.kill()
        process.wait()


def filler(config: PretrainConfig) -> dict[int, float]:
    """Return the filler sequences of each step: they tell how many workers took it."""
    records = read_metrics(config.run_place)
    return {int(r["step"]): r[FILLER_SEQUENCES] for r in records if FILLER_SEQUENCES in r}


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def wait(process: subprocess.Popen[bytes], log: Path) -> int:
    """Return the exit status of a job."""
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(log.read_text()[-3000:])


def newest_step(config: PretrainConfig) -> float:
    return max(losses(config), default=0)


def newest(by_step: dict[int, float]) -> float | None:
    return by_step[max(by_step)] if by_step else None


def targets(config: PretrainConfig) -> list[float]:
    """Return the target tokens of each step: whose samples it had."""
    return [r[TARGET_TOKENS] for r in read_metrics(config.run_place) if TARGET_TOKENS in r]


def assert_same_weights(config: PretrainConfig) -> None:
    """Compare a finished run on one worker with the same run undisturbed."""
    whole = override(config, {"run_dir": f"{config.run_dir}-whole"})
    with one_thread():
        run_here(whole)
    assert losses(config) == losses(whole)
    hashes = [hash_file(Path(one.run_dir) / ADAPTER) for one in (config, whole)]
    assert hashes[0] == hashes[1]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on as many threads as a worker of one CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_local_cluster_is_there_once_and_says_how_it_is(nodes: LocalNodes) -> None:
    assert "is there" in nodes.run("up", "2", status=1)
    told = nodes.run("status")
    assert all(name in told and str(pid) in told for name, pid in nodes.pids().items())
    assert sorted(nodes.pids()) == ["head", "node-1", "node-2"]
    nodes.run("kill", "9", status=1)


def test_run_whose_node_is_lost_has_the_weights_of_the_undisturbed_run(
    nodes: LocalNodes, start: Start, make: MakeJob, tmp_path: Path
) -> None:
    # One of two nodes trains: the other takes its place.
    nodes.resize(2)
    config = make("lost", max_steps=160, scale__num_workers=1)
    log = tmp_path / "job.log"
    process = start(config)
    wait_until(lambda: newest_step(config) >= 60, process, log)
    (number,) = nodes.training()
    nodes.run("kill", number)
    assert wait(process, log) == 0, log.read_text()[-3000:]
    assert_same_weights(config)


def test_elastic_run_goes_on_with_more_nodes_and_with_fewer_again(
    nodes: LocalNodes, start: Start, make: MakeJob, tmp_path: Path
) -> None:
    nodes.resize(1)
    workers = {"min": 1, "max": 2, "grow_seconds": 1.0}
    fields = {"lora__dropout": 0.0, "max_steps": 100_000}
    config = make("elastic", **fields, scale__num_workers=workers)
    log = tmp_path / "job.log"
    process = start(config)
    wait_until(lambda: newest_step(config) >= 30, process, log)
    nodes.run("add")
    wait_until(lambda: newest(filler(config)) == 1, process, log)
    first = min(step for step, count in filler(config).items() if count == 1)
    wait_until(lambda: newest_step(config) >= first + 30, process, log)
    nodes.run("kill", next(iter(nodes.training())))
    # The steps behind the newest checkpoint are taken again, by the worker that is left.
    wait_until(lambda: newest(filler(config)) == 0, process, log)
    process.send_signal(signal.SIGTERM)
    assert wait(process, log) == 75
    by_step = filler(config)
    changes = [step for step in sorted(by_step)[1:] if by_step[step] != by_step[step - 1]]
    assert len(changes) == 2
    assert changes[1] % EVERY == 1
    whole = override(config, {"run_dir": str(tmp_path / "whole"), "scale.num_workers": 1})
    run_here(whole, stop_after=max(by_step))
    assert losses(config) == pytest.approx(losses(whole), rel=1e-5)
    assert targets(config) == targets(whole)


def test_run_whose_head_is_lost_goes_on_on_a_new_cluster(
    nodes: LocalNodes, start: Start, make: MakeJob, tmp_path: Path
) -> None:
    config = make("headless", max_steps=160, scale__num_workers=1)
    log = tmp_path / "job.log"
    process = start(config)
    wait_until(lambda: newest_step(config) >= 60, process, log)
    nodes.run("kill", "head")
    assert wait(process, log) != 0
    nodes.run("down")
    nodes.run("up", "1")
    log = tmp_path / "again.log"
    assert wait(start(config, log.name), log) == 0, log.read_text()[-3000:]
    assert_same_weights(config)
