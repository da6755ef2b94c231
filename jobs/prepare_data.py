"""Build a token store: `python jobs/prepare_data.py [CONFIG.yaml] [a.b=c ...]`."""

import logging
import sys
from pathlib import Path

import ray

from raytune_llama.config.settings import load, run_job
from raytune_llama.data.build.preparation import open_data, prepare_data
from raytune_llama.data.build.preview import render_preview
from raytune_llama.data.config import PrepareDataConfig
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.logs import setup_logging
from raytune_llama.storage.place import local_path

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "prepare_data_smollm2.yaml"


def main() -> None:
    """Load the config, build the store, print where it is; or print a preview."""
    setup_logging()
    config = load(PrepareDataConfig, sys.argv[1:], default=DEFAULT_CONFIG)
    tokenizer = local_path(config.tokenizer, "tokenizer")
    if config.preview:
        number, colour = config.preview_documents, sys.stdout.isatty()
        print(render_preview(config.data, tokenizer, num_documents=number, colour=colour))
        return
    inputs = open_data(config.data, tokenizer)
    store = prepare_data(
        config.data, inputs, start_ray=lambda: ray.init(logging_level=logging.WARNING)
    )
    print(f"token store: {store.place}")


if __name__ == "__main__":
    run_job(main, StoreError, SourceError)
