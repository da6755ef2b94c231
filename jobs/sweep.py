"""Search for the best settings of a training run, such as learning rate and rank.

python jobs/sweep.py [SWEEP.yaml] [a.b=c ...]      --help lists every field
"""

import sys
from pathlib import Path

from raytune_llama.config.settings import load, run_job
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.exits import EXIT_STOPPED
from raytune_llama.logs import setup_logging
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.display import format_trial_line
from raytune_llama.tune.sweep import run_sweep

DEFAULT = Path(__file__).parent / "configs" / "sweep_smollm2.yaml"


def main() -> int:
    """Run the job; return its exit code."""
    setup_logging()
    config = load(SweepConfig, sys.argv[1:], default=DEFAULT)
    sweep = run_sweep(config)
    for trial in sweep.trials:
        print(format_trial_line(config, trial))
    print(f"{sweep.status}; leaderboard.csv and sweep.html: {sweep.sweep_dir}")
    if sweep.best_config is not None:
        print(f"best: {sweep.best_config}")
    return {"finished": 0, "stopped": EXIT_STOPPED, "failed": 1}[sweep.status]


if __name__ == "__main__":
    run_job(main, StoreError, SourceError)
