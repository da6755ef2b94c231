"""vLLM's own process is killed in an endpoint: clients that ask again are answered."""

import os
import signal
import threading
from collections import Counter
from pathlib import Path

import openai
import psutil
import pytest
from ray import serve

from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from tests.serve.many_clients import wait_until
from tests.serve.test_kills import pids
from tests.serve.test_scaling import url
from tests.serve.vllm.conftest import NEEDS_VLLM

__all__ = ["url"]

pytestmark = [
    *NEEDS_VLLM,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("ray_cluster"),
]

REPLICA = "ServeReplica:llm:model"


def test_replica_of_a_killed_engine_is_replaced_and_its_requests_are_answered(
    url: str, contract_dir: Path
) -> None:
    model = ServedModelConfig(path=str(contract_dir), name="tiny", template="belle")
    replicas = ReplicaConfig(engine="vllm", slots=2, cpus=0.5)
    serve.run(build_app(ServeConfig(models=(model,), replicas=replicas)), name="llm")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=100, timeout=600)
    texts: Counter[str] = Counter()

    def ask() -> str:
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=3000, temperature=0, logit_bias={"1": -100}
        )
        return answer.choices[0].text

    wanted = ask()
    (before,) = pids(REPLICA)
    # By its parent: vLLM names its processes only where it can.
    (engine,) = [
        child
        for child in psutil.Process(before).children()
        if not any("resource_tracker" in part for part in child.cmdline())
    ]
    # Two run, and four wait.
    threads = [threading.Thread(target=lambda: texts.update([ask()])) for _ in range(6)]
    for thread in threads:
        thread.start()
    threads[0].join(timeout=1.0)
    assert not texts, "none is answered yet"
    os.kill(engine.pid, signal.SIGKILL)
    wait_until(
        lambda: (now := pids(REPLICA)) != [] and before not in now,
        seconds=600,
        what="another replica",
    )
    for thread in threads:
        thread.join(timeout=600)
    assert texts == Counter({wanted: 6})
    assert not engine.is_running()
