"""Promise: a tracker that can't be used is named before a run starts, and no secret is logged."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.config import LoggingConfig, WandbConfig
from raytune_llama.train.monitoring.trackers import session
from raytune_llama.train.monitoring.trackers.description import (
    describe_run,
    flatten,
    hash_weights_of,
    redact,
)
from raytune_llama.train.monitoring.trackers.session import check_trackers, find_problems
from raytune_llama.train.preflight import open_inputs
from tests.train.conftest import MakeConfig

HERE = Place.local(Path("/run"))


def logging_with(**fields: Any) -> LoggingConfig:  # noqa: ANN401
    return from_dict(LoggingConfig, fields)


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"uri": "http://me:secret@host:5000"}, "MLFLOW_TRACKING_USERNAME"),
        ({"uri": "host:5000"}, "logging.mlflow.uri|mlflow.uri"),
        ({"uri": "http://host", "experiment": ""}, "experiment"),
        ({"uri": "http://host", "experimnt": "x"}, "experiment"),
    ],
)
def test_mlflow_settings_that_cannot_work_are_refused(fields: dict[str, str], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as caught:
        logging_with(mlflow=fields)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["mlflow", "wandb"])
def test_tracker_whose_package_is_missing_is_named_with_its_extra(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    fields: dict[str, Any] = {"uri": "http://host"} if key == "mlflow" else {}
    (problem,) = find_problems(logging_with(**{key: fields}), HERE)
    assert problem.startswith(f"logging.{key}: ")
    assert f"'raytune_llama[{key}]'" in problem


@pytest.mark.usefixtures("no_key")
def test_wandb_online_without_a_key_is_refused_before_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "found")
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        open_inputs(make_config(logging__wandb={}))
    assert find_problems(logging_with(wandb={"mode": "offline"}), HERE) == []
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert find_problems(logging_with(wandb={}), HERE) == []


def test_wandb_offline_in_object_storage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "found")
    config = LoggingConfig(wandb=WandbConfig(mode="offline"))
    (problem,) = find_problems(config, Place("s3", "bucket/run"))
    assert problem.startswith("logging.wandb.mode: got offline")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_mlflow_that_refuses_connections_is_named_at_the_start() -> None:
    pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        ConfigError, match=rf"logging\.mlflow: MLflow at http://127\.0\.0\.1:{port}"
    ):
        check_trackers(logging_with(mlflow={"uri": f"http://127.0.0.1:{port}"}))


def test_mlflow_that_never_answers_is_named_in_time(
    silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(session, "CONTACT_SECONDS", 1.0)
    with pytest.raises(ConfigError, match="does not answer within 1 s"):
        check_trackers(logging_with(mlflow={"uri": silent_server}))


def test_described_run_has_its_config_and_lineage_without_credentials(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    identity = {"model": {"a.safetensors": "blake3:1", "config.json": "blake3:2"}, "store": "s"}
    run = describe_run(config, identity)
    assert flatten(run.config)["max_steps"] == config.max_steps
    assert run.tags["raytune.base_hash"] == "blake3:1"
    assert run.tags["raytune.store_hash"] == "s"
    assert "raytune.continues" not in run.tags


def test_redacted_data_lacks_the_credentials_of_urls_alone() -> None:
    data = {"a": ["https://me:pw@host/x?y=1", "s3://bucket/a@b"], "b": "me@example.org", "c": 3}
    assert redact(data) == {
        "a": ["https://host/x?y=1", "s3://bucket/a@b"],
        "b": "me@example.org",
        "c": 3,
    }


def test_hash_of_weights_is_the_file_s_own_or_of_all_files() -> None:
    one = {"model.safetensors": "blake3:1", "config.json": "blake3:9"}
    two = {"a.safetensors": "blake3:1", "b.safetensors": "blake3:2"}
    assert hash_weights_of(one) == "blake3:1"
    assert hash_weights_of({}) is None
    assert hash_weights_of(two) == hash_weights_of(dict(reversed(two.items())))
    assert hash_weights_of(two) != hash_weights_of({**two, "b.safetensors": "blake3:3"})
