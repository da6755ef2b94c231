"""Compare the training losses of two runs, step by step; exit status 1 if any bit differs.

python compare_losses.py RUN OTHER_RUN
"""

import json
import sys
from pathlib import Path


def read_losses(run_dir: Path) -> dict[int, float]:
    """Return the training loss by step; Python reads back every bit that was written."""
    with (run_dir / "metrics.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return {int(r["step"]): r["train/loss"] for r in records if "train/loss" in r}


def main() -> None:
    """Print the losses of both runs and whether they are equal."""
    runs = [Path(argument) for argument in sys.argv[1:3]]
    first, second = (read_losses(run) for run in runs)
    for step in sorted(first.keys() | second.keys()):
        print(f"step {step:>3}  {first.get(step)!s:<20}  {second.get(step)!s:<20}")
    if not first or first != second:
        sys.exit("the losses differ")
    print(f"all {len(first)} losses are equal, bit for bit")


if __name__ == "__main__":
    main()
