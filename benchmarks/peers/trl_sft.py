"""The peer: TRL's SFTTrainer with PEFT, as torchrun starts it: `trl_sft.py SETTINGS.json`.

It gets the ids of whole conversations and which of them are answers, and does the rest as it is:
packing or padding, the order, the loss. A subclass notes each step's loss and its answers' tokens,
a callback the time.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer


class WatchedTrainer(SFTTrainer):
    """The trainer, noting of each step on this worker its loss and its targets."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  # the trainer's own
        super().__init__(**options)
        self.step_losses: list[Tensor] = []
        self.step_targets: list[int] = []

    def training_step(self, model: Any, inputs: Any, *others: Any) -> Tensor:  # noqa: ANN401
        """Take the trainer's own step."""
        self.step_targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
        loss = super().training_step(model, inputs, *others)
        self.step_losses.append(loss)
        return loss


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002  # the signature of a callback
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Start."""
        self.laps.append(time.perf_counter())

    on_step_end = on_train_begin


def sft_arguments(settings: dict[str, Any]) -> SFTConfig:
    """Return TRL's arguments, with the numbers of our config."""
    return SFTConfig(
        output_dir=settings["run_dir"],
        use_cpu=True,
        ddp_backend="gloo",
        bf16=False,
        gradient_checkpointing=False,
        packing=settings["packing"],
        max_length=settings["sequence_tokens"],
        per_device_train_batch_size=settings["sequences_per_worker"],
        gradient_accumulation_steps=1,
        max_steps=settings["num_steps"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        lr_scheduler_type="cosine",
        warmup_steps=0,
        optim="adamw_torch_fused",
        dataloader_pin_memory=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
    )


def main() -> None:
    """Train, and write what was measured as the first of the processes."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    arguments = sft_arguments(settings)
    base = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    clock = Clock()
    trainer = WatchedTrainer(
        model=PeftModel.from_pretrained(base, settings["adapter"], is_trainable=True),
        args=arguments,
        train_dataset=Dataset.from_list(json.loads(Path(settings["rows"]).read_text())),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    losses = torch.stack(trainer.step_losses).double()
    targets = torch.tensor(trainer.step_targets)
    dist.all_reduce(losses)
    dist.all_reduce(targets)
    if dist.get_rank() == 0:
        measured = {
            "step_seconds": np.diff(clock.laps).tolist(),
            "losses": (losses / dist.get_world_size()).tolist(),
            "targets": targets.tolist(),
            "peak_gib": peak_gib,
        }
        Path(settings["result"]).write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
