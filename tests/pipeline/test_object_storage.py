"""The whole job with its corpus, token store and run directory in object storage."""

from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, override
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.trainer import run_training
from tests.pipeline.conftest import MakeJob, losses, start_job, wait_for_step

ADAPTER = "pt_lora_model/adapter_model.safetensors"


@pytest.fixture
def corpus(job_inputs: Path, s3_path: Place) -> Place:
    """The job's corpus in object storage."""
    for file in (job_inputs / "corpus").iterdir():
        (s3_path / "corpus" / file.name).upload(file)
    return s3_path / "corpus"


def in_object_storage(corpus: Place, tmp_path: Path, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the fields of a job that has everything there but its model."""
    return {
        "run_dir": str(corpus.with_name("run")),
        "data__sources": [{"path": str(corpus)}],
        "data__store_dir": str(corpus.with_name("store")),
        "data__cache_dir": str(tmp_path / "cache"),
        **fields,
    }


def assert_same_run(ours: PretrainConfig, wanted: PretrainConfig) -> None:
    assert losses(ours) == losses(wanted)
    adapters = [(config.run_place / ADAPTER).read_bytes() for config in (ours, wanted)]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_pretrain_in_object_storage_equals_the_run_on_disks_and_says_when_it_is_finished(
    make_job: MakeJob, corpus: Place, tmp_path: Path
) -> None:
    on_disks = make_job()
    run_training(on_disks)
    remote = make_job(**in_object_storage(corpus, tmp_path, logging__tensorboard=True))
    first = run_training(remote)
    assert (first.status, first.step) == ("finished", 8)
    assert first.run_dir == remote.run_place
    assert_same_run(remote, on_disks)
    run_dir = remote.run_place
    names = {file.relative_to(run_dir) for file in run_dir.files(recursive=True)}
    assert {"run.yaml", "identity.json", "loss.png", "pt_lora_model/tokenizer.json"} <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert not any("probe" in name for name in names)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".arrow", ""}
    before = run_dir.files(recursive=True)
    second = run_training(remote)
    assert (second.status, second.result) == ("already finished", first.result)
    assert run_dir.files(recursive=True) == before
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.01 -> 0\.02"):
        run_training(override(remote, {"optim.learning_rate": 0.02}))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_job_killed_with_kill_9_in_object_storage_equals_the_undisturbed_run_on_disks(
    make_job: MakeJob, corpus: Place, tmp_path: Path
) -> None:
    # Workers outlive their driver by some seconds: so many steps that they cannot end the run.
    fields = {"max_steps": 400, "checkpoint__every_steps": 25, "eval__every_steps": 200}
    on_disks = make_job(**fields)
    run_training(on_disks)
    remote = make_job(**in_object_storage(corpus, tmp_path, **fields))
    process = start_job(remote, tmp_path / "killed.log")
    wait_for_step(remote, 60, process)
    process.kill()
    process.wait()
    assert start_job(remote, tmp_path / "again.log").wait() == 0
    assert "resumed from s3://" in (tmp_path / "again.log").read_text()
    assert_same_run(remote, on_disks)
