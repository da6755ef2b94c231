"""The driver of our side: `train_on_ray.py CONFIG.yaml`, without what a job checks before it."""

import sys

from raytune_llama.config.settings import load
from raytune_llama.connection import connect_to_ray
from raytune_llama.logs import setup_logging
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.orchestration.launch import PreparedRun, launch


def main() -> None:
    """Train to the end; the same command goes on."""
    setup_logging()
    with connect_to_ray():
        launch(PreparedRun.from_config(load(PretrainConfig, sys.argv[1:])))


if __name__ == "__main__":
    main()
