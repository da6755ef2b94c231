"""The data stage with more workers, and with more text: throughput, and memory of a worker.

    python benchmarks/tokenize_scaling.py [--rounds 2] [--engine auto] [--tiny]

Ray nodes on this machine, whose cores they share: more workers than cores cannot be faster, and
show what they cost. Timed is the whole job on a running cluster: workers' start, reading, encoding,
writing. Memory is the largest resident size that the kernel has seen of any encoding process;
for it the corpus is taken once, four and sixteen times.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness.corpus import ROOT, Corpus, make_corpus, write_repeated
from harness.peers import run
from harness.vocabulary import make_llama_tokenizer

LAYOUTS = {1: (1, 1), 2: (2, 1), 4: (2, 2)}
"""Workers: nodes and CPUs of each."""
GROWTH = (1, 4, 16)


@dataclass(frozen=True)
class JobMeasurement:
    """What one job took."""

    seconds: float
    peak_mib: float
    """Of the worker that took most."""


def run_job(folder: Path, text: Path, num_workers: int, engine: str) -> JobMeasurement:
    """Build a store of a text on a cluster of its own; leave nothing behind."""
    work = folder / "work"
    work.mkdir()
    data = {
        "sources": [{"path": str(text)}],
        "store_dir": str(work / "store"),
        "engine": engine,
        "range_mib": 8,
        "num_workers": num_workers,
    }
    config = work / "job.yaml"
    config.write_text(json.dumps({"tokenizer": str(make_llama_tokenizer()), "data": data}))
    program = ROOT / "benchmarks" / "harness" / "prepare_on_nodes.py"
    layout = map(str, LAYOUTS[num_workers])
    measured = json.loads(
        run([sys.executable, str(program), *layout, str(config)]).splitlines()[-1]
    )
    shutil.rmtree(work)
    return JobMeasurement(measured["seconds"], max(measured["peaks"]))


def measure_workers(folder: Path, corpus: Corpus, num_rounds: int, engine: str) -> None:
    """Print throughput by number of workers, rounds in turn."""
    speeds: dict[int, list[float]] = {workers: [] for workers in LAYOUTS}
    for number in range(num_rounds):
        for workers in LAYOUTS if number % 2 == 0 else reversed(LAYOUTS):
            job = run_job(folder, corpus.path, workers, engine)
            speeds[workers].append(corpus.num_bytes / 1e6 / job.seconds)
            print(f"round {number + 1}: {workers} workers: {job.seconds:.1f} s", flush=True)
    print(f"\n{'workers':>8}{'nodes':>7}{'MB/s':>8}{'ratio to 1':>12}")
    for workers, measured in speeds.items():
        ratio = statistics.median(more / one for more, one in zip(measured, speeds[1], strict=True))
        nodes = LAYOUTS[workers][0]
        print(f"{workers:>8}{nodes:>7}{statistics.median(measured):>8.2f}{ratio:>12.2f}")


def measure_memory(folder: Path, corpus: Corpus, engine: str) -> None:
    """Print the peak memory of a worker as the text grows."""
    print(f"\n{'text':>6}{'MB':>9}{'seconds':>9}{'peak MiB a worker':>19}{'ratio to 1x':>13}")
    first: JobMeasurement | None = None
    for times in GROWTH:
        text = write_repeated(corpus, folder / "grown.txt", times * corpus.num_bytes)
        job = run_job(folder, text.path, 2, engine)
        first = first or job
        ratio = job.peak_mib / first.peak_mib
        size = text.num_bytes / 1e6
        print(
            f"{times:>5}x{size:>9.1f}{job.seconds:>9.1f}{job.peak_mib:>19.0f}{ratio:>13.2f}",
            flush=True,
        )


def main() -> int:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description="More workers, more text; see this file's head.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine", default="auto", choices=["auto", "reference"])
    parser.add_argument("--tiny", action="store_true", help="try out; the figures mean nothing")
    options = parser.parse_args()
    corpus = make_corpus()
    print(f"{os.cpu_count()} cores; {corpus.describe()}; engine {options.engine}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part = folder / "part.txt"
        with corpus.path.open("rb") as source:
            data = source.read(2_000_000 if options.tiny else 30_000_000)
        part.write_bytes(data.rpartition(b"\n")[0] + b"\n")
        small = Corpus(part, part.stat().st_size, 0)
        measure_workers(folder, small if options.tiny else corpus, options.rounds, options.engine)
        measure_memory(folder, small, options.engine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
