"""Training from a model in a bucket and on the hub: fetched once to each node, pinned, the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_llama.config.settings import write_yaml
from raytune_llama.config.yaml12 import parse_mapping
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from tests.conftest import hub_environment
from tests.faulty_s3 import FaultyServer
from tests.hub_server import HubServer
from tests.pipeline.conftest import ROOT, MakeJob, losses, own_cluster

WEIGHTS = "model.safetensors"


def train_on_two_nodes(config: PretrainConfig, tmp_path: Path, hub: HubServer) -> str:
    """Run a job in a process of its own, on two nodes with caches of their own."""
    file = tmp_path / f"{config.run_place.name}.yaml"
    write_yaml(config, file)
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.two_nodes", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=own_cluster() | hub_environment(hub, tmp_path) | {"NODE_CACHES": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recorded_path(config: PretrainConfig) -> str:
    text = (config.run_place / "run.yaml").read_bytes().decode()
    data, _ = parse_mapping(text, "run.yaml")
    assert data is not None
    return data["model"]["path"]


def result_of(config: PretrainConfig) -> tuple[dict[float, float], bytes]:
    adapter = config.run_place / "pt_lora_model" / "adapter_model.safetensors"
    return losses(config), adapter.read_bytes()


@pytest.mark.slow
@pytest.mark.ray
def test_two_nodes_train_from_the_hub_fetching_once_each_and_stay_at_its_commit(
    make_job: MakeJob, job_inputs: Path, tmp_path: Path, hub: HubServer
) -> None:
    model = {file.name: file.read_bytes() for file in (job_inputs / "model").iterdir()}
    commit = hub.publish("org/tiny", {**model, "modeling.py": b"raise SystemExit"})
    config = make_job("hub", model__path="hf://org/tiny")
    assert "finished on nodes 127.0.0.2 127.0.0.3" in train_on_two_nodes(config, tmp_path, hub)
    # The driver and the two nodes.
    assert hub.sent_of(model[WEIGHTS]) == 3 * len(model[WEIGHTS])
    assert recorded_path(config) == f"hf://org/tiny@{commit}?ref=main"
    # The branch moves; the run does not.
    other = {**model, WEIGHTS: model[WEIGHTS][:-1] + bytes([model[WEIGHTS][-1] ^ 1])}
    hub.publish("org/tiny", other)
    assert "already finished" in train_on_two_nodes(config, tmp_path, hub)
    assert recorded_path(config) == f"hf://org/tiny@{commit}?ref=main"
    assert hub.sent_of(other[WEIGHTS]) == 0
    adapter = config.run_place / "pt_lora_model"
    settings = json.loads((adapter / "adapter_config.json").read_bytes())
    assert settings["base_model_name_or_path"] == "org/tiny"
    manifest = json.loads((adapter / "manifest.json").read_bytes())
    assert manifest["config"]["model"]["path"] == f"hf://org/tiny@{commit}?ref=main"


@pytest.fixture
def place(job_inputs: Path, s3_path: Place, faulty_s3: FaultyServer) -> Place:
    """The job's model in a bucket."""
    for file in (job_inputs / "model").iterdir():
        (s3_path / "tiny" / file.name).upload(file)
    return faulty_s3.front_of(s3_path / "tiny")


@pytest.mark.slow
@pytest.mark.ray
def test_two_nodes_train_from_a_bucket_fetching_once_each_as_from_the_disk(
    make_job: MakeJob, place: Place, tmp_path: Path, hub: HubServer, faulty_s3: FaultyServer
) -> None:
    remote = make_job("bucket", model__path=str(place))
    assert "finished on nodes 127.0.0.2 127.0.0.3" in train_on_two_nodes(remote, tmp_path, hub)
    gets = [r for r in faulty_s3.requests if r.startswith("GET ") and r.endswith(f"/{WEIGHTS}")]
    assert len(gets) == 3  # the driver and the two nodes; a small file is one request
    assert recorded_path(remote) == str(place)
    local = make_job("disk")
    train_on_two_nodes(local, tmp_path, hub)
    assert result_of(remote) == result_of(local)
