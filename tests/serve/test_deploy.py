"""`raytune serve`: an endpoint by one command, which ends in order."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest


@pytest.mark.slow  # A Ray cluster and a replica of its own: half a minute.
@pytest.mark.ray
def test_serve_answers_until_it_is_interrupted(served_dir: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    arguments = [f"model_dir={served_dir}", "models.0.template=belle", f"port={port}"]
    code = "from raytune_llama.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "serve", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    ) as served:
        assert served.stdout is not None
        line = served.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line
        url = f"http://127.0.0.1:{port}/v1/completions"
        asked = {"model": served_dir.name, "prompt": "the quick", "max_tokens": 3}
        deadline = time.monotonic() + 60
        while (answer := httpx2.post(url, json=asked, timeout=60)).status_code != 200:
            assert time.monotonic() < deadline, answer.text
            time.sleep(1)
        assert answer.json()["usage"]["completion_tokens"] <= 3
        served.send_signal(signal.SIGINT)
        assert served.wait(timeout=120) == 0
