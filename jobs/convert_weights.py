"""Convert LLaMA weights: `python jobs/convert_weights.py source=DIR target=DIR [a.b=c ...]`."""

import sys
from pathlib import Path

from raytune_llama.config.settings import load, run_job
from raytune_llama.logs import setup_logging
from raytune_llama.model.meta.conversion import ConvertConfig, convert_weights


def main() -> None:
    """Load the config, convert, print where the result is."""
    setup_logging()
    config = load(ConvertConfig, sys.argv[1:])
    convert_weights(config)
    print(f"{config.to} weights: {Path(config.target)}")


if __name__ == "__main__":
    run_job(main, ValueError)
