"""MLflow's own client against the endpoints of its API that a tracker needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, to_dict
from raytune_llama.merge.config import MergeConfig
from raytune_llama.storage.files import write_json_atomic
from raytune_llama.storage.place import Place
from raytune_llama.train.export import result_path
from raytune_llama.train.identity import identify, read_identity, write_identity
from raytune_llama.train.monitoring.config import LoggingConfig, MlflowConfig
from raytune_llama.train.monitoring.metrics import LOSS, read_metrics
from raytune_llama.train.monitoring.trackers.descendants import log_merge
from raytune_llama.train.monitoring.trackers.session import check_trackers, track_run
from raytune_llama.train.monitoring.trackers.tracker import (
    MetricPoint,
    MissingRunError,
    RefusedError,
    TrackedRun,
    UnreachableError,
)
from tests.train.conftest import MakeConfig, run_here
from tests.train.monitoring.trackers.fake_mlflow import FakeMlflow, serve_fake_mlflow

pytest.importorskip("mlflow")

from raytune_llama.train.monitoring.trackers.mlflow import MlflowTracker


@pytest.fixture
def server() -> Iterator[FakeMlflow]:
    with serve_fake_mlflow() as fake:
        yield fake


@pytest.fixture
def tracker(server: FakeMlflow) -> MlflowTracker:
    return MlflowTracker(MlflowConfig(uri=server.url, experiment="tests"))


def a_run(tmp_path: Path, **fields: Any) -> TrackedRun:  # noqa: ANN401
    values = {"run_dir": Place.local(tmp_path), "name": "run", "job": "sft", "config": {}}
    return TrackedRun(**{**values, "tags": {"raytune.base": "m"}, **fields})


def test_run_trained_with_mlflow_has_its_steps_config_files_and_status(
    make_config: MakeConfig, server: FakeMlflow
) -> None:
    config = make_config(logging__mlflow={"uri": server.url, "experiment": "e"})
    check_trackers(config.logging)
    write_identity(config, identify(config))
    with track_run(config, read_identity(config.run_place)) as tracked:
        run_here(config)
        tracked.end("finished", result_path(config))
    (run,) = server.runs.values()
    sent = [(m["step"], m["value"]) for m in run["data"]["metrics"] if m["key"] == LOSS]
    assert sent == [(r["step"], r[LOSS]) for r in read_metrics(config.run_place) if LOSS in r]
    assert server.values("run0", "params")["optim.learning_rate"] == "0.01"
    assert server.values("run0", "params")["lora.modules_to_save.0"] == "embed_tokens"
    tags = server.values("run0", "tags")
    assert tags["raytune.result_hash"].startswith("blake3:")
    assert tags["raytune.job"] == "pretrain"
    assert run["info"]["status"] == "FINISHED"
    assert {"0/run0/artifacts/run.yaml", "0/run0/artifacts/pt_lora_model/manifest.json"} <= set(
        server.files
    )


def test_resumed_run_is_running_again_and_a_trial_has_its_parent(
    tracker: MlflowTracker, server: FakeMlflow, tmp_path: Path
) -> None:
    run = tracker.open(a_run(tmp_path), None, None)
    run.end("interrupted")
    assert server.runs["run0"]["info"]["status"] == "KILLED"
    again = tracker.open(a_run(tmp_path), run.address.id, None)
    assert again.address == run.address
    assert server.runs["run0"]["info"]["status"] == "RUNNING"
    trial = a_run(tmp_path, name="0001", parent_dir=Place.local(tmp_path))
    tracker.open(trial, None, run.address.id)
    assert server.values("run1", "tags")["mlflow.parentRunId"] == "run0"
    with pytest.raises(MissingRunError):
        tracker.open(a_run(tmp_path), "run9", None)


def test_name_that_mlflow_does_not_allow_is_changed(
    tracker: MlflowTracker, server: FakeMlflow, tmp_path: Path
) -> None:
    run = tracker.open(a_run(tmp_path), None, None)
    run.log([MetricPoint("eval/loss/人民 (1)+2", 1.0, 3, 0.0)])
    (metric,) = server.runs["run0"]["data"]["metrics"]
    assert metric["key"] == "eval/loss/人民 _1__2"


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        ((500, {"error_code": "INTERNAL_ERROR", "message": "x"}), UnreachableError),
        ((503, b"starting"), UnreachableError),
        ((400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "x"}), RefusedError),
        ((401, b"who are you"), RefusedError),
        ((403, {"error_code": "PERMISSION_DENIED", "message": "x"}), RefusedError),
        ((404, b"<html>another service</html>"), RefusedError),
    ],
)
def test_answers_that_may_change_are_told_from_those_that_will_not(
    *,
    refusal: tuple[int, Any],
    error: type[Exception],
    tracker: MlflowTracker,
    server: FakeMlflow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = tracker.open(a_run(tmp_path), None, None)
    server.refusal = refusal
    with pytest.raises(error):
        run.log([MetricPoint(LOSS, 1.0, 3, 0.0)])
    with pytest.raises(ConfigError, match=r"logging\.mlflow: MLflow at http"):
        check_trackers(LoggingConfig(mlflow=MlflowConfig(uri=server.url)))


@pytest.mark.parametrize("named", [None, "another", "this"])
def test_merge_is_logged_to_no_server_but_the_users_own(
    server: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if named is not None:
        own = server.url if named == "this" else "http://127.0.0.1:9"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    config = MergeConfig(base="a", adapters=("b",), target=str(tmp_path), output_format="gguf")
    address = {"server": server.url, "project": "x", "id": "0"}
    manifest = {
        "trackers": {"mlflow": address},
        "merged": {"inputs": {"base": {}}},
        "config": to_dict(config),
    }
    write_json_atomic(tmp_path / "manifest.json", manifest)
    log_merge(config)
    assert bool(server.headers) is (named == "this")


def test_merge_of_a_malformed_address_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MergeConfig(base="a", adapters=("b",), target=str(tmp_path), output_format="gguf")
    manifest = {
        "trackers": {"mlflow": {"server": 1}},
        "merged": {"inputs": {"base": {}}},
        "config": to_dict(config),
    }
    write_json_atomic(tmp_path / "manifest.json", manifest)
    log_merge(config)
    assert "is not logged to a run" in caplog.text


def test_credentials_come_from_the_environment(
    tracker: MlflowTracker, server: FakeMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    tracker.check()
    assert server.headers[-1]["Authorization"] == "Bearer abc"
