"""The loaded model called directly in one process, as a replica's HTTP application does: no Ray.

    python benchmarks/harness/serve_direct.py SETTINGS.json

Prints a JSON list with the load of each level of clients.
"""

import asyncio
import json
import math
import sys
import time
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__:
    from .endpoint import serve_config
    from .serve_driver import LoadResult, RequestResult, closed_loop
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from harness.endpoint import serve_config
    from harness.serve_driver import LoadResult, RequestResult, closed_loop

from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.protocol.completions import CompletionRequest


@dataclass(frozen=True)
class DirectSettings:
    """What is asked."""

    model: str
    bodies: list[dict[str, Any]]
    levels: list[tuple[int, int]]
    """Clients and requests of each closed loop, one after the other."""

    cpus: int
    slots: int


async def send_request(model: LoadedModel, body: dict[str, Any]) -> RequestResult:
    """Ask as the HTTP application does."""
    outcome = RequestResult(started=time.perf_counter())
    async with aclosing(await model.respond(CompletionRequest.model_validate(body))) as stream:
        async for delta in stream.deltas:
            outcome.num_tokens += delta.num_tokens
            if delta.text:
                outcome.last_token = time.perf_counter() - outcome.started
                if math.isnan(outcome.first_token):
                    outcome.first_token = outcome.last_token
            outcome.text += delta.text
            outcome.finish = delta.finish_reason or outcome.finish
    outcome.status, outcome.seconds = 200, time.perf_counter() - outcome.started
    return outcome


async def run(settings: DirectSettings) -> list[LoadResult]:
    """Load the model, warm up with one request a slot, and run the levels."""
    config = serve_config(
        Path(settings.model), cpus=settings.cpus, slots=settings.slots, waiting=10**6
    )
    model = LoadedModel(config.models[0], config)
    bodies = settings.bodies

    async def one(number: int) -> RequestResult:
        return await send_request(model, bodies[number % len(bodies)])

    await closed_loop(one, num_clients=settings.slots, num_requests=settings.slots)
    return [
        await closed_loop(one, num_clients=clients, num_requests=requests)
        for clients, requests in settings.levels
    ]


def main() -> None:
    """Run with the settings of the file."""
    settings = DirectSettings(**json.loads(Path(sys.argv[1]).read_text()))
    loads = asyncio.run(run(settings))
    print(json.dumps([asdict(load) for load in loads]))


if __name__ == "__main__":
    main()
