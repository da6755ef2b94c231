"""How long training stands still for a checkpoint: ours against torch.save, DeepSpeed and DCP.

    python benchmarks/checkpoint_stall.py [--rounds 5] [--workers 1 2] [--trained lora full]

Processes over gloo train a LLaMA of 134 million random weights under plain data parallelism, its
adapter (rank 8, seven projections) or all of it, and save weights and AdamW's moments in float32.
Ours, torch.save and DCP save the same tensors, each process its share; DeepSpeed saves the same
model's under ZeRO 2. The sides take turns in the same processes, every other round in the other
order. `torch.save` is flushed by us, so that durable means the same; DCP has a group of its own.

A stall is the time until training goes on, and the waiting at the end if it is not written by then.
While it is written steps go on and are slower: what they take more, against steps just before, is
counted too. The share is both, of the time of 200 such steps, the default `checkpoint.every_steps`.
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from harness.stall_sides import OURS, SIDES, SaveMeasurement, StallSetup, measure

from raytune_llama.train.checkpoint.config import CheckpointConfig

TARGET_PERCENT = 1.0
NEEDS = """needs: 12 GB of memory and 10 GB of disk for two workers and all weights.
takes: about 20 minutes on two cores; --quick about 3."""


def run(setup: StallSetup) -> list[SaveMeasurement]:
    """Measure all sides in processes of their own.

    Raises:
        RuntimeError: a process has failed.
    """
    context = mp.get_context("spawn")
    results: Any = context.SimpleQueue()
    processes = [
        context.Process(target=measure, args=(rank, setup, results))
        for rank in range(setup.world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of the benchmark has failed")
    return results.get()


def print_sides(samples: list[SaveMeasurement]) -> float:
    """Print a line a side, medians over rounds; return our share of the wall time in percent."""
    every_steps = CheckpointConfig().every_steps
    stalls: dict[str, float] = {}
    shares: dict[str, float] = {}
    step_seconds = statistics.median(sample.step_seconds for sample in samples)
    for side in SIDES:
        mine = [sample for sample in samples if sample.side == side]
        stalls[side] = statistics.median(sample.stall_seconds for sample in mine)
        durable = statistics.median(sample.durable_seconds for sample in mine)
        slowed = statistics.median(sample.slowed_seconds for sample in mine)
        lost = stalls[side] + max(slowed, 0.0)
        shares[side] = 100 * lost / (every_steps * step_seconds + lost)
        print(
            f"  {side}: stall {1000 * stalls[side]:.1f} ms, steps beside it "
            f"{1000 * slowed:+.1f} ms, durable after {durable:.2f} s, "
            f"{mine[0].num_bytes / 2**20:.1f} MiB; {shares[side]:.3f} % of the time"
        )
    ratios = ", ".join(
        f"{stalls[OURS] / stalls[side]:.3f} of {side}'s" for side in SIDES if side != OURS
    )
    print(
        f"  our stall is {ratios}\n  share of the wall time, a checkpoint every {every_steps} "
        f"steps of {step_seconds:.3f} s: {shares[OURS]:.3f} %; target below {TARGET_PERCENT} %",
        flush=True,
    )
    return shares[OURS]


def main() -> int:
    """Run the benchmark; return 1 where a side has saved less than the state."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trained", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--quick", action="store_true", help="try out; the figures mean little")
    options = parser.parse_args()
    if min(options.rounds, *options.workers) < 1:
        parser.error("wanted at least 1 round and 1 worker")
    is_whole = True
    for trained in options.trained:
        for world_size in options.workers:
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
                setup = StallSetup(
                    trained=trained,
                    world_size=world_size,
                    threads=max(1, (os.cpu_count() or 1) // world_size),
                    rounds=1 if options.quick else options.rounds,
                    folder=Path(folder),
                )
                if options.quick:
                    setup = replace(setup, hidden=256, layers=4, sequence_tokens=64)
                print(f"{trained}, {world_size} workers of {setup.threads} threads", flush=True)
                samples = run(setup)
            print_sides(samples)
            # Tensors alone make the size: whoever has less has not saved them.
            sizes = [sample.num_bytes for sample in samples]
            is_whole = is_whole and min(sizes) > 0.95 * statistics.median(sizes)
    return int(not is_whole)


if __name__ == "__main__":
    sys.exit(main())
