"""Which engine makes a tokenizer's ids fastest, and which makes the right ones: on one thread.

    python benchmarks/encoders.py [--text FILE ...] [--tokenizer DIR ...] [--engines kitoken ...]

A text file is UTF-8 with a document a line; give Chinese and English ones apart. Each engine runs
in a process of its own that is let onto one CPU only, in turns with the others. Ids are compared
document by document with the reference's. An engine that is not installed, or can't read the
tokenizer, is named with the reason. Peers: pip install kitoken tokie gigatoken fastokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness.corpus import make_corpus
from harness.vocabulary import make_llama_tokenizer

ROOT = Path(__file__).resolve().parents[1]
OURS = ("reference", "compiled")
PEERS = ("tokenizers", "kitoken", "tokie", "gigatoken", "fastokens")
TARGET = 18.0
"""MB/s a core: with two cores ten times the 3.5 MB/s of the seeds' scripts."""


def measure(engine: str, tokenizer: Path, text: Path, folder: Path) -> dict[str, Any] | str:
    """Run one engine on one text; return what it measured, or why it did not run."""
    program = ROOT / "benchmarks" / "peers" / "encode_lines.py"
    ids = folder / f"{engine}.npz"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(program), engine, str(tokenizer), str(text), str(ids)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def count_differing(wanted: Path, other: Path) -> int:
    """Return how many documents have other ids."""
    with np.load(wanted) as left, np.load(other) as right:
        return int(np.sum(left["hashes"] != right["hashes"]))


def compare(tokenizer: Path, text: Path, engines: list[str], rounds: int) -> None:
    """Print a line for each engine."""
    print(f"\n{tokenizer.name}, {text.name}, {text.stat().st_size / 1e6:.1f} MB, {rounds} rounds")
    speeds: dict[str, list[float]] = {}
    last: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(rounds):
            for engine in engines if number % 2 == 0 else engines[::-1]:
                result = measure(engine, tokenizer, text, folder)
                if isinstance(result, str):
                    if number == 0:
                        print(f"  {engine:12} does not run: {result[:150]}")
                    continue
                speeds.setdefault(engine, []).append(result["megabytes_per_second"])
                last[engine] = result
        for engine, result in last.items():
            speed = statistics.median(speeds[engine])
            ratio = speed / statistics.median(speeds["reference"])
            differing = count_differing(folder / "reference.npz", folder / f"{engine}.npz")
            print(
                f"  {engine:12} {result['version']:24} {speed:6.2f} MB/s "
                f"({min(speeds[engine]):.2f} to {max(speeds[engine]):.2f}), {ratio:5.2f} times the "
                f"reference; {differing} of {result['documents']} documents have other ids; "
                f"memory grows by {result['growth_mib']} MiB a quarter"
            )


def main() -> None:
    """Compare engines on each tokenizer and text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", nargs="+", type=Path, help="the corpus of tokenize_vs_hf.py")
    parser.add_argument("--tokenizer", nargs="+", type=Path, help="LLaMA's, with Chinese pieces")
    parser.add_argument("--engines", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    engines = list(dict.fromkeys(["reference", *arguments.engines]))
    print(f"MB of text a second of CPU time on one thread; target: {TARGET:g} with no other ids")
    for tokenizer in arguments.tokenizer or [make_llama_tokenizer()]:
        for text in arguments.text or [make_corpus().path]:
            compare(tokenizer, text, engines, arguments.rounds)


if __name__ == "__main__":
    main()
