"""Continue the pre-training of a causal LM on plain text.

python jobs/pretrain.py [CONFIG.yaml] [a.b=c ...]      --help lists every field
"""

import sys
from pathlib import Path

from raytune_llama.config.settings import ConfigError, load, run_job
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.exits import EXIT_STOPPED
from raytune_llama.logs import setup_logging
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.estimate.plan import build_plan
from raytune_llama.train.estimate.text import render_plan
from raytune_llama.train.result import InvalidRunError
from raytune_llama.train.trainer import run_training

DEFAULT = Path(__file__).parent / "configs" / "pretrain_smollm2.yaml"


def main() -> int:
    """Run the job; return its exit code."""
    setup_logging()
    config = load(PretrainConfig, sys.argv[1:], default=DEFAULT)
    if config.model.path == "demo/model" and not Path("demo/model").is_dir():
        raise ConfigError(["model.path: no demo/model here; make it: python jobs/prepare_demo.py"])
    if config.plan:
        print(render_plan(build_plan(config)))
        return 0
    run = run_training(config)
    if run.bits_per_byte_before is not None:
        print(f"bits per byte: {run.bits_per_byte_before:.4f} -> {run.bits_per_byte_after:.4f}")
    print(f"{run.status} at step {run.step}; run directory: {run.run_dir}")
    if run.result is None:
        return EXIT_STOPPED
    print(f"result: {run.result}")
    return 0


if __name__ == "__main__":
    run_job(main, StoreError, SourceError, InvalidRunError)
