"""A real MLflow server: a run, a sweep, a merge and an evaluation are in it, also after a crash."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import from_dict, write_yaml
from raytune_llama.evaluate.config import EvaluateConfig
from raytune_llama.evaluate.results import (
    EvaluatedModel,
    ModelOutcome,
    TextScore,
    build_results,
    write_results,
)
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.export import result_path
from raytune_llama.train.identity import identify, read_identity, write_identity
from raytune_llama.train.monitoring.metrics import LOSS, read_metrics
from raytune_llama.train.monitoring.plot import write_plot
from raytune_llama.train.monitoring.trackers.descendants import log_evaluation, log_merge
from raytune_llama.train.monitoring.trackers.session import check_trackers, track_run
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.sweep import run_sweep
from tests.pipeline.conftest import build_job, job_inputs
from tests.train.conftest import MakeConfig, run_here
from tests.train.monitoring.trackers.mlflow_server import MLFLOW, MlflowServer
from tests.train.monitoring.trackers.test_feed import wait_for

__all__ = ["job_inputs"]

mlflow = pytest.importorskip("mlflow")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MLFLOW.exists(), reason="no MLflow server: make test-trackers"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    one = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    one.start()
    yield one
    one.kill()


@pytest.fixture
def client(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401  # MLflow's
    # Merges and evaluations are logged to the user's own server only.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    return mlflow.MlflowClient(tracking_uri=server.url)


def runs_of(client: Any, experiment: str) -> list[Any]:  # noqa: ANN401
    """Return the runs of an experiment, the first one first."""
    found = client.get_experiment_by_name(experiment)
    return list(reversed(client.search_runs([found.experiment_id])))


def losses(client: Any, run_id: str) -> list[tuple[int, float]]:  # noqa: ANN401
    """Return the training loss as the server has it, in the order of the steps."""
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, LOSS))


def written_losses(config: PretrainConfig) -> list[tuple[int, float]]:
    return [(int(r["step"]), r[LOSS]) for r in read_metrics(config.run_place) if LOSS in r]


def files_of(client: Any, run_id: str, folder: str | None = None) -> set[str]:  # noqa: ANN401
    return {file.path for file in client.list_artifacts(run_id, folder)}


def test_run_whose_server_is_killed_and_returns_is_complete(
    make_config: MakeConfig,
    server: MlflowServer,
    client: Any,  # noqa: ANN401
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config(logging__mlflow={"uri": server.url, "experiment": "killed"}, max_steps=40)
    check_trackers(config.logging)
    write_identity(config, identify(config))
    identity = read_identity(config.run_place)
    with track_run(config, identity) as tracked:
        run_here(config, stop_after=10)
        tracked.end("interrupted")
    (run,) = runs_of(client, "killed")
    assert run.info.status == "KILLED"
    assert losses(client, run.info.run_id) == written_losses(config)
    with caplog.at_level(logging.INFO), track_run(config, identity) as tracked:
        run_here(config, stop_after=10)
        server.kill()
        run_here(config)
        write_plot(config.run_place)
        server.start()
        tracked.end("finished", result_path(config))
    (run,) = runs_of(client, "killed")
    run_id = run.info.run_id
    assert run.info.status == "FINISHED"
    assert len(losses(client, run_id)) == 40
    assert losses(client, run_id) == written_losses(config)
    assert run.data.params["optim.learning_rate"] == "0.01"
    assert run.data.params["lora.modules_to_save.0"] == "embed_tokens"
    assert run.data.tags["raytune.base_hash"].startswith("blake3:")
    assert run.data.tags["raytune.result_hash"].startswith("blake3:")
    assert {"run.yaml", "loss.png", "pt_lora_model"} <= files_of(client, run_id)


def test_merge_and_evaluation_are_added_to_the_run_that_they_come_from(
    make_config: MakeConfig,
    server: MlflowServer,
    client: Any,  # noqa: ANN401
    model_dir: Path,
    tmp_path: Path,
) -> None:
    config = make_config(logging__mlflow={"uri": server.url, "experiment": "lineage"})
    write_identity(config, identify(config))
    with track_run(config, read_identity(config.run_place)) as tracked:
        # The adapter's manifest names the run that is open when it is written.
        wait_for((config.run_place / "tracker-mlflow.json").exists)
        run_here(config)
        tracked.end("finished", result_path(config))
    merge = MergeConfig(
        base=str(model_dir), adapters=(str(result_path(config)),), target=str(tmp_path / "merged")
    )
    merge_adapters(merge)
    log_merge(merge)
    evaluation = from_dict(
        EvaluateConfig,
        {
            "run_dir": str(tmp_path / "scores"),
            "models": [{"path": merge.target}],
            "answers": {"prompts": "none.txt"},
        },
    )
    score = TextScore("wiki", 1.25, 9.0, 100, 400)
    outcomes = [ModelOutcome(EvaluatedModel("merged", merge.target), texts=(score,))]
    results = build_results(evaluation, outcomes)
    (tmp_path / "scores").mkdir()
    write_results(results, outcomes, tmp_path / "scores")
    log_evaluation(evaluation, results)
    (run,) = runs_of(client, "lineage")
    tags, run_id = run.data.tags, run.info.run_id
    assert run.info.status == "FINISHED"
    assert tags["raytune.merge.merged.adapter_hashes"] == tags["raytune.result_hash"]
    assert tags["raytune.merge.merged.base_hash"] == tags["raytune.base_hash"]
    assert tags["raytune.merge.merged.path"] == merge.target
    assert run.data.metrics["evaluation/scores/wiki/bits_per_byte"] == 1.25
    assert "merge/merged/manifest.json" in files_of(client, run_id, "merge/merged")
    assert "evaluation/scores/results.json" in files_of(client, run_id, "evaluation/scores")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("pack", [2, None])
def test_trials_of_a_sweep_are_child_runs_with_their_own_values(
    pack: int | None,
    tmp_path: Path,
    job_inputs: Path,
    server: MlflowServer,
    client: Any,  # noqa: ANN401
) -> None:
    experiment = f"sweep-{pack}"
    base = build_job(
        tmp_path / "unused",
        tmp_path / "store",
        job_inputs,
        scale__num_workers=1,
        scale__cpus_per_worker=2,
        engine__strategy="ddp",
        engine__zero_stage=None,
        logging__mlflow={"uri": server.url, "experiment": experiment},
    )
    write_yaml(base, tmp_path / "base.yaml")
    sweep = from_dict(
        SweepConfig,
        {
            "sweep_dir": str(tmp_path / "sweep"),
            "job": "pretrain",
            "base": str(tmp_path / "base.yaml"),
            "space": {"optim.learning_rate": {"choice": [1e-2, 1e-3]}},
            "search": {"kind": "grid"},
            "scheduler": {"kind": "none"},
            "max_steps": 8,
            "pack": pack,
        },
    )
    assert run_sweep(sweep).status == "finished"
    parent, *trials = runs_of(client, experiment)
    assert parent.info.run_name == "sweep"
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    rates = [run.data.params["optim.learning_rate"] for run in trials]
    assert sorted(map(float, rates)) == [1e-3, 1e-2]
    assert [len(losses(client, run.info.run_id)) for run in trials] == [8, 8]
    assert [run.info.status for run in (parent, *trials)] == ["FINISHED"] * 3
    assert {"leaderboard.csv", "sweep.html", "best.yaml"} <= files_of(client, parent.info.run_id)
