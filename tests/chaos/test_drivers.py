"""Promise: whatever ends a driver, the same command goes on; and there is only ever one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_llama.config.settings import write_yaml
from raytune_llama.train.config import PretrainConfig
from tests.chaos.conftest import MakeRun, assert_equal_runs
from tests.pipeline.conftest import ROOT, losses, own_cluster, start_job, wait_for_step


@pytest.mark.ray
@pytest.mark.slow
def test_driver_killed_with_kill_9_and_run_again_equals_the_undisturbed_run(
    make_run: MakeRun, whole: PretrainConfig, tmp_path: Path
) -> None:
    # Workers outlive their driver by some seconds: so many steps that they cannot end the run.
    killed = make_run()
    process = start_job(killed, tmp_path / "killed.log")
    wait_for_step(killed, 60, process)
    process.kill()
    process.wait()
    # It is succeeded at once, with nobody to remove a lock.
    assert start_job(killed, tmp_path / "again.log").wait() == 0
    assert_equal_runs(killed, whole)


@pytest.mark.ray
@pytest.mark.slow
def test_driver_refuses_a_second_one_and_on_sigterm_saves_exits_75_and_goes_on(
    make_run: MakeRun, tmp_path: Path
) -> None:
    # Long enough that the signal always finds it training, and no checkpoint but the asked one.
    config = make_run(max_steps=3000, checkpoint__every_steps=5000, checkpoint__keep_best=False)
    process = start_job(config, tmp_path / "job.log")
    wait_for_step(config, 3, process)

    write_yaml(config, tmp_path / "second.yaml")
    second = subprocess.run(
        [sys.executable, "jobs/pretrain.py", str(tmp_path / "second.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=own_cluster(),
        check=False,
    )
    assert second.returncode == 2
    assert f"process {process.pid} on" in second.stderr
    assert "Traceback" not in second.stderr

    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    (saved,) = (Path(config.run_dir) / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == max(losses(config))
    process = start_job(config, tmp_path / "again.log")
    wait_for_step(config, int(max(losses(config))) + 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert "resumed from" in (tmp_path / "again.log").read_text()
