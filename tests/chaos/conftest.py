"""Whole runs of a tiny model that something happens to; the oracle is the undisturbed run."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray.util.state

from raytune_llama.storage.hashes import hash_file
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.trainer import run_training
from tests.pipeline.conftest import build_job, job_inputs, losses, make_job
from tests.train.conftest import make_config, model_dir, store_dir, two

__all__ = ["job_inputs", "make_config", "make_job", "model_dir", "store_dir", "two"]

ADAPTER = "pt_lora_model/adapter_model.safetensors"

MakeRun = Callable[..., PretrainConfig]

# Long enough that whatever happens, happens while it trains.
FIELDS: dict[str, Any] = {
    "max_steps": 400,
    "checkpoint__every_steps": 25,
    "eval__every_steps": 200,
    "logging__every_steps": 100,
}


@pytest.fixture(scope="session")
def chaos_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the store of all runs is."""
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="session")
def whole(chaos_dir: Path, job_inputs: Path, ray_cluster: str) -> PretrainConfig:
    """The undisturbed run, on two workers."""
    config = build_job(chaos_dir / "whole", chaos_dir / "store", job_inputs, **FIELDS)
    assert run_training(config).status == "finished"
    return config


@pytest.fixture
def make_run(tmp_path: Path, chaos_dir: Path, job_inputs: Path) -> MakeRun:
    """Build the config of a run as the undisturbed one is; keywords replace its fields."""

    def make(name: str = "run", **fields: Any) -> PretrainConfig:  # noqa: ANN401
        return build_job(tmp_path / name, chaos_dir / "store", job_inputs, **{**FIELDS, **fields})

    return make


def assert_equal_runs(run: PretrainConfig, whole: PretrainConfig) -> None:
    """Check that two runs are one, to the last bit: each step's loss, and the final weights."""
    assert losses(run) == losses(whole)
    hashes = [hash_file(Path(config.run_dir) / ADAPTER) for config in (run, whole)]
    assert hashes[0] == hashes[1]


def worker_pids() -> list[int]:
    """Return the processes of Ray Train's workers that are alive in the tests' own cluster."""
    return pids_of("RayTrainWorker")


def pids_of(class_name: str) -> list[int]:
    """Return the processes of the actors of a class that are alive in the tests' own cluster."""
    alive: list[Any] = ray.util.state.list_actors(
        # Other clusters may run on this machine.
        address=ray.get_runtime_context().gcs_address,
        filters=[("class_name", "=", class_name), ("state", "=", "ALIVE")],
        timeout=60,
    )
    return sorted(actor.pid for actor in alive if actor.pid)


@contextmanager
def at_step(
    config: PretrainConfig, step: int, strike: Callable[[], None]
) -> Iterator[threading.Event]:
    """Do something from another thread, once a run that the block runs has done a step."""
    over, struck = threading.Event(), threading.Event()

    def wait() -> None:
        while max(losses(config), default=0) < step:
            if over.wait(0.05):
                return
        strike()
        struck.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield struck
    finally:
        over.set()
        thread.join(60)


def end(pids: list[int]) -> None:
    """Kill processes that a failed test has left stopped."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
