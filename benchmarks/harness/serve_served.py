"""The endpoint asked over HTTP in a process of its own, which also starts it on a Ray cluster.

    python benchmarks/harness/serve_served.py SETTINGS.json

Ray Serve reads the choice of its proxy when it is imported, so a process serves behind one proxy.
Prints a JSON object: the load of each level of clients, and the CPU time that each part of the
endpoint took meanwhile.
"""

import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

if __package__:
    from .endpoint import serve_config, serve_endpoint
    from .processes import read_cpu_seconds
    from .serve_driver import HttpClient, LoadResult, closed_loop
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from harness.endpoint import serve_config, serve_endpoint
    from harness.processes import read_cpu_seconds
    from harness.serve_driver import HttpClient, LoadResult, closed_loop

from raytune_llama.serve.config import ProxyChoice

IDLE_SECONDS = 10.0
"""Seconds without requests in which the parts' CPU time is measured."""


@dataclass(frozen=True)
class ServedSettings:
    """What is asked, and how it is served."""

    model: str
    bodies: list[dict[str, Any]]
    levels: list[tuple[int, int]]
    """Clients and requests of each closed loop, one after the other."""

    cpus: int
    slots: int
    proxy: ProxyChoice
    num_models: int
    """2: with the gateway, which is asked at `/`; 1: without."""

    engine: Literal["transformers", "vllm"] = "transformers"


@dataclass
class ServedRun:
    """What came of it."""

    loads: list[LoadResult]
    """Of each level."""

    cpu_seconds: list[dict[str, float]]
    """CPU seconds of each level, by part of the endpoint."""

    idle_cpu: dict[str, float]
    """CPU seconds per second without requests, by part."""


async def run(url: str, settings: ServedSettings) -> ServedRun:
    """Warm up with one request a slot, wait without requests, and run the levels."""
    run = ServedRun([], [], {})
    slots = settings.slots
    async with HttpClient(url, settings.bodies) as client:
        await closed_loop(client.ask, num_clients=slots, num_requests=slots)
        before = read_cpu_seconds()
        await asyncio.sleep(IDLE_SECONDS)
        run.idle_cpu = {
            part: seconds / IDLE_SECONDS for part, seconds in _seconds_since(before).items()
        }
        for clients, requests in settings.levels:
            before = read_cpu_seconds()
            load = await closed_loop(client.ask, num_clients=clients, num_requests=requests)
            run.loads.append(load)
            run.cpu_seconds.append(_seconds_since(before))
    return run


def _seconds_since(before: dict[str, float]) -> dict[str, float]:
    # Less than before: a process has ended.
    return {
        part: max(0.0, seconds - before.get(part, 0.0))
        for part, seconds in read_cpu_seconds().items()
    }


def main() -> None:
    """Run with the settings of the file."""
    settings = ServedSettings(**json.loads(Path(sys.argv[1]).read_text()))
    config = serve_config(
        Path(settings.model),
        cpus=settings.cpus,
        slots=settings.slots,
        waiting=10**6,
        num_models=settings.num_models,
        engine=settings.engine,
    )
    with serve_endpoint(config, proxy=settings.proxy) as url:
        told = asyncio.run(run(f"{url}/completions", settings))
    print(json.dumps(asdict(told)))


if __name__ == "__main__":
    main()
