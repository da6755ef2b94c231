"""Promise: a store of a dataset on the hub is that of its files, and stays at their commit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import hub_environment
from tests.hub_server import HubServer
from tests.pipeline.conftest import own_cluster

CODE = "from raytune_llama.cli import main; main()"


def prepare(source: str, store: Path, job_inputs: Path, hub: HubServer) -> str:
    """Build a token store as a user does; return what is logged."""
    arguments = [
        f"tokenizer={job_inputs / 'model'}",
        f"data.sources=[{{path: '{source}', name: corpus}}]",
        f"data.store_dir={store}",
        "data.validation_fraction=0.1",
        "rows=text",
    ]
    config = store.with_name("config.yaml")
    config.write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", CODE, "prepare-data", str(config), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | own_cluster() | hub_environment(hub, store.parent),
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def manifest(store: Path) -> dict[str, Any]:
    return json.loads((store / "manifest.json").read_bytes())


@pytest.mark.slow
@pytest.mark.ray
def test_store_of_a_dataset_on_the_hub_equals_that_of_its_files_and_stays_at_its_commit(
    job_inputs: Path, tmp_path: Path, hub: HubServer
) -> None:
    files = {file.name: file.read_bytes() for file in (job_inputs / "corpus").iterdir()}
    commit = hub.publish("org/corpus", {**files, "README.md": b"#"}, kind="datasets")
    store, source = tmp_path / "hub-store", "hf://datasets/org/corpus/*.txt"
    prepare(source, store, job_inputs, hub)
    assert manifest(store)["revisions"] == [f"hf://datasets/org/corpus@{commit}?ref=main"]
    hub.publish(
        "org/corpus", {name: data + b"more" for name, data in files.items()}, kind="datasets"
    )
    assert "nothing to do" in prepare(source, store, job_inputs, hub)
    prepare(str(job_inputs / "corpus" / "*.txt"), tmp_path / "disk-store", job_inputs, hub)
    local = manifest(tmp_path / "disk-store")
    assert "revisions" not in local
    assert local["fingerprint"] == manifest(store)["fingerprint"]
