"""A small real pre-training job: a tiny model, Chinese and English text, and its YAML config."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import write_yaml
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import LOSS, read_metrics
from tests.train.conftest import WORDS, build_config, write_model

ROOT = Path(__file__).parents[2]

MakeJob = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def job_inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A folder with `model/` and `corpus/`."""
    from raytune_llama.tokenizer.loader import load_tokenizer

    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    load_tokenizer(tokenizer_dir).save_pretrained(folder / "model")
    (folder / "corpus").mkdir()
    generator = random.Random(1)
    for number in range(2):
        lines = [" ".join(generator.choices(WORDS, k=generator.randint(4, 40))) for _ in range(200)]
        (folder / "corpus" / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def make_job(tmp_path: Path, job_inputs: Path) -> MakeJob:
    """Build the config of a job of eight steps on two workers; keywords replace its fields."""

    def make(name: str = "run", **fields: Any) -> PretrainConfig:  # noqa: ANN401
        return build_job(tmp_path / name, tmp_path / "store", job_inputs, **fields)

    return make


def build_job(
    run_dir: Path,
    store_dir: Path,
    inputs: Path,
    **fields: Any,  # noqa: ANN401
) -> PretrainConfig:
    """Build the config of a job; keywords replace its fields by paths such as `lora__rank`."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"path": str(inputs / "model")},
        "data": {
            "sources": [{"path": str(inputs / "corpus")}],
            "store_dir": str(store_dir),
            "validation_fraction": 0.1,
        },
        "lora": {"rank": 4, "dropout": 0.1, "modules_to_save": ["embed_tokens"]},
        "batch": {"sequence_tokens": 24, "sequences_per_step": 4, "micro_batch_sequences": 2},
        "optim": {"learning_rate": 0.01},
        "engine": {"precision": "fp32", "zero_stage": 2},
        "scale": {"num_workers": 2},
        "checkpoint": {"every_steps": 2},
        "eval": {"every_steps": 4, "max_sequences": 8},
        "logging": {"tensorboard": False, "every_steps": 1},
        "max_steps": 8,
    }
    return build_config(values, fields)


def start_job(config: PretrainConfig, log: Path) -> subprocess.Popen[bytes]:
    """Start `python jobs/pretrain.py` with a config, on a Ray cluster of its own."""
    file = log.with_suffix(".yaml")
    write_yaml(config, file)
    command = [sys.executable, "jobs/pretrain.py", str(file)]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=own_cluster())


def own_cluster() -> dict[str, str]:
    """Return an environment in which a job starts a cluster rather than find the tests' own."""
    return {**os.environ, "RAY_ADDRESS": "local"}


def losses(config: PretrainConfig) -> dict[float, float]:
    """Return the training loss by step; a step that stands twice is an error."""
    found = [(r["step"], r[LOSS]) for r in read_metrics(config.run_place) if LOSS in r]
    assert len(dict(found)) == len(found)
    return dict(found)


def wait_for_step(config: PretrainConfig, step: int, process: subprocess.Popen[bytes]) -> None:
    """Return once a run has done a step; fail if its process ends before."""
    deadline = time.monotonic() + 300
    while max(losses(config), default=0) < step:
        assert process.poll() is None, "the job ended before the step"
        assert time.monotonic() < deadline, "no such step in time"
        time.sleep(0.05)
