"""Replicas with vLLM follow the load, and go to none."""

from pathlib import Path

import openai
import pytest
from ray import serve

from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from tests.serve.many_clients import wait_until
from tests.serve.test_scaling import (
    FOLLOWING,
    check_replicas_follow_the_load,
    num_replicas,
    url,
)
from tests.serve.vllm.conftest import NEEDS_VLLM
from tests.serve.vllm.test_death import engine_processes

__all__ = ["url"]

pytestmark = [
    *NEEDS_VLLM,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("ray_cluster"),
]


def run_vllm(path: Path, replicas: ReplicaConfig) -> None:
    model = ServedModelConfig(path=str(path), name="tiny", template="belle")
    serve.run(build_app(ServeConfig(models=(model,), replicas=replicas)), name="llm")


def test_vllm_replicas_grow_and_shrink_with_the_load_and_no_answer_is_lost(
    url: str, contract_dir: Path
) -> None:
    others = {one.pid for one in engine_processes()}
    run_vllm(contract_dir, ReplicaConfig(engine="vllm", cpus=0.5, **FOLLOWING))
    check_replicas_follow_the_load(url, start_seconds=300, stop_seconds=300)
    # The process of the replica that has stopped is gone with it.
    assert len({one.pid for one in engine_processes()} - others) == 1


def test_vllm_replicas_go_to_none_and_a_request_brings_one_back(
    url: str, contract_dir: Path
) -> None:
    others = {one.pid for one in engine_processes()}
    replicas = ReplicaConfig(
        engine="vllm", cpus=0.5, min=0, upscale_seconds=0.5, downscale_seconds=1
    )
    run_vllm(contract_dir, replicas)
    wait_until(lambda: num_replicas() == 0, seconds=120, what="no replica")
    assert {one.pid for one in engine_processes()} <= others
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    assert client.completions.create(model="tiny", prompt="the quick", max_tokens=3).choices
