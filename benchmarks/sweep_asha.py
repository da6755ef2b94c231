"""What stopping trials early saves: ASHA against the full random search, on the same samples.

    python benchmarks/sweep_asha.py [--trials 27] [--steps 60] [--workers-at-a-time 2]

A small LLaMA with random weights learns the demo's Chinese text (or made up words); sought are
learning rate, weight decay and warm-up. Both sides draw the same samples. Counted are the
optimizer steps of all trials, and the wall time from the first trial's start, until a trial's
evaluation is within 1 % of the best loss of the full search, whose every trial runs to its end.
A trial's start costs seconds whatever it trains, so both are told.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.material import REPOSITORY, SEED
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytune_llama.config.settings import from_dict, write_yaml
from raytune_llama.connection import connect_to_ray
from raytune_llama.logs import setup_logging
from raytune_llama.train.config import PretrainConfig
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import JOURNAL_FILE
from raytune_llama.tune.sweep import run_sweep

TARGET = 0.25
CLOSE_RATIO = 1.01
VOCABULARY = 2000


@dataclass(frozen=True)
class SearchCost:
    """What a sweep's journal says it has cost."""

    events: list[dict[str, Any]]

    @property
    def best(self) -> float:
        """The lowest loss of any evaluation."""
        return min(event["value"] for event in self.events if event["event"] == "report")

    def cost(self, wanted: float | None = None) -> tuple[int, float]:
        """Return optimizer steps and seconds until a loss is reached; None: of the whole sweep."""
        steps: dict[int, int] = {}
        start = end = self.events[0]["time"]
        for event in self.events:
            end = event["time"]
            if event["event"] == "report":
                steps[event["trial"]] = event["step"]
                if wanted is not None and event["value"] <= wanted:
                    break
        else:
            if wanted is not None:
                raise RuntimeError(f"no trial has reached {wanted}")
        return sum(steps.values()), end - start


def make_base(folder: Path, num_steps: int) -> Path:
    """Write text, a tokenizer, a model and the config that all trials share."""
    files = sorted((REPOSITORY / "demo" / "corpus").glob("*.txt"))
    text = "\n".join(file.read_text(encoding="utf-8")[:300_000] for file in files)
    lines = [line for line in text.splitlines() if line.strip()]
    lines = lines or [f"line {n} has {n * n % 97} of {n % 13} words" for n in range(5000)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(lines, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder / "model")
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    base: dict[str, Any] = {
        "run_dir": str(folder / "unused"),
        "train": "full",
        "model": {"path": str(folder / "model")},
        "data": {
            "sources": [{"path": str(folder / "corpus.txt")}],
            "store_dir": str(folder / "store"),
            "validation_fraction": 0.05,
        },
        "batch": {"sequence_tokens": 128, "sequences_per_step": 8, "micro_batch_sequences": 8},
        "engine": {"precision": "fp32", "strategy": "ddp", "zero_stage": None},
        "eval": {"every_steps": 5, "max_sequences": 64},
        "checkpoint": {"every_steps": 10**9, "keep_best": False},
        "logging": {"tensorboard": False},
        "max_steps": num_steps,
    }
    write_yaml(from_dict(PretrainConfig, base), folder / "base.yaml")
    return folder / "base.yaml"


def search(folder: Path, base: Path, scheduler: str, options: argparse.Namespace) -> SearchCost:
    """Run a sweep; return what it has cost."""
    sweep: dict[str, Any] = {
        "sweep_dir": str(folder / scheduler),
        "job": "pretrain",
        "base": str(base),
        "space": {
            "optim.learning_rate": {"loguniform": [1e-5, 1.0]},
            "optim.weight_decay": {"choice": [0.0, 0.01, 0.1]},
            "schedule.warmup_ratio": {"choice": [0.0, 0.1, 0.3]},
        },
        "search": {"kind": "random", "seed": SEED},
        "scheduler": {"kind": scheduler},
        "num_trials": options.trials,
        "max_steps": options.steps,
        "max_concurrent": options.workers_at_a_time,
    }
    start = time.perf_counter()
    summary = run_sweep(from_dict(SweepConfig, sweep))
    states = [trial.state for trial in summary.trials]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    print(f"{scheduler}: {time.perf_counter() - start:.0f} s, {counts}", flush=True)
    text = (summary.sweep_dir / JOURNAL_FILE).read_bytes().decode()
    return SearchCost([json.loads(line) for line in text.splitlines()])


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers-at-a-time", type=int, default=2)
    options = parser.parse_args()
    setup_logging()
    with tempfile.TemporaryDirectory() as name, connect_to_ray():
        folder = Path(name)
        base = make_base(folder, options.steps)
        full = search(folder, base, "none", options)
        asha = search(folder, base, "asha", options)
    all_steps, all_seconds = full.cost()
    print(f"the full search: best loss {full.best:.4f}, {all_steps} steps, {all_seconds:.0f} s")
    for side, found in (("full search", full), ("ASHA", asha)):
        steps, seconds = found.cost(full.best * CLOSE_RATIO)
        print(
            f"{side}: within 1 % after {steps} steps ({steps / all_steps:.2f} of the full search, "
            f"target for ASHA {TARGET}), {seconds:.0f} s ({seconds / all_seconds:.2f})"
        )
    steps, seconds = asha.cost()
    print(
        f"ASHA to its end: best loss {asha.best:.4f}, {steps} steps ({steps / all_steps:.2f}), "
        f"{seconds:.0f} s ({seconds / all_seconds:.2f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
