"""From a text file to training-ready tokens: ours against the Chinese-LLaMA scripts' way.

    python benchmarks/tokenize_vs_hf.py [--rounds 2] [--megabytes 500] [--text both] [--tiny]
                                        [--sides ours datatrove ...]

Each side is one command, timed as a whole: start of Python (and of Ray), reading, tokenizing,
writing. The text is real and Chinese and English, once as unique lines, as many as can be had, and
once repeated up to the size asked for; the tokenizer is LLaMA's kind with Chinese pieces added.
All ids of our store of the unique text are compared with those of SentencePiece itself.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness.corpus import ROOT, Corpus, make_corpus, write_repeated
from harness.peers import install_packages, is_installed, run, run_program
from harness.vocabulary import make_llama_tokenizer
from transformers import AutoTokenizer

from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.tokenizer.loader import load_reference_encoder

NUM_WORKERS = 2
BLOCK_TOKENS = 512
FLOOR, TARGET = 5.0, 10.0
PEER, OURS, OURS_REFERENCE = "datasets, map, map, save", "ours", "ours, reference's engine"
DATATROVE, LITDATA = "datatrove", "litdata"


@dataclass(frozen=True)
class TokenizeJob:
    """What every side works on."""

    text: Path
    tokenizer: Path
    tokenizer_json: Path
    jsonl: Path
    folder: Path


def run_peer(job: TokenizeJob, program: str) -> None:
    """Run a peer's program on a job."""
    settings: dict[str, Any] = {
        "text": str(job.text),
        "tokenizer": str(job.tokenizer),
        "tokenizer_json": str(job.tokenizer_json),
        "jsonl": str(job.jsonl),
        "cache": str(job.folder / "cache"),
        "output": str(job.folder / "output"),
        "result": str(job.folder / "result.json"),
        "num_workers": NUM_WORKERS,
        "block_tokens": BLOCK_TOKENS,
    }
    file = job.folder / "settings.json"
    file.write_text(json.dumps(settings))
    run_program(program, file)


def run_ours(job: TokenizeJob, engine: str) -> None:
    """Build a token store as a user does."""
    config = {
        "tokenizer": str(job.tokenizer),
        "data": {
            "sources": [{"path": str(job.text), "name": "text"}],
            "store_dir": str(job.folder / "store"),
            "eos": False,
            "engine": engine,
            "num_workers": NUM_WORKERS,
            "range_mib": 16,
        },
    }
    file = job.folder / "job.yaml"
    file.write_text(json.dumps(config))
    run([sys.executable, str(ROOT / "jobs" / "prepare_data.py"), str(file)])


SIDES: dict[str, Callable[[TokenizeJob], None]] = {
    PEER: lambda job: run_peer(job, "hf_datasets.py"),
    OURS: lambda job: run_ours(job, "auto"),
    OURS_REFERENCE: lambda job: run_ours(job, "reference"),
    DATATROVE: lambda job: run_peer(job, "datatrove_tokenize.py"),
    LITDATA: lambda job: run_peer(job, "litdata_tokenize.py"),
}


def installed_sides() -> list[str]:
    """Return the sides that can run here; name those that cannot."""
    needs = {DATATROVE: "datatrove", LITDATA: "litdata", PEER: "datasets"}
    install_packages()
    missing = [side for side, module in needs.items() if not is_installed(module)]
    for side in missing:
        print(f"not installed, left out: {side}")
    return [side for side in SIDES if side not in missing]


def measure(
    job: TokenizeJob, corpus: Corpus, wanted: list[str], num_rounds: int
) -> dict[str, list[float]]:
    """Run sides in turn, every other round backwards; return seconds by side."""
    sides = [side for side in installed_sides() if side in wanted]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(num_rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            shutil.rmtree(job.folder)
            job.folder.mkdir()
            start = time.perf_counter()
            SIDES[side](job)
            seconds[side].append(time.perf_counter() - start)
            speed = corpus.num_bytes / 1e6 / seconds[side][-1]
            print(f"round {number + 1}: {side}: {seconds[side][-1]:.1f} s, {speed:.2f} MB/s")
            if side == OURS and number == 0:
                check_ids(job)
    return seconds


def check_ids(job: TokenizeJob) -> None:
    """Compare every id of our store with SentencePiece's own.

    Raises:
        RuntimeError: They differ.
    """
    store = TokenStore.open(job.folder / "store")
    split = store.split("train")
    reference = load_reference_encoder(job.tokenizer)
    bos = np.array([1], dtype=np.uint32)
    start = 0
    with job.text.open(newline="\n") as lines:
        while texts := lines.readlines(1 << 22):
            encoded = reference.encode([text.rstrip("\n") for text in texts if text.strip()])
            wanted = np.concatenate([part for ids in encoded for part in (bos, ids)])
            got = split.tokens(start, start + len(wanted))
            if not np.array_equal(got, wanted):
                raise RuntimeError(f"ids differ from SentencePiece's behind token {start}")
            start += len(wanted)
    if start != split.num_tokens:
        raise RuntimeError(f"our store has {split.num_tokens} tokens, SentencePiece gives {start}")
    print(f"all {start:,} ids are SentencePiece's")


def print_table(corpus: Corpus, seconds: dict[str, list[float]]) -> None:
    """Print medians, and ratios to the peer of the same round."""
    print(f"\n{corpus.describe()}\n{'':<28}{'median s':>10}{'MB/s':>8}{'ratio':>8}")
    for side, runs in seconds.items():
        ratios = [peer / own for peer, own in zip(seconds.get(PEER, runs), runs, strict=True)]
        middle = statistics.median(runs)
        speed = corpus.num_bytes / 1e6 / middle
        print(f"{side:<28}{middle:>10.1f}{speed:>8.2f}{statistics.median(ratios):>8.2f}")
    print(f"ratio: median over rounds, to the first row; floor {FLOOR:.0f}, target {TARGET:.0f}\n")


def split_into_json_lines(text: Path, folder: Path) -> None:
    """Cut a file of lines into one file of JSON lines for each worker, for those who need that."""
    folder.mkdir()
    files = [(folder / f"{number}.jsonl").open("w") for number in range(NUM_WORKERS)]
    size, done = text.stat().st_size, 0
    with text.open(newline="\n") as lines:
        for line in lines:
            files[min(NUM_WORKERS - 1, done * NUM_WORKERS // size)].write(
                json.dumps({"text": line.rstrip("\n")}, ensure_ascii=False) + "\n"
            )
            done += len(line.encode())
    for file in files:
        file.close()


def main() -> int:
    """Run the benchmark on unique text, and on repeated text."""
    parser = argparse.ArgumentParser(description="Ours against a peer; see the head of this file.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--text", default="both", choices=["both", "unique", "repeated"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--tiny", action="store_true", help="try out; the figures mean nothing")
    options = parser.parse_args()
    tokenizer, unique = make_llama_tokenizer(), make_corpus()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "tokenizer")
        if options.tiny:
            with unique.path.open("rb") as source:
                data = source.read(5_000_000).rpartition(b"\n")[0] + b"\n"
            (folder / "tiny.txt").write_bytes(data)
            corpora = {"the beginning of the text": Corpus(folder / "tiny.txt", len(data), 0)}
        else:
            corpora = {"unique text": unique} if options.text != "repeated" else {}
            if options.text != "unique":
                size = options.megabytes * 1_000_000
                repeated = write_repeated(unique, folder / "repeated.txt", size)
                corpora["the same text repeated"] = repeated
        for number, (kind, corpus) in enumerate(corpora.items()):
            print(f"== {kind}: {corpus.describe()}", flush=True)
            jsonl = folder / f"jsonl-{number}"
            split_into_json_lines(corpus.path, jsonl)
            (folder / "work").mkdir(exist_ok=True)
            job = TokenizeJob(corpus.path, tokenizer, folder / "tokenizer", jsonl, folder / "work")
            print_table(corpus, measure(job, corpus, options.sides, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
