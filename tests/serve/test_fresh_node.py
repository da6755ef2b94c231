"""Promise: a replica on a fresh node fetches its model, from the hub and from a bucket."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.serve.config import ServeConfig, ServedModelConfig
from raytune_llama.serve.model_paths import pin_models
from raytune_llama.storage.place import Place
from tests.conftest import hub_environment
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[2]


def serve_on_a_fresh_node(model: str, tmp_path: Path, hub: HubServer) -> str:
    # Without the tests' own proxy, which is for their cluster.
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.fresh_node", model, str(tmp_path / "node")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=own | hub_environment(hub, tmp_path / "driver"),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_replica_on_a_fresh_node_fetches_its_model_from_the_hub(
    served_dir: Path, tmp_path: Path, hub: HubServer
) -> None:
    files = {file.name: file.read_bytes() for file in served_dir.iterdir()}
    hub.publish("org/tiny", files)
    assert "200 tiny" in serve_on_a_fresh_node("hf://org/tiny", tmp_path, hub)
    # Once to the node, and not to the driver.
    assert hub.sent_of(files["model.safetensors"]) == len(files["model.safetensors"])


@pytest.mark.slow
@pytest.mark.ray
def test_replica_on_a_fresh_node_fetches_its_model_from_a_bucket(
    served_dir: Path, tmp_path: Path, hub: HubServer, s3_path: Place
) -> None:
    for file in served_dir.iterdir():
        (s3_path / "tiny" / file.name).upload(file)
    assert "200 tiny" in serve_on_a_fresh_node(str(s3_path / "tiny"), tmp_path, hub)
    assert list((tmp_path / "node").rglob("model.safetensors"))
    assert not list((tmp_path / "driver").rglob("model.safetensors"))


def test_pin_models_keeps_local_paths_and_gives_those_on_the_hub_a_commit(
    served_dir: Path, hub: HubServer
) -> None:
    commit = hub.publish("org/tiny", {"config.json": b"{}", "model.safetensors": b"w"})
    models = (
        ServedModelConfig(path=str(served_dir)),
        ServedModelConfig(path="hf://org/tiny", name="b"),
    )
    pinned = pin_models(ServeConfig(models=models))
    assert [model.path for model in pinned.models] == [
        str(served_dir),
        f"hf://org/tiny@{commit}?ref=main",
    ]
    assert ServedModelConfig(path=pinned.models[1].path).served_name == "tiny"
    missing = ServeConfig(models=(ServedModelConfig(path="hf://org/none"),))
    with pytest.raises(ConfigError, match=r"models\.0\.path: .*no model org/none"):
        pin_models(missing)
