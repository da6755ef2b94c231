"""An endpoint with keys, as `raytune serve` starts it, for the clients' programs."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raytune_llama.serve.http.keys import append_hash, make_key
from raytune_llama.serve.proxy import find_free_ports
from tests.conftest import PROXY
from tests.serve.test_deploy import CODE, user_environment
from tests.serve.tiny_chat import write_tiny_chat

STOP_SECONDS = 120


@dataclass(frozen=True)
class RunningEndpoint:
    """What the programs are given."""

    url: str
    key: str
    model: str
    model_dir: str
    adapter: str


@pytest.fixture(scope="session")
def endpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> Iterator[RunningEndpoint]:
    folder = tmp_path_factory.mktemp("clients")
    config = write_tiny_chat(folder, tokenizer_dir)
    model, replicas = config.models[0], config.replicas
    key, line = make_key()
    append_hash(folder / "keys.txt", line, "clients")
    port = find_free_ports(1)[0]
    arguments = [
        f"model_dir={model.path}",
        f"models.0.adapters_dir={model.adapters_dir}",
        f"keys_file={folder / 'keys.txt'}",
        f"defaults.max_tokens={config.defaults.max_tokens}",
        f"defaults.temperature={config.defaults.temperature}",
        f"replicas.slots={replicas.slots}",
        f"replicas.waiting={replicas.waiting}",
        f"port={port}",
        f"proxy={PROXY}",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", CODE, "serve", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=user_environment(),
    ) as served:
        assert served.stdout is not None
        line = served.stdout.readline()
        url = f"http://127.0.0.1:{port}/v1"
        assert url in line, f"the endpoint did not start: {line}"
        yield RunningEndpoint(url, key, model.served_name, model.path, f"{model.served_name}:poet")
        served.send_signal(signal.SIGINT)
        assert served.wait(timeout=STOP_SECONDS) == 0
