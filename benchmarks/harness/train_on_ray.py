"""The driver of our side: `train_on_ray.py CONFIG.yaml`, without what a job checks before it."""

import sys

from raytune_llama.config.settings import load
from raytune_llama.connection import connected
from raytune_llama.logs import setup_logging
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.orchestration.launch import Launch, launch


def main() -> None:
    """Train to the end; the same command goes on."""
    setup_logging()
    with connected():
        launch(Launch.of(load(PretrainConfig, sys.argv[1:])))


if __name__ == "__main__":
    main()
