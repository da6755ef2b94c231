"""Promise: a node that cannot train is named, with what it lacks."""

from pathlib import Path

import pytest

from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.nodes import probe_node
from tests.faulty_s3 import FaultyServer
from tests.train.conftest import MakeConfig


def test_probe_node_that_can_do_all_answers_with_a_file(
    make_config: MakeConfig, run_dir: Place
) -> None:
    config = make_config(run_dir=str(run_dir))
    probes = run_dir / ".probe-0"
    (probes / "driver").write_bytes(b"driver")
    assert probe_node(config, probes, "node") == ("node", [])
    assert (probes / "node").exists()


def test_probe_node_names_what_it_cannot_read_or_write(
    make_config: MakeConfig,
    s3_path: Place,
    faulty_s3: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(run_dir=str(s3_path), data__store_dir=str(s3_path / "store"))
    # The driver writes elsewhere, as where a disk is not shared.
    _, problems = probe_node(config, s3_path / ".probe-0", "node")
    assert [problem.partition(":")[0] for problem in problems] == ["run_dir", "data.store_dir"]
    assert "every node mounts" in problems[0]
    assert "no manifest.json" in problems[1]
    # A node without the credentials that the driver has.
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    place = faulty_s3.front_of(s3_path)
    config = make_config(run_dir=str(place), data__store_dir=str(place / "store"))
    _, problems = probe_node(config, place / ".probe-0", "node")
    assert [problem.partition(":")[0] for problem in problems] == ["run_dir", "data.store_dir"]
    assert all("ACCESS_DENIED" in problem for problem in problems)
