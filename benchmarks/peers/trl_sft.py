"""The peer: TRL's SFTTrainer with PEFT, as torchrun starts it: `trl_sft.py SETTINGS.json`.

It gets the ids of whole conversations and which of them are answers, and does the rest as it is:
packing or padding, the order, the loss.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from watched import StepRecorder


def sft_arguments(settings: dict[str, Any]) -> SFTConfig:
    """Return TRL's arguments, with the numbers of our config."""
    return SFTConfig(
        output_dir=settings["run_dir"],
        use_cpu=True,
        ddp_backend="gloo",
        bf16=False,
        gradient_checkpointing=False,
        packing=settings["packing"],
        # Otherwise it learns every token of rows that are encoded already.
        completion_only_loss=True,
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
    watch = StepRecorder(Path(settings["result"]))
    watch.record_steps_of(SFTTrainer)
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(base, settings["adapter"], is_trainable=True),
        args=arguments,
        train_dataset=Dataset.from_list(json.loads(Path(settings["rows"]).read_text())),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
