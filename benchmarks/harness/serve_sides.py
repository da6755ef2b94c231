"""Runs one side of a benchmark of serving, and returns the load of each level of clients."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytune_llama.serve.config import ProxyChoice

from .endpoint import MODEL_NAME
from .material import write_json
from .serve_direct import DirectSettings
from .serve_driver import HttpClient, LoadResult, RequestResult, closed_loop
from .serve_material import Prompt
from .serve_served import ServedRun, ServedSettings

Levels = Sequence[tuple[int, int]]
"""Clients and requests of closed loops that run one after the other."""

_TAIL_CHARACTERS = 4000


def build_request_bodies(prompts: Sequence[Prompt], num_new: int) -> list[dict[str, Any]]:
    """Return our requests: greedy, ids in, counts told."""
    return [
        {
            "model": MODEL_NAME,
            "prompt": prompt.ids,
            "max_tokens": num_new,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for prompt in prompts
    ]


def thread_environment(cpus: int) -> dict[str, str]:
    """Return the environment of a process that computes with so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **dict.fromkeys(names, str(cpus))}


def run_json(command: list[str], environment: dict[str, str]) -> Any:  # noqa: ANN401
    """Run a program; return what its last line says.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-_TAIL_CHARACTERS:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def run_direct(
    folder: Path,
    model: Path,
    bodies: list[dict[str, Any]],
    levels: Levels,
    *,
    cpus: int,
    slots: int,
) -> list[LoadResult]:
    """Call the replica directly, in a process of its own that knows no cluster."""
    settings = DirectSettings(str(model), bodies, list(levels), cpus, slots)
    file = write_json(folder / "direct.json", asdict(settings))
    program = Path(__file__).with_name("serve_direct.py")
    told = run_json([sys.executable, str(program), str(file)], thread_environment(cpus))
    return [_load_of(load) for load in told]


def run_served(
    folder: Path,
    model: Path,
    bodies: list[dict[str, Any]],
    levels: Levels,
    *,
    cpus: int,
    slots: int,
    proxy: ProxyChoice = "haproxy",
    num_models: int = 1,
    vllm_python: Path | None = None,
) -> ServedRun:
    """Ask over HTTP, on a cluster for these levels alone, in a process of its own.

    Args:
        folder: for the settings of that process.
        model: a model directory.
        bodies: requests.
        levels: closed loops.
        cpus: threads of a model.
        slots: requests answered at a time.
        proxy: the proxy in front of the replica.
        num_models: 2: the model under two names; the gateway forwards the requests to one.
        vllm_python: Python of an environment with vLLM, which is the engine then; None: ours is.
    """
    settings = ServedSettings(
        *(str(model), bodies, list(levels), cpus, slots, proxy, num_models),
        engine="vllm" if vllm_python else "transformers",
    )
    file = write_json(folder / "served.json", asdict(settings))
    program = Path(__file__).with_name("serve_served.py")
    python = str(vllm_python or sys.executable)
    told = run_json([python, str(program), str(file)], dict(os.environ))
    return ServedRun(
        [_load_of(load) for load in told["loads"]], told["cpu_seconds"], told["idle_cpu"]
    )


def _load_of(told: dict[str, Any]) -> LoadResult:
    return LoadResult([RequestResult(**one) for one in told["outcomes"]], told["seconds"])


async def run_load_level(
    url: str, bodies: list[dict[str, Any]], *, num_clients: int, num_requests: int
) -> LoadResult:
    """Warm a server up with one request a client, then measure one closed loop."""
    async with HttpClient(url, bodies) as client:
        await closed_loop(client.ask, num_clients=num_clients, num_requests=num_clients)
        return await closed_loop(client.ask, num_clients=num_clients, num_requests=num_requests)


def refuse_failures(side: str, loads: Sequence[LoadResult]) -> None:
    """Refuse figures of which a part is missing.

    Raises:
        RuntimeError: a request was not answered whole.
    """
    bad = [one for load in loads for one in load.outcomes if one.status != 200]
    if bad:
        raise RuntimeError(
            f"{side}: {len(bad)} requests failed, as with {bad[0].status} {bad[0].error}"
        )
