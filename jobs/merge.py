"""Merge adapters into a base: `python jobs/merge.py base=DIR adapters=[DIR, ...] target=DIR`."""

import sys

from raytune_llama.config.settings import load, run_job
from raytune_llama.logs import setup_logging
from raytune_llama.merge.merger import MergeConfig, merge_adapters


def main() -> None:
    """Load the config, merge, print where the result is."""
    setup_logging()
    config = load(MergeConfig, sys.argv[1:])
    merge_adapters(config)
    print(f"merged model: {config.target}")


if __name__ == "__main__":
    run_job(main, ValueError)
