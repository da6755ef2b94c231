"""A sweep over a tiny run; nothing here needs Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import from_dict, write_yaml
from raytune_llama.tune.config import SweepConfig
from tests.train.conftest import MakeConfig, make_config, model_dir, store_dir

__all__ = ["make_config", "model_dir", "store_dir"]

MakeSweep = Callable[..., SweepConfig]

SPACE = {
    "optim.learning_rate": {"loguniform": [1e-4, 1e-1]},
    "lora.rank": {"choice": [2, 4, 8]},
    "lora.alpha": {"multiple_of": "lora.rank", "factor": 2},
}


@pytest.fixture
def make_sweep(tmp_path: Path, make_config: MakeConfig) -> MakeSweep:
    """Build a sweep of six trials of twelve steps, evaluated at each third; keywords replace."""

    def make(**fields: Any) -> SweepConfig:  # noqa: ANN401
        write_yaml(make_config(), tmp_path / "base.yaml")
        values: dict[str, Any] = {
            "sweep_dir": str(tmp_path / "sweep"),
            "job": "pretrain",
            "base": str(tmp_path / "base.yaml"),
            "space": SPACE,
            "num_trials": 6,
            "max_steps": 12,
        }
        return from_dict(SweepConfig, {**values, **fields})

    return make
