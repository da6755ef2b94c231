"""The whole job on Ray: from text to an adapter, refused early, submitted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, override, write_yaml
from raytune_llama.train.trainer import run_training
from tests.pipeline.conftest import (
    ROOT,
    MakeJob,
    losses,
    own_cluster,
)

ADAPTER = "pt_lora_model/adapter_model.safetensors"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_pretrain_run_twice_finishes_once_and_says_so(make_job: MakeJob) -> None:
    config = make_job()
    on_interrupt = signal.getsignal(signal.SIGINT)
    first = run_training(config)
    assert first.status == "finished"
    assert signal.getsignal(signal.SIGINT) is on_interrupt
    assert first.bits_per_byte_before is not None
    assert first.bits_per_byte_after is not None
    assert first.bits_per_byte_after < first.bits_per_byte_before
    run_dir = Path(config.run_dir)
    for name in (ADAPTER, "pt_lora_model/tokenizer.json", "run.yaml", "loss.png"):
        assert (run_dir / name).stat().st_size > 0
    changed = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    second = run_training(config)
    assert (second.status, second.step, second.result) == ("already finished", 8, first.result)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == changed
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.01 -> 0\.02"):
        run_training(override(config, {"optim.learning_rate": 0.02}))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (
            {"scale__num_workers": 3, "batch__micro_batch_sequences": 1},
            "scale.num_workers",
        ),
        ({"scale__use_gpu": True}, "scale.use_gpu"),
        ({"scale__cpus_per_worker": 2}, "scale.num_workers"),
        ({"model__path": "/no/such/model"}, "model.path"),
        ({"lora__targets": ["qproj"]}, "lora.targets"),
        ({"data__sources": [{"path": "/no/such/*.txt"}]}, "data.sources"),
        ({"data__sources": [{"path": "jobs/configs/*.yaml"}]}, "data.sources"),
        ({"adapter": "/no/such/adapter", "lora": None}, "adapter"),
    ],
)
def test_pretrain_impossible_config_is_refused_and_leaves_nothing(
    make_job: MakeJob, fields: dict[str, Any], field: str
) -> None:
    config = make_job(**fields)
    with pytest.raises(ConfigError) as caught:
        run_training(config)
    assert any(problem.startswith(field) for problem in caught.value.problems)
    assert not Path(config.run_dir).exists()
    assert not Path(config.data.store_dir).exists()


def test_job_with_bad_config_exits_2_with_the_message_alone(
    make_job: MakeJob, tmp_path: Path
) -> None:
    file = tmp_path / "bad.yaml"
    write_yaml(make_job(model__path="/no/such/model"), file)
    command = [sys.executable, "jobs/pretrain.py", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=own_cluster(), check=False
    )
    assert done.returncode == 2
    assert "model.path: /no/such/model is not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_job_without_arguments_and_demo_says_how_to_make_it(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py")]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=own_cluster(), check=False
    )
    assert done.returncode == 2
    assert "raytune demo" in done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_job_submitted_with_token_authentication_runs_and_refuses_relative_places(
    ray_cluster: str, make_job: MakeJob, tmp_path: Path
) -> None:
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", ray_cluster]
    config = make_job()
    write_yaml(config, tmp_path / "job.yaml")
    job = ["--working-dir", str(ROOT), "--", sys.executable, "jobs/pretrain.py"]
    submit = [*ray, *job, str(tmp_path / "job.yaml")]

    def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        # On a busy machine a dashboard may not have heard of its node's agent yet, and asks to be
        # asked again.
        for _ in range(10):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, **environment},
            )
            if "No available agent" not in done.stdout + done.stderr:
                return done
            time.sleep(6)
        pytest.fail("Ray's dashboard finds no agent")

    stranger = run(submit, RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH="")
    assert stranger.returncode != 0
    assert not Path(config.run_dir).exists()

    relative = run([*submit, "run_dir=runs/x"])
    assert relative.returncode != 0
    assert "run_dir=/shared/runs/x" in relative.stdout + relative.stderr

    done = run(submit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 8" in done.stdout
    assert (Path(config.run_dir) / ADAPTER).is_file()


@pytest.mark.ray
def test_pretrain_on_two_ray_nodes_finishes_with_a_worker_on_each(
    make_job: MakeJob, tmp_path: Path
) -> None:
    # A process of its own: the cluster of two nodes must not meet the tests' shared one.
    config = make_job()
    write_yaml(config, tmp_path / "job.yaml")
    command = [sys.executable, "-m", "tests.pipeline.two_nodes", str(tmp_path / "job.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=own_cluster(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished on nodes 127.0.0.2 127.0.0.3" in done.stdout
    assert len(losses(config)) == 8
