"""How much of the time is training, while workers, nodes and the driver are killed.

    python benchmarks/goodput.py [--steps N] [--every 60] [--seed 1] [--quick]

Two workers train on a cluster of three nodes of this machine (`cluster/local.sh`). Every so many
seconds something that a seed chooses is killed with SIGKILL: a worker, a node with all that runs on
it (another one is started 10 s later), or the driver, whose command is given again at once. The
peer is a plain Ray Train run of transformers' Trainer with RayTrainReportCallback, on the same
sequences, with the same interval of checkpoints and the same kills. What Ray itself takes to start
again is measured likewise, with workers that have no model.

Goodput is the time that the steps take undisturbed, divided by all the time from the first start to
the end; each side is measured against its own undisturbed run, in steps and in final weights.
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness.disturbed import MeasuredJob, RunRecord, describe, python, run_job_under_kills
from harness.material import (
    TINY,
    BenchmarkSize,
    Material,
    make_material,
    read_sequences,
    write_json,
)
from harness.nodes import LocalNodes

from raytune_llama.config.settings import override, write_yaml
from raytune_llama.storage.hashes import hash_file
from raytune_llama.train.config import PretrainConfig

BENCHMARKS = Path(__file__).resolve().parent
TARGET_RECOVERY = 1.2
TARGET_RATIO = 2.0
NUM_NODES = 3
ADAPTER = "adapter_model.safetensors"
OURS, PEER, BARE = "ours", "Ray Train + HF Trainer", "Ray Train without a model"
NEEDS = """needs: 4 GB of memory, 3 GB in the temporary folder; no other program on its cores.
takes: about an hour on four quiet cores; --quick half of that on two, with a tiny model."""


@dataclass(frozen=True)
class GoodputBenchmark:
    """What all sides have in common."""

    material: Material
    folder: Path
    nodes: LocalNodes
    num_steps: int
    save_steps: int
    every_seconds: float
    seed: int

    def config(self, name: str) -> PretrainConfig:
        """Return the config of our loop in a run directory of its own."""
        plain = self.material.config(self.folder / name, zero_stage=0, num_steps=self.num_steps)
        return override(
            plain,
            {
                "checkpoint.every_steps": self.save_steps,
                "scale.max_failures": 1000,
                "scale.collective_timeout_seconds": 60.0,
            },
        )

    def ours(self, name: str) -> tuple[MeasuredJob, Path]:
        """Return our side, and where its final weights will be."""
        config = self.config(name)
        file = self.folder / f"{name}.yaml"
        write_yaml(config, file)
        command = python(BENCHMARKS / "harness" / "train_on_ray.py", file)
        run_dir = Path(config.run_dir)
        side = MeasuredJob(OURS, command, run_dir / "metrics.jsonl", self.num_steps)
        return side, run_dir / config.result_name / ADAPTER

    def peer(self, name: str) -> tuple[MeasuredJob, Path]:
        """Return the peer, and where its final weights will be."""
        folder, sequences = self.folder / name, self.folder / "sequences.npz"
        folder.mkdir()
        config = self.config(name)
        if not sequences.exists():
            ids, labels = read_sequences(config)
            np.savez(sequences, ids=ids, labels=labels)
        optim = config.optim
        settings = {
            **self._settings(folder),
            "num_steps": self.num_steps,
            "save_steps": self.save_steps,
            "model": str(self.material.model),
            "adapter": str(self.material.adapter),
            "sequences": str(sequences),
            "result": str(folder / "result"),
            "sequences_per_worker": self.material.shape.sequences_per_worker,
            "learning_rate": optim.learning_rate,
            "weight_decay": optim.weight_decay,
            "max_grad_norm": optim.max_grad_norm,
            "beta1": optim.beta1,
            "beta2": optim.beta2,
            "epsilon": optim.epsilon,
            "seed": config.seed,
        }
        file = write_json(self.folder / f"{name}.json", settings)
        command = python(BENCHMARKS / "peers" / "ray_hf_trainer.py", file)
        side = MeasuredJob(PEER, command, folder / "steps.jsonl", self.num_steps)
        return side, folder / "result" / ADAPTER

    def bare(self, name: str) -> MeasuredJob:
        """Return Ray Train with workers that do nothing, without an end."""
        folder = self.folder / name
        folder.mkdir()
        file = write_json(
            self.folder / f"{name}.json", {**self._settings(folder), "num_steps": 10**9}
        )
        command = python(BENCHMARKS / "peers" / "ray_bare.py", file)
        return MeasuredJob(BARE, command, folder / "steps.jsonl", 10**9)

    def _settings(self, folder: Path) -> dict[str, object]:
        return {
            "folder": str(folder),
            "steps_file": str(folder / "steps.jsonl"),
            "num_workers": self.material.shape.num_workers,
        }

    def run(self, side: MeasuredJob, limit_seconds: float, *, disturbed: bool) -> RunRecord:
        """Run a side undisturbed, or under the kills."""
        return run_job_under_kills(
            side,
            self.nodes,
            limit_seconds=limit_seconds,
            every_seconds=self.every_seconds if disturbed else None,
            seed=self.seed,
            log=self.folder / "commands.log",
        )


@dataclass(frozen=True)
class GoodputResult:
    """A side, undisturbed and disturbed."""

    whole: RunRecord
    disturbed: RunRecord
    is_equal: bool | None
    """Whether the final weights of both are; None where one has none."""

    @property
    def goodput(self) -> float:
        """Of the disturbed run."""
        done = self.disturbed.num_done * self.whole.step_seconds
        return done / self.disturbed.wall_seconds


def run_both(benchmark: GoodputBenchmark, name: str, limit_seconds: float) -> GoodputResult:
    """Run one side undisturbed and under the kills; print as they end."""
    make = benchmark.ours if name == OURS else benchmark.peer
    kind = "ours" if name == OURS else "peer"
    side, whole_file = make(f"{kind}-whole")
    whole = benchmark.run(side, limit_seconds, disturbed=False)
    if not whole.is_finished:
        tail = (benchmark.folder / "commands.log").read_text()[-4000:]
        raise RuntimeError(f"{name}, undisturbed, has not finished:\n{tail}")
    print(f"{name}, undisturbed: {describe(whole, whole.step_seconds, side.num_steps)}", flush=True)
    side, file = make(f"{kind}-disturbed")
    # A run that loses more than it makes would take for ever.
    disturbed = benchmark.run(
        side, 4 * whole.wall_seconds + 2 * benchmark.every_seconds, disturbed=True
    )
    print(f"{name}: {describe(disturbed, whole.step_seconds, side.num_steps)}", flush=True)
    files = [whole_file, file]
    is_there = disturbed.is_finished and all(one.is_file() for one in files)
    is_equal = len({hash_file(one) for one in files}) == 1 if is_there else None
    words = {True: "equal", False: "NOT EQUAL", None: "none"}
    print(f"  final weights and those of the undisturbed run: {words[is_equal]}", flush=True)
    return GoodputResult(whole, disturbed, is_equal)


def main() -> int:
    """Run the benchmark; return 1 where our run needed a hand, did not end or ended elsewhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="of each run; 1500, or 1200 of the tiny model")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two kills")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=1, help="of the kills")
    parser.add_argument("--quick", action="store_true", help="a tiny model: starts weigh most")
    options = parser.parse_args()
    options.steps = options.steps or (1200 if options.quick else 1500)
    shape = TINY if options.quick else BenchmarkSize(sequence_tokens=256)
    nodes = LocalNodes()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            material = make_material(folder, shape, num_steps=options.steps)
            print(f"{shape.describe()}\n{material.text}", flush=True)
            print(
                f"{NUM_NODES} nodes on {os.cpu_count()} cores; a kill every {options.every:g} s, "
                f"seed {options.seed}; a checkpoint every {options.save_every} steps",
                flush=True,
            )
            nodes.run("up", str(NUM_NODES))
            benchmark = GoodputBenchmark(
                material,
                folder,
                nodes,
                num_steps=options.steps,
                save_steps=options.save_every,
                every_seconds=options.every,
                seed=options.seed,
            )
            return compare(benchmark)
    finally:
        nodes.close()


def compare(benchmark: GoodputBenchmark) -> int:
    """Run all sides, print ratios and targets, return the exit status."""
    results = {name: run_both(benchmark, name, limit_seconds=3600.0) for name in (OURS, PEER)}
    ours, peer = results[OURS], results[PEER]
    seconds = max(ours.disturbed.wall_seconds, 4 * benchmark.every_seconds)
    bare = benchmark.run(benchmark.bare("bare"), seconds, disturbed=True)
    print(f"{BARE}: {len(bare.kills)} kills")
    print(f"goodput: {ours.goodput / peer.goodput:.2f} times the peer's; target {TARGET_RATIO}")
    found, floor = ours.disturbed.recoveries(), bare.recoveries()
    if found and floor:
        median, least = statistics.median(found), statistics.median(floor)
        print(
            f"first step after a kill, median: {median:.1f} s, {median / least:.2f} times what "
            f"Ray itself takes to start, {least:.1f} s; target {TARGET_RECOVERY}"
        )
    hands = ours.disturbed.num_interventions
    print(f"ends of our command that nobody asked for: {hands}; target 0")
    print(f"final weights: {'equal' if ours.is_equal else 'NOT EQUAL'}; target equal")
    return int(hands > 0 or not ours.is_equal)


if __name__ == "__main__":
    sys.exit(main())
