"""Check on a Ray cluster of nodes with labels and types of GPU what is said of its resources.

Nothing here computes: Ray takes the resources of a node for what they are called.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raytune_llama.config.settings import ConfigError, override
from raytune_llama.connection import quoted_python
from raytune_llama.signals import StopSignal
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.orchestration.resources import (
    ResourceRequest,
    wait_for_resources,
    wait_until_free,
)

OBJECT_STORE_BYTES = 80 * 2**20
WAIT_SECONDS = 60.0

NODES: tuple[dict[str, Any], ...] = (
    {
        "num_cpus": 8,
        "num_gpus": 2,
        "resources": {"accelerator_type:H100": 1},
        "labels": {"pool": "a"},
    },
    {
        "num_cpus": 3,
        "num_gpus": 4,
        "resources": {"accelerator_type:L4": 1},
        "labels": {"pool": "b"},
    },
    {"num_cpus": 5, "resources": {"nvme": 1}, "labels": {"zone": "west"}},
)

SCALES = {
    "plain": ScaleConfig(),
    "GPUs": ScaleConfig(use_gpu=True),
    "a type of GPU": ScaleConfig(use_gpu=True, accelerator_type="L4"),
    "shares of GPUs": ScaleConfig(use_gpu=True, gpus_per_worker=0.5, accelerator_type="H100"),
    "odd shares of GPUs": ScaleConfig(use_gpu=True, gpus_per_worker=0.333, accelerator_type="H100"),
    "a label": ScaleConfig(label_selector={"pool": "a"}),
    "not a label": ScaleConfig(label_selector={"pool": "!a"}),
    "one of labels": ScaleConfig(label_selector={"pool": "in(a,b)"}),
    "none of labels": ScaleConfig(label_selector={"pool": "!in(a,b)"}),
    "two labels": ScaleConfig(label_selector={"pool": "!a", "zone": "west"}),
    "shares of a resource": ScaleConfig(resources_per_worker={"nvme": 0.3}),
    "nodes of their own": ScaleConfig(placement="strict_spread"),
    "labelled nodes of their own": ScaleConfig(
        placement="strict_spread", label_selector={"pool": "in(a,b)"}
    ),
}


def main() -> None:
    """Start the nodes, check, stop the nodes."""
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for number, node in enumerate(NODES):
        cluster.add_node(
            node_ip_address=f"127.0.0.{number + 2}", object_store_memory=OBJECT_STORE_BYTES, **node
        )
    cluster.wait_for_nodes(timeout=WAIT_SECONDS)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=quoted_python())
    try:
        for check in (check_counts, check_busy, check_stop, check_shortage):
            check()
            sys.stdout.write(f"{check.__name__.replace('check_', 'checked ')}\n")
    finally:
        ray.shutdown()
        cluster.shutdown()


def check_counts() -> None:
    """Ray places as many workers as are counted, and not one more."""
    for name, scale in SCALES.items():
        counted = scale.worker_needs.count(ray.nodes())
        assert counted > 0, name
        with group(scale, counted) as placed:
            assert placed.wait(WAIT_SECONDS), f"{name}: Ray does not place {counted} workers"
        with group(scale, counted + 1) as placed:
            assert not placed.wait(1), f"{name}: Ray places more than {counted} workers"


def check_busy() -> None:
    """A run waits for what another one uses, until that is free."""
    scale = override(SCALES["a type of GPU"], {"num_workers": 3})
    with StopSignal() as stop:
        with group(scale, 1) as used:
            assert used.wait(WAIT_SECONDS)
            waiting = Waiting(scale, stop)
            assert not waiting.has_ended(3.0)
        assert waiting.has_ended(WAIT_SECONDS)
        assert waiting.result is True
        # Nothing is kept: all of it can be had by the run's workers.
        with group(scale, 3) as own:
            assert own.wait(WAIT_SECONDS)


def check_stop() -> None:
    """A run that waits can be stopped."""
    scale = override(SCALES["a type of GPU"], {"num_workers": 3})
    with StopSignal() as stop, group(scale, 1) as used:
        assert used.wait(WAIT_SECONDS)
        waiting = Waiting(scale, stop)
        stop.request()
        assert waiting.has_ended(WAIT_SECONDS)
        assert waiting.result is False


def check_shortage() -> None:
    """Nodes that do not exist are waited for as long as was allowed, and can be added meanwhile."""
    scale = override(SCALES["a type of GPU"], {"num_workers": 8, "wait_seconds": 1.0})
    start = time.monotonic()
    with pytest.raises(ConfigError, match="can hold 3") as caught:
        wait_for_resources(scale)
    assert "reports" not in str(caught.value)
    assert time.monotonic() - start >= 1.0
    with ResourceRequest(scale) as request:
        assert not request.is_met()
        assert request.read_autoscaler() == (False, [])


class Waiting(threading.Thread):
    """A run that waits for free resources."""

    def __init__(self, scale: ScaleConfig, stop: StopSignal) -> None:
        super().__init__(daemon=True)
        self._scale, self._stop_signal = scale, stop
        self.result: bool | None = None
        self.start()

    def run(self) -> None:
        """Wait."""
        self.result = wait_until_free(self._scale, self._stop_signal)

    def has_ended(self, seconds: float) -> bool:
        """Whether the wait ends within some seconds."""
        self.join(seconds)
        return not self.is_alive()


@contextlib.contextmanager
def group(scale: ScaleConfig, num_workers: int) -> Iterator[PlacementGroup]:
    """Request what workers need as Ray Train does, and release it at the end."""
    needs = scale.worker_needs
    labels: Any = [dict(needs.labels)] * num_workers if needs.labels else None
    made = placement_group(
        [dict(needs.resources)] * num_workers,
        strategy=scale.placement.upper(),
        bundle_label_selector=labels,
    )
    try:
        yield made
    finally:
        remove_placement_group(made)


if __name__ == "__main__":
    main()
