"""`raytune serve`: an endpoint by one command, which ends in order; `raytune serve-env`."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.deploy import environment_lines
from raytune_llama.serve.proxy import BINARY_VARIABLE, HAPROXY_SWITCH, WRAPPER, find_free_ports
from tests.conftest import PROXY

CODE = "from raytune_llama.cli import main; main()"


def user_environment() -> dict[str, str]:
    """The environment without the tests' own choice of ports, which is for their cluster."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_SERVE_")}


def run_raytune(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=user_environment()
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model_dir=nowhere"], "models.0.path: nowhere does not exist"),
        (["model_dir={served_dir}", "port={taken}"], "port: 127.0.0.1:{taken} can't be listened"),
        (["model_dir={served_dir}", "host=0.0.0.0"], "keys_file: not set, but host is 0.0.0.0"),
        (["model_dir={served_dir}", "keys_file=none.txt"], "keys_file: none.txt can't be read"),
        (["model_dir={served_dir}", "prot=1"], "prot: no such field; did you mean port"),
    ],
)
def test_mistake_is_one_line_before_ray_is_started(
    served_dir: Path, arguments: list[str], told: str
) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        known = {"served_dir": served_dir, "taken": one.getsockname()[1]}
        done = run_raytune("serve", *(text.format(**known) for text in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith(told.format(**known))
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_environment_of_a_cluster_is_printed_for_a_shell_to_read() -> None:
    lines = environment_lines(RequestLimits())
    script = "; ".join([*lines, f'echo "${HAPROXY_SWITCH} ${BINARY_VARIABLE}"'])
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert shlex.split(shown) == ["1", str(WRAPPER)]


@pytest.mark.slow  # A Ray cluster and replicas of its own: a minute.
@pytest.mark.ray
def test_mistake_that_replicas_find_is_told_by_its_reason_alone(
    served_dir: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(served_dir, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = run_raytune("serve", f"model_dir={damaged}", f"port={find_free_ports(1)[0]}")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("path: ")
    assert "model.safetensors" in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # A Ray cluster and a replica of its own: half a minute.
@pytest.mark.ray
def test_serve_answers_until_it_is_interrupted(served_dir: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    arguments = [f"model_dir={served_dir}", "models.0.template=belle", f"port={port}"]
    with subprocess.Popen(
        [sys.executable, "-c", CODE, "serve", *arguments, f"proxy={PROXY}"],
        stdout=subprocess.PIPE,
        text=True,
        env=user_environment(),
    ) as served:
        assert served.stdout is not None
        line = served.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line
        url = f"http://127.0.0.1:{port}/v1/completions"
        asked = {"model": served_dir.name, "prompt": "the quick", "max_tokens": 3}
        answer = httpx2.post(url, json=asked, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] <= 3
        served.send_signal(signal.SIGINT)
        assert served.wait(timeout=120) == 0
