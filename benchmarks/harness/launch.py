"""Run one side of a benchmark and return what it measured."""

import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raytune_llama.config.settings import to_dict
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.monitoring.metrics import (
    LOSS,
    PEAK_MEMORY,
    STEP_SECONDS,
    TARGET_TOKENS,
    read_metrics,
)
from raytune_llama.train.orchestration.launch import worker_environment

from .material import write_json

BENCHMARKS = Path(__file__).resolve().parents[1]
SKIPPED_STEPS = 3
"""First steps that no figure counts: memory is allocated, and optimizer state made."""
TAIL_CHARACTERS = 12000


@dataclass(frozen=True)
class Measurement:
    """What one run measured on its first worker."""

    step_seconds: list[float]
    """From the end of the step before; reading the batch is in it."""

    losses: list[float]
    """Of each step over all workers, in nats a target token."""

    targets: list[int]
    """Of each step over all workers, in tokens."""

    peak_gib: float
    """Peak resident memory of the first process while it trained."""

    @property
    def median_seconds(self) -> float:
        """Median step behind the first few."""
        return statistics.median(self.step_seconds[SKIPPED_STEPS:])

    @property
    def targets_per_second(self) -> float:
        """Target tokens a second behind the first few steps."""
        return sum(self.targets[SKIPPED_STEPS:]) / sum(self.step_seconds[SKIPPED_STEPS:])

    @property
    def last_loss(self) -> float:
        """Mean over the targets of the last ten steps."""
        last = list(zip(self.losses, self.targets, strict=True))[-10:]
        return sum(loss * count for loss, count in last) / sum(count for _, count in last)


def read_measurement(run_dir: Path, num_steps: int) -> Measurement:
    """Return what a finished run of our loop wrote to its metrics file.

    Raises:
        RuntimeError: not every step stands there.
    """
    records = [record for record in read_metrics(Place.local(run_dir)) if STEP_SECONDS in record]
    if [record["step"] for record in records] != list(range(1, num_steps + 1)):
        raise RuntimeError(f"{run_dir}: {len(records)} steps were measured, wanted {num_steps}")
    return Measurement(
        [record[STEP_SECONDS] for record in records],
        [record[LOSS] for record in records],
        [round(record[TARGET_TOKENS]) for record in records],
        records[-1][PEAK_MEMORY],
    )


def run_torchrun_loop(config: AnyTrainConfig) -> Measurement:
    """Run our loop as torchrun starts it; leave nothing behind."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True)
    settings = write_json(run_dir / "benchmark.json", to_dict(config))
    # What our trainer gives its workers belongs to our side.
    run_torchrun(
        "torchrun_loop.py",
        settings,
        num_workers=config.scale.max_workers,
        extra=worker_environment(config.scale),
    )
    assert config.max_steps is not None
    measured = read_measurement(run_dir, config.max_steps)
    shutil.rmtree(run_dir)
    return measured


def run_torchrun(
    program: str,
    *arguments: Path,
    num_workers: int = 2,
    python: Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Run a program of `peers/` in processes of one thread each.

    Args:
        program: file name in `peers/`.
        arguments: passed on to it.
        num_workers: how many processes.
        python: the interpreter of another environment.
        extra: environment variables beside those that both sides get.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    command = [
        *(str(python or sys.executable), "-m", "torch.distributed.run"),
        f"--nproc_per_node={num_workers}",
        "--master_addr=127.0.0.1",
        f"--master_port={_free_port()}",
        str(BENCHMARKS / "peers" / program),
        *map(str, arguments),
    ]
    # DeepSpeed looks for ninja in PATH when it compiles its collective.
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {
        **os.environ,
        "PATH": tools,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        **(extra or {}),
    }
    done = subprocess.run(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        tail = done.stdout[-TAIL_CHARACTERS:]
        raise RuntimeError(f"{program} ended with status {done.returncode}:\n{tail}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
