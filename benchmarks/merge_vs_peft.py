"""Merging an adapter against PEFT, mergekit, and copying the files: seconds and peak memory.

    python benchmarks/merge_vs_peft.py [--rounds 3] [--tiny]

A LLaMA of 1.1 billion random bfloat16 weights in several files, an adapter of rank 8 on its seven
projections. Each side is a process of its own, start of Python included; ours proves each weight
and syncs the files, the peers do neither. In float32 ours must have the bytes of PEFT's result.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.corpus import ROOT
from harness.merge_material import TINY, MergeModelSize, write_adapter, write_base
from harness.peers import install_packages, is_installed, run, run_program

from raytune_llama.model.tensors import open_weights

OURS, PEFT, MERGEKIT, COPY = "ours", "PEFT", "mergekit", "copying the files"
TARGET_COPY, TARGET_MEMORY = 5.0, 0.25


@dataclass(frozen=True)
class MergeMeasurement:
    """What one merge took."""

    seconds: float
    """The whole process."""
    peak_mib: float
    """Largest resident size, mapped files included."""


@dataclass(frozen=True)
class MergeBenchmark:
    """The material, and how each side merges it."""

    folder: Path
    base: Path
    adapter: Path

    def run(self, side: str, dtype: str, target: Path) -> MergeMeasurement:
        """Run one side in a process of its own."""
        sides: dict[str, Callable[[str, Path], str]] = {
            OURS: self._ours,
            PEFT: self._peft,
            MERGEKIT: self._mergekit,
            COPY: self._copy,
        }
        os.sync()  # what the side before has left to write
        started = time.monotonic()
        printed = sides[side](dtype, target)
        seconds = time.monotonic() - started
        return MergeMeasurement(seconds, json.loads(printed.splitlines()[-1])["peak_mib"])

    def _ours(self, dtype: str, target: Path) -> str:
        program = ROOT / "benchmarks" / "harness" / "merge_once.py"
        settings = [f"base={self.base}", f"adapters=[{self.adapter}]", f"target={target}"]
        settings += [f"dtype={dtype}", "max_shard_mib=1024"]
        return run([sys.executable, str(program), *settings])

    def _peft(self, dtype: str, target: Path) -> str:
        return run_program("peft_merge.py", self.base, self.adapter, target, dtype)

    def _mergekit(self, dtype: str, target: Path) -> str:
        cache = self.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        arguments = (self.base, self.adapter, target, dtype, cache)
        return run_program("mergekit_merge.py", *arguments)

    def _copy(self, _: str, target: Path) -> str:
        target.mkdir()
        for file in self.base.iterdir():
            shutil.copyfile(file, target / file.name)
            with (target / file.name).open("rb") as copied:
                os.fsync(copied.fileno())
        return json.dumps({"peak_mib": 0.0})


def run_rounds(
    merge: MergeBenchmark, sides: list[str], num_rounds: int
) -> dict[str, list[MergeMeasurement]]:
    """Run all sides in turn, and every other round backwards, so that drift hits all alike."""
    measured: dict[str, list[MergeMeasurement]] = {side: [] for side in sides}
    for number in range(num_rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            target = merge.folder / "target"
            measured[side].append(merge.run(side, "bfloat16", target))
            shutil.rmtree(target)
            last = measured[side][-1]
            print(
                f"round {number + 1}: {side}: {last.seconds:.1f} s, {last.peak_mib:.0f} MiB",
                flush=True,
            )
    return measured


def print_table(measured: dict[str, list[MergeMeasurement]]) -> None:
    """Print seconds and memory of each side, and the ratios to ours of the same round."""
    print(f"\n{'':<20}{'seconds':>9}{'ours takes':>12}{'peak MiB':>10}{'ours takes':>12}")
    for side, runs in measured.items():
        pairs = list(zip(measured[OURS], runs, strict=True))
        seconds = statistics.median(ours.seconds / other.seconds for ours, other in pairs)
        cells = f"{statistics.median(run.seconds for run in runs):>9.1f}{seconds:>12.2f}"
        if runs[0].peak_mib:
            memory = statistics.median(ours.peak_mib / other.peak_mib for ours, other in pairs)
            cells += f"{statistics.median(run.peak_mib for run in runs):>10.0f}{memory:>12.2f}"
        print(f"{side:<20}{cells}")


def count_differing(merge: MergeBenchmark) -> int:
    """Merge in float32 on both sides; return in how many weights a byte differs."""
    ours, theirs = (merge.folder / name for name in ("ours", "theirs"))
    for side, target in ((OURS, ours), (PEFT, theirs)):
        took = merge.run(side, "float32", target)
        print(f"float32: {side}: {took.seconds:.1f} s, {took.peak_mib:.0f} MiB", flush=True)
    left, right = open_weights(ours), open_weights(theirs)
    if left.specs.keys() != right.specs.keys():
        raise RuntimeError(f"other weights: {sorted(left.specs.keys() ^ right.specs.keys())}")
    differing = [
        name
        for name in left.specs
        if not torch.equal(left.read(name).view(torch.uint8), right.read(name).view(torch.uint8))
    ]
    print(f"float32: {len(differing)} of {len(left.specs)} weights differ in a byte from PEFT's")
    return len(differing)


def main() -> int:
    """Run the benchmark; return 1 where the results differ."""
    parser = argparse.ArgumentParser(description="Merging against peers; see this file's head.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="try out; the figures mean nothing")
    options = parser.parse_args()
    shape = TINY if options.tiny else MergeModelSize()
    install_packages()
    sides = [OURS, PEFT, COPY]
    if is_installed("mergekit"):
        sides.insert(2, MERGEKIT)
    else:
        print("mergekit is not installed here, and left out")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merge = MergeBenchmark(folder, folder / "base", folder / "adapter")
        num_parameters = write_base(merge.base, shape)
        write_adapter(merge.adapter, shape)
        num_files = len(list(merge.base.glob("*.safetensors")))
        print(
            f"{num_parameters / 1e9:.2f} B parameters in {num_files} files; {os.cpu_count()} cores"
        )
        measured = run_rounds(merge, sides, options.rounds)
        print_table(measured)
        print("ours takes: seconds or memory of ours as a part of that side's, median over rounds")
        print(f"targets: {TARGET_COPY:g} times a copy, less time than PEFT")
        print(f"and {TARGET_MEMORY} of PEFT's memory")
        return int(count_differing(merge) > 0)


if __name__ == "__main__":
    sys.exit(main())
