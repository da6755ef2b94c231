"""The peer: the stack of the Chinese-LLaMA training scripts, as torchrun starts it.

`hf_trainer.py SETTINGS.json`: transformers' Trainer, PEFT, DeepSpeed ZeRO 2 with the scripts' own
JSON, less its fp16 block, which DeepSpeed does not have on CPUs. The Trainer is used as it is and
only watched.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from watched import StepRecorder

DEEPSPEED = {
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 1e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


class SequenceDataset(Dataset[dict[str, Tensor]]):
    """Sequences in a fixed order, with labels that are shifted already."""

    def __init__(self, file: str) -> None:
        arrays = np.load(file)
        self._ids, self._labels = (
            torch.from_numpy(arrays["ids"]),
            torch.from_numpy(arrays["labels"]),
        )

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # The loss reads `shift_labels`; the model asks for `labels` to take a loss at all.
        labels = self._labels[index]
        return {"input_ids": self._ids[index], "labels": labels, "shift_labels": labels}


def training_arguments(settings: dict[str, Any]) -> TrainingArguments:
    """Return the scripts' arguments, with the numbers of our config."""
    return TrainingArguments(
        output_dir=settings["run_dir"],
        deepspeed=DEEPSPEED,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=settings["sequences_per_worker"],
        gradient_accumulation_steps=1,
        max_steps=settings["num_steps"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        lr_scheduler_type="cosine",
        warmup_steps=0,
        adam_beta1=settings["beta1"],
        adam_beta2=settings["beta2"],
        adam_epsilon=settings["epsilon"],
        # The default of this version of transformers, and ours: PyTorch's fused AdamW.
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=10,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
    )


def main() -> None:
    """Train, and write what was measured as the first of the processes."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    arguments = training_arguments(settings)
    base = AutoModelForCausalLM.from_pretrained(
        settings["model"],
        dtype=torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
        use_cache=False,
    )
    model = PeftModel.from_pretrained(base, settings["adapter"], is_trainable=True)
    watch = StepRecorder(Path(settings["result"]))
    watch.record_steps_of(Trainer)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=SequenceDataset(settings["sequences"]),
        callbacks=[watch],
    )
    trainer.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
