"""Training throughput against the stack that trained Chinese-LLaMA, on this machine.

    python benchmarks/train_vs_hf.py [--rounds 3] [--steps 20] [--tiny]

The peer is torchrun, transformers' Trainer, PEFT and DeepSpeed ZeRO 2 (`peers/hf_trainer.py`). Ours
is `raytune_llama.train.loop.train`, started by the same torchrun, so that only the trainers
differ: with ZeRO 2, like for like, and with ZeRO 0 beside it. Both begin with the same weights and
see the same targets at each step; so their losses have to be the same, and this is checked.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness.launch import SKIPPED_STEPS, Measurement, run_torchrun, run_torchrun_loop
from harness.material import (
    TINY,
    BenchmarkSize,
    Material,
    make_material,
    read_sequences,
    write_json,
)

TARGET_RATIO = 1.3
MAX_LOSS_DIFFERENCE = 1e-3
PEER, OURS_2, OURS_0 = "peer, ZeRO 2", "ours, ZeRO 2", "ours, ZeRO 0"


def run_peer(material: Material, folder: Path, num_steps: int) -> Measurement:
    """Run the peer with the numbers of our config, on the sequences of our steps."""
    config = material.config(folder / "peer", zero_stage=2, num_steps=num_steps)
    sequences, result = folder / "sequences.npz", folder / "peer.json"
    ids, labels = read_sequences(config)
    np.savez(sequences, ids=ids, labels=labels)
    optim = config.optim
    settings = {
        "run_dir": config.run_dir,
        "model": str(material.model),
        "adapter": str(material.adapter),
        "sequences": str(sequences),
        "result": str(result),
        "sequences_per_worker": material.shape.sequences_per_worker,
        "num_steps": num_steps,
        "learning_rate": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "epsilon": optim.epsilon,
        "seed": config.seed,
    }
    run_torchrun("hf_trainer.py", write_json(folder / "peer_settings.json", settings))
    measured = Measurement(**json.loads(result.read_text()))
    result.unlink()
    if len(measured.losses) != num_steps or len(measured.step_seconds) != num_steps:
        raise RuntimeError(f"the peer took {len(measured.losses)} steps, wanted {num_steps}")
    return measured


def run_side(side: str, material: Material, folder: Path, num_steps: int) -> Measurement:
    """Run one side once."""
    if side == PEER:
        return run_peer(material, folder, num_steps)
    zero_stage = 2 if side == OURS_2 else 0
    config = material.config(folder / "ours", zero_stage=zero_stage, num_steps=num_steps)
    return run_torchrun_loop(config)


def run_rounds(
    material: Material, folder: Path, num_rounds: int, num_steps: int
) -> dict[str, list[Measurement]]:
    """Run all sides in turn, and every other round backwards, so that drift hits all alike."""
    sides = [PEER, OURS_2, OURS_0]
    measured: dict[str, list[Measurement]] = {side: [] for side in sides}
    for number in range(num_rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            measured[side].append(run_side(side, material, folder, num_steps))
            seconds = measured[side][-1].median_seconds
            print(f"round {number + 1}: {side}: {seconds:.3f} s a step", flush=True)
    return measured


def print_table(measured: dict[str, list[Measurement]], shape: BenchmarkSize) -> None:
    """Print tokens/s of each round, and the ratios to the peer of the same round."""
    targets = shape.sequences_per_step * shape.sequence_tokens
    num_rounds = len(measured[PEER])
    rounds = "".join(f"  round {number + 1}" for number in range(num_rounds))
    print(f"\n{'target tokens/s':<16}{rounds}   median    ratio   peak GiB a process")
    for side, runs in measured.items():
        speeds = [targets / run.median_seconds for run in runs]
        ratios = [
            peer.median_seconds / run.median_seconds
            for peer, run in zip(measured[PEER], runs, strict=True)
        ]
        cells = "".join(f"{speed:>9,.0f}" for speed in speeds)
        peak = max(run.peak_gib for run in runs)
        print(
            f"{side:<16}{cells}{statistics.median(speeds):>9,.0f}"
            f"{statistics.median(ratios):>9.3f}{peak:>12.2f}"
        )


def largest_difference(measured: dict[str, list[Measurement]]) -> float:
    """Return the largest distance of a loss from the peer's at the same step, over all runs."""
    wanted = measured[PEER][0].losses
    runs = [run for side in measured.values() for run in side]
    return max(
        abs(loss - other) for run in runs for loss, other in zip(run.losses, wanted, strict=True)
    )


def main() -> int:
    """Run the benchmark; return 1 where the losses differ."""
    parser = argparse.ArgumentParser(description="Ours against a peer; see the head of this file.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="try out; the figures mean nothing")
    options = parser.parse_args()
    if options.steps <= SKIPPED_STEPS or options.rounds < 1:
        parser.error(f"wanted at least 1 round of more than {SKIPPED_STEPS} steps")
    shape = TINY if options.tiny else BenchmarkSize()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material = make_material(folder, shape, num_steps=options.steps)
        print(f"{shape.describe()}\n{material.text}")
        measured = run_rounds(material, folder, options.rounds, options.steps)
    print_table(measured, shape)
    print(f"median step behind the first {SKIPPED_STEPS}; ratio: median over rounds, to the peer's")
    print(f"the ratio that counts: {OURS_2}; target {TARGET_RATIO}")
    first, last = measured[PEER][0].losses[0], measured[PEER][0].losses[-1]
    difference = largest_difference(measured)
    print(
        f"losses of {options.steps} steps ({first:.4f} to {last:.4f}): largest difference from the "
        f"peer's {difference:.2e}, allowed {MAX_LOSS_DIFFERENCE:.0e}"
    )
    return int(not difference <= MAX_LOSS_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
