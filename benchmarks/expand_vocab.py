"""Growing a LLaMA vocabulary on a large corpus, against SentencePiece's training alone.

    python benchmarks/expand_vocab.py [--megabytes 1000] [--sample 100] [--rounds 1] [--tiny]

Ours is the whole job: reading the corpus, a sample of it, training, merging, the comparison of two
libraries' ids, fertility. The peer is SentencePiece's trainer on a file of as much text as the
sample, with the same settings. Each runs in a process of its own; memory is its largest resident
size.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from harness.corpus import ROOT, make_corpus, write_repeated
from harness.vocabulary import make_llama_tokenizer, write_base

NUM_TOKENS = 20_000
_PEER = """
import sys, sentencepiece
sentencepiece.SentencePieceTrainer.train(
    input=sys.argv[1], model_prefix=sys.argv[2], model_type="bpe", vocab_size=int(sys.argv[3]),
    character_coverage=0.9995, num_threads=2, train_extremely_large_corpus=True, minloglevel=2)
"""


class ProcessCost(NamedTuple):
    """What a process took."""

    seconds: float
    peak_mib: float


def measure(command: list[str]) -> ProcessCost:
    """Run a command and return its time and its largest resident size."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {' '.join(command)[:200]}")
    return ProcessCost(seconds, usage.ru_maxrss / 1024)


def write_material(folder: Path, *, corpus_bytes: int, sample_mib: int, num_tokens: int) -> str:
    """Write the corpus, a sample of it, and the job's config; return what the corpus is."""
    corpus = write_repeated(make_corpus(), folder / "corpus.txt", corpus_bytes)
    with corpus.path.open("rb") as source:
        (folder / "sample.txt").write_bytes(source.read(sample_mib << 20))
    job = {
        "model": str(write_base(folder / "base")),
        "target": str(folder / "grown"),
        "sources": [{"path": str(corpus.path)}],
        "sample_mib": sample_mib,
        "training": {"num_tokens": num_tokens},
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    return corpus.describe()


def run_rounds(folder: Path, num_tokens: int, num_rounds: int) -> dict[str, list[ProcessCost]]:
    """Run both sides in turn, and every other round backwards, so that drift hits both alike."""
    sample, peer, job = (str(folder / name) for name in ("sample.txt", "peer", "job.yaml"))
    commands = {
        "ours, the whole job": [sys.executable, str(ROOT / "jobs" / "expand_vocab.py"), job],
        "SentencePiece alone": [sys.executable, "-c", _PEER, sample, peer, str(num_tokens)],
    }
    costs: dict[str, list[ProcessCost]] = {side: [] for side in commands}
    for number in range(num_rounds):
        for side in list(commands)[:: 1 if number % 2 == 0 else -1]:
            shutil.rmtree(folder / "grown", ignore_errors=True)
            cost = measure(commands[side])
            costs[side].append(cost)
            print(
                f"round {number + 1}: {side}: {cost.seconds:.1f} s, {cost.peak_mib:.0f} MiB",
                flush=True,
            )
    return costs


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the corpus")
    parser.add_argument("--sample", type=int, default=100, help="MiB that are learned from")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="try out; the figures mean nothing")
    options = parser.parse_args()
    make_llama_tokenizer()
    sample_mib = 4 if options.tiny else options.sample
    num_tokens = 4000 if options.tiny else NUM_TOKENS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        described = write_material(
            folder,
            corpus_bytes=options.megabytes * 10**6 // (20 if options.tiny else 1),
            sample_mib=sample_mib,
            num_tokens=num_tokens,
        )
        print(f"{described}; learned from: {sample_mib} MiB; {num_tokens} pieces", flush=True)
        ours, peer = run_rounds(folder, num_tokens, options.rounds).values()
    for what, place in (("time", 0), ("memory", 1)):
        ratio = statistics.median(a[place] / b[place] for a, b in zip(ours, peer, strict=True))
        print(f"{what}, ours / SentencePiece alone: {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
