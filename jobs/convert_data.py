"""Convert conversations: `python jobs/convert_data.py 'sources=[{path: F}]' target=DIR [a.b=c]`."""

import sys

from raytune_llama.config.settings import load, run_job
from raytune_llama.data.conversion import ConvertDataConfig, convert_data
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.logs import setup_logging


def main() -> None:
    """Load the config, convert, print where the result is."""
    setup_logging()
    config = load(ConvertDataConfig, sys.argv[1:])
    convert_data(config)
    print(f"converted: {config.target}")


if __name__ == "__main__":
    run_job(main, SourceError)
