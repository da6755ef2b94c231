"""What clients notice of a replica, a gateway, the proxy or the controller that is killed."""

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.util.state import list_actors

from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from tests.serve.clients import Clients, wait_until
from tests.serve.test_scaling import ASKED, url

__all__ = ["url"]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
]

RETRY_SECONDS = 15.0
"""After which a client asks once more: Ray's own restart, and ten seconds at most on top."""


@pytest.fixture
def endpoint(url: str, served_dir: Path) -> str:
    """Two replicas and two gateways."""
    model = ServedModelConfig(path=str(served_dir), name="tiny", template="belle")
    replicas = ReplicaConfig(min=2, max=2, slots=8, cpus=0.5)
    serve.run(build_app(ServeConfig(models=(model,), replicas=replicas)), name="llm")
    return url


def pids(kind: str) -> list[int]:
    actors: list[Any] = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[("state", "=", "ALIVE")],
        detail=True,
        limit=1000,
    )
    return [actor.pid for actor in actors if actor.class_name.startswith(kind)]


@pytest.mark.parametrize(
    "kind",
    [
        "ServeReplica:llm:model-tiny",
        "ServeReplica:llm:gateway",
        "ServeReplica:llm:ledger",
        "ProxyActor",
        "ServeController",
    ],
)
def test_killed_under_load_nearly_all_is_answered_with_one_retry(endpoint: str, kind: str) -> None:
    asked = {**ASKED, "max_tokens": 16}
    with Clients(endpoint, asked, num_clients=8, retry_seconds=RETRY_SECONDS).asking() as clients:
        wait_until(lambda: clients.num_answers > 200, seconds=120, what="answers before")
        before_pids = pids(kind)
        os.kill(before_pids[0], signal.SIGKILL)
        start = time.monotonic()

        def is_back() -> bool:
            now = pids(kind)
            return len(now) >= len(before_pids) and before_pids[0] not in now

        wait_until(is_back, seconds=120, what=f"another {kind}")
        seconds = time.monotonic() - start
        before = clients.num_answers
        wait_until(lambda: clients.num_answers > before + 2000, seconds=300, what="answers after")
    total = clients.num_answers + len(clients.failures)
    told = (
        f"{kind}: back after {seconds:.1f} s; of {total} requests {clients.num_retried} were "
        f"asked again, {len(clients.failures)} failed: {clients.failures[:2]}"
    )
    logging.getLogger(__name__).warning(told)
    assert len(clients.failures) <= total / 1000, told
    # A sequence that is cut off is never told as a whole one.
    assert len(clients.texts) == 1
