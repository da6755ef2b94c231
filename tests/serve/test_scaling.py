"""Replicas that follow the load, versions that replace each other, and what is too much."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from ray import serve
from ray.serve.schema import ApplicationStatus, ServeDeploySchema
from safetensors.torch import load_file, save_file

from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from tests.serve.many_clients import Clients, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ASKED = {"model": "tiny", "prompt": "the quick", "max_tokens": 100, "temperature": 0}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def url() -> Iterator[str]:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def run_model(path: Path, **replicas: Any) -> None:  # noqa: ANN401  # a config's fields
    """Deploy a model as `tiny`, or its next version."""
    model = ServedModelConfig(path=str(path), name="tiny", template="belle")
    config = ServeConfig(models=(model,), replicas=ReplicaConfig(cpus=0.5, **replicas))
    serve.run(build_app(config), name="llm")


def states() -> dict[Any, int]:
    """Number of the model's replicas by their state."""
    return dict(serve.status().applications["llm"].deployments["model"].replica_states)


def num_running() -> int:
    return states().get("RUNNING", 0)


def num_replicas() -> int:
    return sum(states().values())


def test_replicas_grow_and_shrink_with_the_load_and_no_answer_is_lost(
    url: str, served_dir: Path
) -> None:
    run_model(served_dir, **FOLLOWING)
    check_replicas_follow_the_load(url)


FOLLOWING: dict[str, Any] = {
    "max": 2,
    "slots": 4,
    "target_ongoing": 2,
    "upscale_seconds": 1,
    "downscale_seconds": 2,
}
"""Settings of replicas for `check_replicas_follow_the_load`."""


def check_replicas_follow_the_load(
    url: str, *, start_seconds: float = 120, stop_seconds: float = 180
) -> None:
    """Check that a deployed model gets a second replica under load and loses it after it."""
    assert num_running() == 1
    with Clients(url, ASKED, num_clients=8).asking() as clients:
        wait_until(
            lambda: num_running() == 2, seconds=start_seconds, what="two replicas under load"
        )
        grown = clients.num_answers
        wait_until(
            lambda: clients.num_answers > grown + 20, seconds=60, what="answers of two replicas"
        )
    # A few clients are left while the second replica is taken away again.
    with Clients(url, ASKED, num_clients=1).asking() as few:
        wait_until(lambda: num_replicas() == 1, seconds=stop_seconds, what="one replica again")
    assert not clients.failures
    assert not few.failures
    assert len(clients.texts | few.texts) == 1


@pytest.mark.slow
def test_replicas_go_to_none_and_a_request_brings_one_back(url: str, served_dir: Path) -> None:
    run_model(served_dir, min=0, upscale_seconds=0.5, downscale_seconds=1)
    wait_until(lambda: num_replicas() == 0, seconds=60, what="no replica")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    assert client.completions.create(model="tiny", prompt="the quick", max_tokens=3).choices


@pytest.mark.slow
def test_a_new_version_goes_live_under_load_and_no_answer_is_lost(
    url: str, served_dir: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(served_dir, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    changed = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if "embed" in name
        else tensor
        for name, tensor in weights.items()
    }
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    run_model(served_dir)
    with Clients(url, ASKED, num_clients=4).asking() as clients:
        wait_until(lambda: clients.num_answers > 8, seconds=60, what="answers of the old one")
        run_model(other)
        wait_until(lambda: num_replicas() == 1, seconds=120, what="the old replica is gone")
        seen = clients.num_answers
        wait_until(lambda: clients.num_answers > seen + 8, seconds=60, what="the new one's answers")
    assert not clients.failures
    # Nothing between the two: no answer was begun by one and ended by the other.
    assert len(clients.texts) == 2


def test_what_is_too_much_is_refused_and_the_rest_is_answered(url: str, served_dir: Path) -> None:
    run_model(served_dir, slots=2, waiting=2)
    with Clients(url, ASKED, num_clients=16).asking() as clients:
        wait_until(lambda: clients.num_answers > 30, seconds=60, what="answers under overload")
    assert clients.failures
    for failure in clients.failures:
        assert isinstance(failure, openai.RateLimitError)
        assert int(failure.response.headers["Retry-After"]) >= 1
    assert len(clients.texts) == 1


@pytest.mark.slow  # Replicas have to start under load: a minute.
def test_requests_that_wait_when_a_replica_is_added_are_answered_before_later_ones(
    url: str, served_dir: Path
) -> None:
    run_model(served_dir, max=2, slots=1, waiting=256, target_ongoing=1, upscale_seconds=0.5)
    # They stay in the queue of the only replica that there is when they arrive.
    asked = {**ASKED, "n": 6}
    with Clients(url, asked, num_clients=40, num_requests=1).asking() as early:
        wait_until(lambda: num_running() == 2, seconds=120, what="a second replica")
        assert early.num_answers < 40, "too fast: none of them waits"
        # These keep both replicas busy, the first one too, and must not overtake.
        with Clients(url, ASKED, num_clients=8).asking() as late:
            wait_until(lambda: early.num_answers == 40, seconds=300, what="the early answers")
    assert not early.failures
    assert not late.failures
    assert late.num_answers > 0


@pytest.mark.slow
def test_a_file_that_names_no_host_is_refused_without_keys(served_dir: Path) -> None:
    # Ray's default for files is 0.0.0.0.
    from ray.serve._private.api import serve_start

    schema = ServeDeploySchema.model_validate(
        {
            "http_options": {"port": free_port()},
            "applications": [
                {
                    "name": "llm",
                    "import_path": "serve.app:app",
                    "args": {"model_dir": str(served_dir)},
                }
            ],
        }
    )
    client: Any = serve_start(
        http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location
    )
    try:
        client.deploy_apps(schema, _blocking=False)

        def status() -> ApplicationStatus:
            apps = serve.status().applications
            return apps["llm"].status if "llm" in apps else ApplicationStatus.NOT_STARTED

        wait_until(lambda: status() == ApplicationStatus.DEPLOY_FAILED, seconds=120, what="refused")
        assert "keys_file: not set, but the proxy listens on 0.0.0.0" in (
            serve.status().applications["llm"].message
        )
    finally:
        serve.shutdown()
