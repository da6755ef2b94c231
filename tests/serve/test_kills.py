"""What clients notice when a replica, the proxy, the rate limiter or the controller is killed."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import ray
from ray import serve
from ray.util.state import list_actors

from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import KeyLimits, ReplicaConfig, ServeConfig, ServedModelConfig
from tests.conftest import PROXY
from tests.serve.many_clients import Clients, wait_until
from tests.serve.test_scaling import ASKED, url

__all__ = ["url"]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
]

RETRY_SECONDS = 15.0
"""After which a client asks once more: Ray's own restart, and ten seconds at most on top."""

REPLICA = "ServeReplica:llm:model"
PROXIES = ["HAProxyManager", "haproxy"] if PROXY == "haproxy" else ["ProxyActor"]


LIMITER = "ServeReplica:llm:rate-limiter"


def run_two_replicas(served_dir: Path, *, slots: int, key_limits: KeyLimits | None = None) -> None:
    model = ServedModelConfig(path=str(served_dir), name="tiny", template="belle")
    config = ServeConfig(
        models=(model,),
        key_limits=key_limits or KeyLimits(),
        replicas=ReplicaConfig(min=2, max=2, slots=slots, cpus=0.5),
    )
    serve.run(build_app(config), name="llm")


def pids(kind: str) -> list[int]:
    """Process ids of actors whose class begins so, or of the cluster's HAProxy."""
    if kind == "haproxy":
        return [
            one.pid
            for manager in pids("HAProxyManager")
            for one in psutil.Process(manager).children()
            if one.name() == "haproxy"
        ]
    actors: list[Any] = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[("state", "=", "ALIVE")],
        detail=True,
        limit=1000,
    )
    return [actor.pid for actor in actors if actor.class_name.startswith(kind)]


def kill_one(kind: str) -> Callable[[], bool]:
    """Kill a process; return whether another one has taken its place."""
    before = pids(kind)
    os.kill(before[0], signal.SIGKILL)

    def is_back() -> bool:
        now = pids(kind)
        return len(now) >= len(before) and before[0] not in now

    return is_back


@pytest.mark.parametrize("kind", [REPLICA, LIMITER, *PROXIES, "ServeController"])
def test_killed_under_load_nearly_all_is_answered_with_one_retry(
    url: str, served_dir: Path, kind: str
) -> None:
    # Wide enough to stop nobody: only so that there is a rate limiter to kill.
    limits = KeyLimits(concurrent=1000) if kind == LIMITER else None
    run_two_replicas(served_dir, slots=8, key_limits=limits)
    asked = {**ASKED, "max_tokens": 16}
    with Clients(url, asked, num_clients=8, retry_seconds=RETRY_SECONDS).asking() as clients:
        wait_until(lambda: clients.num_answers > 200, seconds=120, what="answers before")
        is_back = kill_one(kind)
        seconds = wait_until(is_back, seconds=120, what=f"another {kind}")
        before = clients.num_answers
        wait_until(lambda: clients.num_answers > before + 1000, seconds=300, what="answers after")
    total = clients.num_answers + len(clients.failures)
    told = (
        f"{kind}: back after {seconds:.1f} s; of {total} requests {clients.num_retried} were "
        f"asked again, {len(clients.failures)} failed: {clients.failures[:2]}"
    )
    logging.getLogger(__name__).warning(told)
    assert len(clients.failures) <= total / 1000, told
    # A sequence that is cut off is never told as a whole one.
    assert len(clients.texts) == 1


@pytest.mark.skipif(PROXY != "haproxy", reason="only HAProxy sends a request to another replica")
def test_request_without_a_first_byte_is_answered_by_another_replica(
    url: str, served_dir: Path
) -> None:
    # One at a time each, so that most of these wait when their replica dies; whole answers have
    # no first byte before their end.
    run_two_replicas(served_dir, slots=1)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    texts: list[str] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            told = client.completions.create(**ASKED)  # pyright: ignore[reportCallIssue, reportArgumentType]
        except openai.APIError as error:
            failures.append(error)
        else:
            texts.append(told.choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(texts) >= 2, seconds=60, what="first answers")
    assert len(texts) < 20, "too few are left that wait"
    kill_one(REPLICA)
    for thread in threads:
        thread.join()
    assert not failures
    assert len(texts) == 24
    assert len(set(texts)) == 1


@pytest.mark.skipif(PROXY != "haproxy", reason="HAProxy's own answer")
def test_no_replica_left_is_told_in_the_format_of_the_api(url: str, served_dir: Path) -> None:
    run_two_replicas(served_dir, slots=1)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    for pid in pids(REPLICA):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            client.completions.create(**ASKED)  # pyright: ignore[reportCallIssue, reportArgumentType]
        except openai.InternalServerError as error:
            assert error.status_code == 503  # noqa: PT017  # whichever of many requests it is
            assert error.response.headers["Retry-After"] == "1"  # noqa: PT017
            assert "try again" in str(error.body)  # noqa: PT017
            return
    pytest.fail("no request was refused although no replica was left")
