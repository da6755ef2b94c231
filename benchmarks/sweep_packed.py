"""Trials that share one base and one start: a packed sweep against trials with their own workers.

    python benchmarks/sweep_packed.py [--model tiny|demo] [--trials 16] [--steps 60] [--slots 8]

Both sides run the same trials: LoRA ranks 4 to 32 by learning rates, on a LLaMA with random
weights, either a tiny one or one of the demo model's shape with a quarter of its layers. Trials
with their own workers run two at a time on one core each; a pack has one worker on two cores. The
wall time is that of the whole sweep in a cluster that has started, from the check of its config to
its leaderboard, and the memory that of the trials' processes.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.material import SEED
from harness.trial_memory import TrialMemory
from sweep_asha import make_base
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.config.settings import from_dict, load, to_dict, write_yaml
from raytune_llama.connection import connect_to_ray
from raytune_llama.logs import setup_logging
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import INPUT_TOKENS, read_metrics
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import trial_dir
from raytune_llama.tune.sweep import run_sweep

TIME_TARGET, MEMORY_TARGET = 3.0, 0.25
TOLERANCE = 1e-4
"""Largest difference of equal evaluations: the sides have unequal numbers of threads."""
RANKS = [4, 8, 16, 32]
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
DEMO_SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 7,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class SideResult:
    """What one side of a comparison has taken."""

    seconds: float
    memory_mib: float
    num_processes: int
    tokens_per_second: float
    best: float
    states: dict[str, int]
    losses: dict[tuple[int, int], float]
    """Evaluations by trial and step."""

    def __str__(self) -> str:
        return (
            f"{self.seconds:.0f} s, {self.memory_mib:,.0f} MiB at most in {self.num_processes} "
            f"processes, {self.tokens_per_second:,.0f} tokens/s, best loss {self.best:.4f}, "
            f"{self.states}"
        )


def write_base(folder: Path, options: argparse.Namespace) -> Path:
    """Write the model, its text, and the config that all trials share."""
    base = to_dict(load(PretrainConfig, [str(make_base(folder, options.steps))]))
    if options.model == "demo":
        torch.manual_seed(SEED)
        LlamaForCausalLM(LlamaConfig(**DEMO_SHAPE)).save_pretrained(folder / "model")
    base |= {"train": "lora", "lora": {"rank": 4, "alpha": 16.0, "dropout": 0.05}}
    base["model"]["allow_untrained_rows"] = True
    base["batch"] = {"sequence_tokens": 128, "sequences_per_step": 4, "micro_batch_sequences": 4}
    base["eval"] |= {"every_steps": 10, "max_sequences": 16}
    write_yaml(from_dict(PretrainConfig, base), folder / "base.yaml")
    return folder / "base.yaml"


def search(
    folder: Path, base: Path, *, scheduler: str, slots: int | None, steps: int, trials: int
) -> SideResult:
    """Run a sweep, packed with `slots` or with workers per trial; return what it has taken."""
    place = folder / f"{scheduler}-{slots or 'alone'}"
    sweep = from_dict(
        SweepConfig,
        {
            "sweep_dir": str(place),
            "job": "pretrain",
            "base": str(base),
            # A packed worker has the cores of the two that train at a time without a pack.
            "fixed": {"scale.cpus_per_worker": 2 if slots else 1},
            "space": {
                "lora.rank": {"choice": RANKS},
                "optim.learning_rate": {"choice": RATES},
            },
            "search": {"kind": "grid"},
            "scheduler": {"kind": scheduler},
            "num_trials": trials,
            "max_steps": steps,
            "pack": slots,
        },
    )
    start = time.perf_counter()
    with TrialMemory() as memory:
        summary = run_sweep(sweep)
    seconds = time.perf_counter() - start
    states = [trial.state for trial in summary.trials]
    numbers = range(len(states))
    tokens = sum(
        record.get(INPUT_TOKENS, 0.0)
        for number in numbers
        for record in read_metrics(trial_dir(sweep.place, number))
    )
    losses = {
        (trial.number, step): value
        for trial in summary.trials
        for step, value in trial.values.items()
    }
    return SideResult(
        seconds,
        memory.peak_mib,
        memory.peak_processes,
        tokens / seconds,
        min(losses.values()),
        {state: states.count(state) for state in sorted(set(states))},
        losses,
    )


def compare(folder: Path, base: Path, scheduler: str, options: argparse.Namespace) -> bool:
    """Run both sides; print them, and return whether their common evaluations agree."""
    fields: dict[str, Any] = {
        "scheduler": scheduler,
        "steps": options.steps,
        "trials": options.trials,
    }
    packed = search(folder, base, slots=options.slots, **fields)
    print(f"{options.model}, {scheduler}, packed by {options.slots}: {packed}", flush=True)
    alone = search(folder, base, slots=None, **fields)
    print(f"{options.model}, {scheduler}, two at a time: {alone}", flush=True)
    print(
        f"{options.model}, {scheduler}: {alone.seconds / packed.seconds:.2f} times less wall time "
        f"(target {TIME_TARGET}); memory {packed.memory_mib / (alone.memory_mib / 2):.2f} of one "
        f"trial's processes, {packed.memory_mib / (options.slots * alone.memory_mib / 2):.2f} of "
        f"{options.slots} trials' (target {MEMORY_TARGET})",
        flush=True,
    )
    both = packed.losses.keys() & alone.losses.keys()
    largest = max(abs(packed.losses[key] - alone.losses[key]) for key in both)
    print(f"largest difference of {len(both)} common evaluations: {largest:.2g}", flush=True)
    return largest < TOLERANCE


def main() -> int:
    """Run the benchmark; return 1 if the losses of the two sides differ."""
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--model", choices=["tiny", "demo"], default="tiny")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--schedulers", nargs="+", default=["none", "asha"])
    options = parser.parse_args()
    setup_logging()
    with tempfile.TemporaryDirectory() as name, connect_to_ray():
        folder = Path(name)
        base = write_base(folder, options)
        agree = [compare(folder, base, each, options) for each in options.schedulers]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
