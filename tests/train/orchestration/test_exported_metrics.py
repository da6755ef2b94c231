"""Promise: Prometheus sees what a run does, under the names that the dashboard asks for."""

import json
import math
import re
from pathlib import Path
from typing import Any

from raytune_llama.train.monitoring import metrics
from raytune_llama.train.monitoring.metrics import read_metrics, run_label
from raytune_llama.train.orchestration.exported_metrics import (
    EXPORTED,
    RESTARTS,
    STALLS,
    ExportedMetrics,
)
from raytune_llama.train.orchestration.heartbeat import Heartbeat
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.progress import STEP, Progress
from tests.train.conftest import MakeConfig
from tests.train.orchestration.test_supervisor import beat

REPOSITORY = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
LOSS = EXPORTED[metrics.LOSS][0]
BAD_STEPS = EXPORTED[metrics.BAD_STEPS][0]


class RecordedGauges:
    """Stands in for `ray.util.metrics`; keeps the last value by name and run."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.names: set[str] = set()

    def Gauge(  # noqa: N802  # Ray's name
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> "RecordedGauge":
        assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name)
        assert description
        assert tag_keys == ("run",)
        assert name not in self.names
        self.names.add(name)
        return RecordedGauge(self, name)


class RecordedGauge:
    def __init__(self, api: RecordedGauges, name: str) -> None:
        self._api, self._name = api, name

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert math.isfinite(value)
        self._api.values[self._name, (tags or {})["run"]] = value


def beat_with(values: dict[str, dict[str, float]], **fields: Any) -> Heartbeat:  # noqa: ANN401
    return beat(values=values, **fields)


def test_heartbeats_set_the_metrics_of_their_runs() -> None:
    api = RecordedGauges()
    exported = ExportedMetrics(api, "/pack")
    exported.observe([beat_with({"/a": {STEP: 3, metrics.LOSS: 2.0}, "/b": {STEP: 5}})])
    exported.observe([beat_with({"/a": {STEP: 4, metrics.LOSS: 1.5, "unknown": 1.0}})])
    assert api.values[LOSS, "/a"] == 1.5
    assert api.values[EXPORTED[STEP][0], "/a"] == 4
    assert api.values[EXPORTED[STEP][0], "/b"] == 5
    # A run without a bad step says so, or nobody could be warned of the first.
    assert api.values[BAD_STEPS, "/b"] == 0


def test_value_that_is_not_finite_leaves_the_last_one() -> None:
    api = RecordedGauges()
    exported = ExportedMetrics(api, "/a")
    exported.observe([beat_with({"/a": {metrics.LOSS: 2.0, metrics.BAD_STEPS: 1.0}})])
    exported.observe([beat_with({"/a": {metrics.LOSS: math.nan, metrics.BAD_STEPS: 2.0}})])
    assert (api.values[LOSS, "/a"], api.values[BAD_STEPS, "/a"]) == (2.0, 2.0)


def test_values_that_do_not_change_are_set_again_before_a_node_forgets_them() -> None:
    api = RecordedGauges()
    exported = ExportedMetrics(api, "/a")
    exported.observe([beat_with({"/a": {metrics.EVAL_LOSS: 2.0}})])
    before = dict(api.values)
    api.values.clear()
    exported.observe([])
    assert api.values == before
    assert before[EXPORTED[metrics.EVAL_LOSS][0], "/a"] == 2.0


def test_restarts_and_stalls_are_counted_from_zero() -> None:
    api = RecordedGauges()
    exported = ExportedMetrics(api, "/a")
    assert (api.values[RESTARTS, "/a"], api.values[STALLS, "/a"]) == (0, 0)
    exported.observe([beat(attempt=3), beat(attempt=3, rank=1)])
    exported.count_stall()
    exported.count_stall()
    exported.observe([])
    assert (api.values[RESTARTS, "/a"], api.values[STALLS, "/a"]) == (2, 2)


def test_progress_returns_the_newest_values_of_each_run_once() -> None:
    progress = Progress()
    progress.record_values("/a", 1, {"loss": 3.0, "eval": 9.0})
    progress.record_values("/b", 7, {"loss": 5.0})
    progress.record_values("/a", 2, {"loss": 2.0})
    # A checkpoint is recorded some steps later.
    progress.record_values("/a", 1, {"write": 0.5})
    assert progress.pop_values() == {
        "/a": {STEP: 2, "loss": 2.0, "eval": 9.0, "write": 0.5},
        "/b": {STEP: 7, "loss": 5.0},
    }
    assert progress.pop_values() == {}


def test_run_of_the_loop_leaves_its_newest_values_for_the_heartbeat(
    make_config: MakeConfig,
) -> None:
    from raytune_llama.train.loop import train

    config = make_config(max_steps=4)
    workers = ProcessGroup.single_process()
    train(config, workers, lambda: False)
    values = workers.progress.pop_values()[run_label(config.run_place)]
    last = [record for record in read_metrics(config.run_place) if metrics.LOSS in record][-1]
    assert values[STEP] == last["step"] == 4
    assert values[metrics.LOSS] == last[metrics.LOSS]
    assert metrics.EVAL_LOSS in values


def test_dashboard_queries_every_metric_under_its_exported_name() -> None:
    text = (REPOSITORY / "serve" / "grafana-training.json").read_text(encoding="utf-8")
    queried = {
        name
        for panel in json.loads(text)["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\w*raytune_\w+", target["expr"])
    }
    api = RecordedGauges()
    ExportedMetrics(api, "/a")
    assert queried == {f"ray_{name}" for name in api.names}
    # Its variables too; `raytune_llama` is in the title and the tags.
    assert set(re.findall(r"ray_raytune_\w+", text)) == queried
