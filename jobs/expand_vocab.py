"""Grow a tokenizer and its model: `python jobs/expand_vocab.py [CONFIG.yaml] [a.b=c ...]`."""

import sys
from pathlib import Path

from raytune_llama.config.settings import load, run_job
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.logs import setup_logging
from raytune_llama.vocabulary.expansion import ExpandVocabConfig, expand_vocabulary

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "expand_vocab_smollm2.yaml"


def main() -> None:
    """Load the config, grow, print the table and where the result is."""
    setup_logging()
    config = load(ExpandVocabConfig, sys.argv[1:], default=DEFAULT_CONFIG)
    print(expand_vocabulary(config))
    print(f"grown: {config.target}")


if __name__ == "__main__":
    run_job(main, SourceError, ValueError)
