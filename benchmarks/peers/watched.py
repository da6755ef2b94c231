"""What a peer's trainer is watched by: the loss, the targets and the end of each step.

The trainers are transformers' own or built on it, from whichever environment the program runs in.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepRecorder(TrainerCallback):
    """Notes when each step ends; `see_steps_of` gives it losses and targets.

    At the end of training the first of the processes writes what was measured to a file.
    """

    def __init__(self, result: Path) -> None:
        self._result = result
        self.laps: list[float] = []
        self.losses: list[Tensor] = []
        self.targets: list[int] = []

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002  # the signature of a callback
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Start."""
        self.laps.append(time.perf_counter())

    # A step ends for all sides when its weights are written.
    on_step_end = on_train_begin

    def record_steps_of(self, trainer: type[Trainer]) -> None:
        """Let a class of trainers note its steps here and take them as before."""
        take_step = trainer.training_step

        def training_step(
            self_: Trainer,
            model: nn.Module,
            inputs: dict[str, Any],
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor:
            shifted = inputs.get("shift_labels", inputs["labels"][:, 1:])
            self.targets.append(int((shifted != -100).sum()))
            loss = take_step(self_, model, inputs, num_items_in_batch)
            self.losses.append(loss)
            return loss

        trainer.training_step = training_step  # pyright: ignore[reportAttributeAccessIssue]  # the name of self

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002  # the signature of a callback
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Sum up over the processes, and write."""
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        losses = torch.stack(self.losses).double()
        targets = torch.tensor(self.targets)
        dist.all_reduce(losses)
        dist.all_reduce(targets)
        if dist.get_rank() == 0:
            measured = {
                "step_seconds": np.diff(self.laps).tolist(),
                "losses": (losses / dist.get_world_size()).tolist(),
                "targets": targets.tolist(),
                "peak_gib": peak_gib,
            }
            self._result.write_text(json.dumps(measured))
