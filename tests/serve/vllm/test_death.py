"""vLLM's own process is killed: its replica says so, so that it is replaced."""

import os
import signal
import threading
import time
from pathlib import Path

import openai
import psutil
import pytest

from tests.serve.http.test_routes import Server
from tests.serve.vllm.conftest import NEEDS_VLLM, close, load

pytestmark = NEEDS_VLLM


def engine_processes() -> list[psutil.Process]:
    """Return the processes of vLLM's engines below this one."""
    return [
        one
        for one in psutil.Process().children(recursive=True)
        if one.name().startswith("VLLM::EngineCor")
    ]


def test_killed_engine_ends_its_requests_and_its_health(contract_dir: Path) -> None:
    before = {one.pid for one in engine_processes()}
    loaded = load(contract_dir, "vllm", num_slots=2)
    server = Server({"vllm": loaded})
    client = server.client().with_options(max_retries=0, timeout=120)
    caught: list[Exception] = []

    def ask() -> None:
        try:
            client.completions.create(
                model="vllm", prompt="x", max_tokens=4000, logit_bias={"1": -100}
            )
        except openai.APIStatusError as error:
            caught.append(error)

    try:
        client.completions.create(model="vllm", prompt="x", max_tokens=1)
        (engine,) = [one for one in engine_processes() if one.pid not in before]
        # Two run, and two wait.
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        os.kill(engine.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(timeout=60)
        assert [type(error) for error in caught] == [openai.InternalServerError] * 4
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="vllm", prompt="x", max_tokens=1)
        assert (
            client._client.get(str(client.base_url).replace("/v1/", "/health")).status_code == 503
        )
    finally:
        close(server, {"vllm": loaded})
