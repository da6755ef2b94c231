"""Promise: a node that is taken away takes no step with it."""

import subprocess
import sys
from pathlib import Path

import pytest

from raytune_llama.config.settings import write_yaml
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.trainer import run_training
from tests.chaos.conftest import MakeRun, assert_equal_runs
from tests.pipeline.conftest import ROOT, losses, own_cluster


def train_on(num_nodes: int, config: PretrainConfig, folder: Path) -> str:
    """Train on so many nodes, of which one is drained; return what was printed."""
    write_yaml(config, folder / "job.yaml")
    command = [sys.executable, "-m", "tests.chaos.drained_node", str(num_nodes)]
    done = subprocess.run(
        [*command, str(folder / "job.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=own_cluster(),
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node drained" in done.stdout
    return done.stdout


# No checkpoint but the one that the notice asks for.
RARE = {"checkpoint__every_steps": 1000, "checkpoint__keep_best": False}


@pytest.mark.ray
@pytest.mark.slow
def test_run_on_a_node_that_is_taken_away_goes_on_with_another(
    make_run: MakeRun, whole: PretrainConfig, tmp_path: Path
) -> None:
    config = make_run(**RARE)
    assert "finished at step 400" in train_on(3, config, tmp_path)
    assert_equal_runs(config, whole)


@pytest.mark.ray
@pytest.mark.slow
def test_run_whose_other_nodes_are_too_few_saves_the_very_step_and_goes_on_later(
    make_run: MakeRun, whole: PretrainConfig, tmp_path: Path
) -> None:
    config = make_run(max_steps=400, **RARE)
    printed = train_on(2, config, tmp_path)
    assert f"stopped at step {max(losses(config)):.0f}" in printed
    assert max(losses(config)) < 400
    assert run_training(config).status == "finished"
    assert_equal_runs(config, whole)
