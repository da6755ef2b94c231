"""The peer: LLaMA-Factory's training, as its command starts it: `llama_factory.py SETTINGS.json`.

It runs in an environment of its own, with the versions that LLaMA-Factory asks for. Its dataset
holds the numbers of conversations; where it would encode them, it gets the ids and masks that all
sides get. Packing (`neat_packing`: conversations don't see each other) or padding, order, model,
adapter and loss are its own.
"""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from watched import StepRecorder

# It imports the reader of sound files, whose build does not load everywhere, also for texts.
sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.data.processor.supervised import SupervisedDatasetProcessor  # noqa: E402
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402


def patch_processor(rows: list[dict[str, Any]]) -> None:
    """Let its processor take the ids of the conversation whose number it is given."""

    def encode(
        _: SupervisedDatasetProcessor,
        prompt: list[dict[str, str]],
        **__: Any,  # noqa: ANN401  # its own
    ) -> tuple[list[int], list[int]]:
        row = rows[int(prompt[0]["content"])]
        marked = zip(row["input_ids"], row["completion_mask"], strict=True)
        return row["input_ids"], [token if is_target else -100 for token, is_target in marked]

    SupervisedDatasetProcessor._encode_data_example = encode  # no public way in


def write_dataset(folder: Path, count: int) -> None:
    """Write the numbers of conversations as a dataset that it can read."""
    numbers = [{"instruction": str(n), "input": "", "output": "-"} for n in range(count)]
    (folder / "numbers.json").write_text(json.dumps(numbers))
    (folder / "dataset_info.json").write_text(
        json.dumps({"numbers": {"file_name": "numbers.json"}})
    )


def factory_arguments(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return its arguments, with the numbers of our config."""
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": settings["model"],
        "adapter_name_or_path": settings["adapter"],
        "finetuning_type": "lora",
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "template": "empty",
        "dataset": "numbers",
        "dataset_dir": str(folder),
        "packing": settings["packing"],
        "neat_packing": settings["packing"],
        "cutoff_len": settings["sequence_tokens"],
        "preprocessing_batch_size": 10**6,
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "ddp_backend": "gloo",
        "ddp_find_unused_parameters": False,
        "per_device_train_batch_size": settings["sequences_per_worker"],
        "gradient_accumulation_steps": 1,
        "max_steps": settings["num_steps"],
        "learning_rate": settings["learning_rate"],
        "weight_decay": settings["weight_decay"],
        "max_grad_norm": settings["max_grad_norm"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "dataloader_pin_memory": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings["seed"],
    }


def main() -> None:
    """Train, and write what was measured as the first of the processes."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    rows = json.loads(Path(settings["rows"]).read_text())
    patch_processor(rows)
    folder = Path(settings["run_dir"], os.environ["RANK"])
    folder.mkdir(parents=True)
    write_dataset(folder, len(rows))
    watch = StepRecorder(Path(settings["result"]))
    watch.record_steps_of(CustomSeq2SeqTrainer)
    run_exp(factory_arguments(settings, folder), callbacks=[watch])


if __name__ == "__main__":
    main()
