"""Metrics of training that each node of the cluster exports to Prometheus, recorded with Ray's API.

The driver sets them from the workers' heartbeats, about once per second: they cost the loop
nothing, and continue when workers move to other nodes. Ray adds the prefix `ray_` to the names;
`serve/grafana-training.json` is a dashboard of them. All have the tag `run`, the run's directory.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from raytune_llama.train.monitoring import metrics
from raytune_llama.train.orchestration.heartbeat import Heartbeat
from raytune_llama.train.progress import STEP

EXPORTED: Final[Mapping[str, tuple[str, str]]] = {
    STEP: ("raytune_train_step", "Optimizer steps done"),
    metrics.LOSS: ("raytune_train_loss", "Training loss of the newest step, in nats per target"),
    metrics.LEARNING_RATE: ("raytune_train_learning_rate", "Learning rate of the newest step"),
    metrics.GRAD_NORM: ("raytune_train_grad_norm", "Gradient norm of the newest step"),
    metrics.TOKENS_PER_SECOND: (
        "raytune_train_tokens_per_second",
        "Target tokens per second of the newest step, over all workers",
    ),
    metrics.MFU: ("raytune_train_mfu", "Model FLOP/s as a share of the devices' peak"),
    metrics.DATA_SHARE: ("raytune_train_data_share", "Share of the step spent waiting for data"),
    metrics.PEAK_MEMORY: ("raytune_train_peak_memory_gib", "Peak memory of worker 0, in GiB"),
    metrics.SKIPPED_STEPS: (
        "raytune_train_skipped_steps",
        "Steps whose update the loss scaler has skipped, over all starts of the run",
    ),
    metrics.BAD_STEPS: (
        "raytune_train_bad_steps",
        "Steps with a non-finite loss or gradient, over all starts of the run",
    ),
    metrics.EVAL_LOSS: ("raytune_eval_loss", "Loss of the newest evaluation, in nats per target"),
    metrics.EVAL_BITS_PER_BYTE: (
        "raytune_eval_bits_per_byte",
        "Bits per byte of text of the newest evaluation",
    ),
}
"""Name and description of each exported metric, by its name in `metrics.jsonl`."""

RESTARTS = "raytune_train_restarts"
"""How often this driver has restarted the workers; of a pack, under the pack's directory."""

STALLS = "raytune_train_stalls"
"""How often this driver has killed workers that hung; of a pack, under the pack's directory."""

_COUNTED = {
    RESTARTS: "Restarts of the workers by this driver",
    STALLS: "Times that this driver has killed workers that hung",
}
_ZERO_AT_START = (metrics.SKIPPED_STEPS, metrics.BAD_STEPS)
"""Metrics that a run reports only once it has one."""


class Gauge(Protocol):
    """A number that is set."""

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Set the number."""
        ...


class GaugeApi(Protocol):
    """The part of `ray.util.metrics` that is used; a module is one."""

    def Gauge(  # noqa: N802  # Ray's name
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> Gauge:
        """Create a gauge."""
        ...


class ExportedMetrics:
    """Metrics of one launch: a run, or a pack of runs.

    All are gauges, also those that only grow: a counter does not exist before its first event, so
    that Prometheus's `increase` misses exactly that one. A node forgets a gauge that was not set
    for two of its reports (20 s), so every `observe` sets all of them again.
    """

    def __init__(self, api: GaugeApi, label: str) -> None:
        """Create all metrics.

        Args:
            api: `ray.util.metrics`.
            label: label of the run, from `run_label`.
        """
        described = {**dict(EXPORTED.values()), **_COUNTED}
        self._gauges = {
            name: api.Gauge(name, description=what, tag_keys=("run",))
            for name, what in described.items()
        }
        self._label = label
        self._runs: set[str] = set()
        self._values: dict[tuple[str, str], float] = {(name, label): 0.0 for name in _COUNTED}
        self.observe([])

    def observe(self, heartbeats: Iterable[Heartbeat]) -> None:
        """Set all metrics to their newest values, with those of some heartbeats."""
        for beat in heartbeats:
            if beat.rank == 0:
                self._values[RESTARTS, self._label] = float(beat.attempt - 1)
            for run, values in beat.values.items():
                start = {} if run in self._runs else dict.fromkeys(_ZERO_AT_START, 0.0)
                self._runs.add(run)
                for name, value in {**start, **values}.items():
                    # A dashboard shows the last number until there is another one.
                    if name in EXPORTED and math.isfinite(value):
                        self._values[EXPORTED[name][0], run] = float(value)
        for (name, run), value in self._values.items():
            self._gauges[name].set(value, tags={"run": run})

    def count_stall(self) -> None:
        """Count workers that hung; `observe` sets the metric."""
        self._values[STALLS, self._label] += 1
