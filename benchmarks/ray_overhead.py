"""What Ray Train costs: our loop under torchrun against the same loop under Ray's TorchTrainer.

    python benchmarks/ray_overhead.py [--rounds 3] [--steps 30] [--workers 2] [--zero-stage 2]

Both run `raytune_llama.train.loop.train` with one config, in processes of one thread. Only
steady steps are compared, not start-up. Ray's cluster is started for its own runs and stopped
behind each: torchrun's processes do not share the machine with it, Ray's do. Where workers take
every core there is, a step also waits for what Ray's own processes take of them; with `--workers 1`
on two cores it does not.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from harness.launch import SKIPPED_STEPS, Measurement, read_measurement, run_torchrun_loop
from harness.material import TINY, BenchmarkSize, Material, make_material

from raytune_llama.connection import connect_to_ray
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.orchestration.launch import PreparedRun, launch

TARGET_PERCENT = 2.5
TORCHRUN, RAY = "torchrun", "Ray Train"


def run_ray(config: PretrainConfig) -> Measurement:
    """Run the loop under Ray Train on a cluster of this machine; leave nothing behind."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True)
    with connect_to_ray():
        launch(PreparedRun.from_config(config))
    assert config.max_steps is not None
    measured = read_measurement(run_dir, config.max_steps)
    shutil.rmtree(run_dir)
    return measured


def run_rounds(
    material: Material, folder: Path, num_rounds: int, num_steps: int, zero_stage: int
) -> list[dict[str, Measurement]]:
    """Run both launchers in turn, every other round in the other order; print as they end."""
    rounds: list[dict[str, Measurement]] = []
    sides = [TORCHRUN, RAY]
    for number in range(num_rounds):
        measured: dict[str, Measurement] = {}
        for side in sides if number % 2 == 0 else reversed(sides):
            config = material.config(folder / "run", zero_stage=zero_stage, num_steps=num_steps)
            measured[side] = run_torchrun_loop(config) if side == TORCHRUN else run_ray(config)
        rounds.append(measured)
        plain, ray = measured[TORCHRUN].median_seconds, measured[RAY].median_seconds
        print(
            f"round {number + 1}: {TORCHRUN} {plain:.4f} s a step, {RAY} {ray:.4f} s: "
            f"{(ray / plain - 1) * 100:+.2f} %",
            flush=True,
        )
    return rounds


def main() -> int:
    """Run the benchmark; return 1 where the two launchers' losses differ."""
    parser = argparse.ArgumentParser(description="What Ray Train costs; see the head of this file.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2, help="processes that train")
    parser.add_argument("--zero-stage", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--tiny", action="store_true", help="try out; the figures mean nothing")
    options = parser.parse_args()
    if options.steps <= SKIPPED_STEPS or min(options.rounds, options.workers) < 1:
        parser.error(f"wanted at least 1 round, 1 worker and {SKIPPED_STEPS + 1} steps")
    shape = replace(TINY if options.tiny else BenchmarkSize(), num_workers=options.workers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material = make_material(folder, shape, num_steps=options.steps)
        print(f"{shape.describe()}, ZeRO {options.zero_stage}\n{material.text}", flush=True)
        rounds = run_rounds(material, folder, options.rounds, options.steps, options.zero_stage)
    pairs = [(one[TORCHRUN].median_seconds, one[RAY].median_seconds) for one in rounds]
    percent = statistics.median((ray / plain - 1) * 100 for plain, ray in pairs)
    extra = statistics.median((ray - plain) * 1000 for plain, ray in pairs)
    print(
        f"overhead of {RAY}, median over rounds: {percent:+.2f} % ({extra:+.1f} ms a step); "
        f"target at most {TARGET_PERCENT} %"
    )
    equal = all(one[side].losses == rounds[0][TORCHRUN].losses for one in rounds for side in one)
    print(f"losses of all runs: {'equal' if equal else 'NOT EQUAL'}, {options.steps} steps each")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
