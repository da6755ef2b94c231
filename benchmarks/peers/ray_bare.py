"""What Ray Train itself takes to start: workers with a process group, and no model.

`ray_bare.py SETTINGS.json`: each worker takes steps of nothing until the end; nothing is saved.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig, TorchTrainer

STEP_SECONDS = 0.05


def train(settings: dict[str, Any]) -> None:
    """Add up a number over the workers at each step; the first one writes the step down."""
    lines = None
    if ray.train.get_context().get_world_rank() == 0:
        file = Path(settings["steps_file"])
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        lines = temporary.open("w", buffering=1)
        temporary.replace(file)
    for step in range(1, settings["num_steps"] + 1):
        dist.all_reduce(torch.ones(1))
        time.sleep(STEP_SECONDS)
        if lines is not None:
            lines.write(json.dumps({"step": step, "train/loss": 0.0}) + "\n")


def main() -> None:
    """Run until all steps are taken, which no start of the workers lasts for."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    ray.init(log_to_driver=False)
    TorchTrainer(
        train,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=settings["num_workers"]),
        run_config=ray.train.RunConfig(
            name="bare",
            storage_path=settings["folder"],
            failure_config=ray.train.FailureConfig(max_failures=-1),
        ),
    ).fit()


if __name__ == "__main__":
    main()
