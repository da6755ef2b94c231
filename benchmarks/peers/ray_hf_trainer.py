"""The peer: a plain Ray Train run of transformers' Trainer, as Ray's own guide writes it.

`ray_hf_trainer.py SETTINGS.json`: TorchTrainer, RayTrainReportCallback, restarts without limit, and
resuming from the checkpoint that Ray hands out. The Trainer is only watched.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import ray.train.huggingface.transformers as ray_transformers
import torch
from hf_trainer import SequenceDataset
from peft import PeftModel
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class StepsFile(TrainerCallback):
    """Notes each step, in a file that is made anew at every start."""

    def __init__(self, file: Path) -> None:
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        self._file = temporary.open("w", buffering=1)
        temporary.replace(file)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002  # the signature of a callback
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Write a line."""
        self._file.write(json.dumps({"step": state.global_step, "train/loss": 0.0}) + "\n")


def train(settings: dict[str, Any]) -> None:
    """Train as one of Ray's workers."""
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(
        settings["model"],
        dtype=torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
        use_cache=False,
    )
    model = PeftModel.from_pretrained(base, settings["adapter"], is_trainable=True)
    arguments = TrainingArguments(
        # As on nodes with disks of their own.
        output_dir=tempfile.mkdtemp(prefix="hf-", dir=settings["folder"]),
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        per_device_train_batch_size=settings["sequences_per_worker"],
        max_steps=settings["num_steps"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        lr_scheduler_type="cosine",
        warmup_steps=0,
        adam_beta1=settings["beta1"],
        adam_beta2=settings["beta2"],
        adam_epsilon=settings["epsilon"],
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=10,
        save_steps=settings["save_steps"],
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
    )
    is_first = ray.train.get_context().get_world_rank() == 0
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=SequenceDataset(settings["sequences"]),
        callbacks=[StepsFile(Path(settings["steps_file"]))] if is_first else [],
    )
    trainer.add_callback(ray_transformers.RayTrainReportCallback())
    trainer = ray_transformers.prepare_trainer(trainer)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
    else:
        with checkpoint.as_directory() as folder:
            trainer.train(resume_from_checkpoint=str(Path(folder, "checkpoint")))
    if is_first:
        trainer.save_model(settings["result"])


def main() -> None:
    """Train to the end; the same command goes on."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    ray.init(log_to_driver=False)
    TorchTrainer(
        train,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=settings["num_workers"]),
        run_config=ray.train.RunConfig(
            name="peer",
            storage_path=settings["folder"],
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={
                "env_vars": {
                    "OMP_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    "PYTHONPATH": str(Path(__file__).parent),
                }
            },
        ),
    ).fit()


if __name__ == "__main__":
    main()
