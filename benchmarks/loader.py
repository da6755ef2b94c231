"""Reading batches for training: our token store against HF datasets, MosaicML streaming, litdata.

    python benchmarks/loader.py [--rounds 3] [--sequences 8] [--tokens 2048] [--tiny]

The same tokens of real text, in each library's own files, shuffled, in one process without helper
processes; each yields int64 ids of [sequences, tokens] ready for a model. Ours gives labels and
position ids too, the only one that keeps documents apart. What is timed is reading behind a
warm-up, not start-up; files are in the page cache for all.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from harness.corpus import ROOT, make_corpus
from harness.peers import install_packages, is_installed, run, run_program
from harness.vocabulary import make_llama_tokenizer

OURS = "ours"
NEEDS = {"HF datasets": "datasets", "MosaicML streaming": "streaming", "litdata": "litdata"}
PROGRAM = "read_blocks.py"


def make_store(folder: Path, num_bytes: int) -> Path:
    """Build a token store of the beginning of the corpus."""
    text = folder / "text.txt"
    with make_corpus().path.open("rb") as source:
        text.write_bytes(source.read(num_bytes).rpartition(b"\n")[0] + b"\n")
    data = {"sources": [{"path": str(text)}], "store_dir": str(folder / "store")}
    config = folder / "job.yaml"
    config.write_text(json.dumps({"tokenizer": str(make_llama_tokenizer()), "data": data}))
    run([sys.executable, str(ROOT / "jobs" / "prepare_data.py"), str(config)])
    return folder / "store"


def main() -> int:
    """Run the benchmark; a side that cannot run here is named."""
    parser = argparse.ArgumentParser(description="Ours against peers; see the head of this file.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8, help="of a batch")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--megabytes", type=int, default=100, help="of text that are encoded")
    parser.add_argument("--tiny", action="store_true", help="try out; the figures mean nothing")
    options = parser.parse_args()
    install_packages()
    missing = [side for side, module in NEEDS.items() if not is_installed(module)]
    for side in missing:
        print(f"not installed, left out: {side}")
    sides = [OURS, *(side for side in NEEDS if side not in missing)]
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = folder / "settings.json"
        values = {
            "store": str(
                make_store(folder, 5_000_000 if options.tiny else options.megabytes * 10**6)
            ),
            "folder": str(folder / "blocks"),
            "sequences": options.sequences,
            "tokens": options.tokens,
            "seconds": 1 if options.tiny else 8,
        }
        settings.write_text(json.dumps(values))
        for side in sides:
            print(run_program(PROGRAM, "write", side, settings).strip(), flush=True)
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                read = json.loads(run_program(PROGRAM, "read", side, settings).splitlines()[-1])
                speeds[side].append(read["tokens"] / read["seconds"])
                print(f"round {number + 1}: {side}: {speeds[side][-1] / 1e6:.2f} M tokens/s")
    print(f"\n{options.sequences} x {options.tokens} tokens a batch, one process, shuffled")
    print(f"{'':<22}{'M tokens/s':>12}{'ours / it':>12}")
    for side, measured in speeds.items():
        ratio = statistics.median(
            ours / other for ours, other in zip(speeds[OURS], measured, strict=True)
        )
        print(f"{side:<22}{statistics.median(measured) / 1e6:>12.2f}{ratio:>12.2f}")
    print("medians over rounds, ratios taken within a round; target: above 1 to each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
