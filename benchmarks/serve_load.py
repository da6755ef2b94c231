"""The endpoint under load: throughput and latency from one client to twice what it can do.

    python benchmarks/serve_load.py [--seconds 60] [--cpus N] [--proxy python] [--quick]

The demo's model in fp32 on the CPU, greedy streamed requests, one replica behind HAProxy (or Ray
Serve's own proxy) on loopback. A closed loop of 1 to 32 clients finds the capacity, the most
requests a second of any of them. Then an open loop sends at 0.5, 1 and 2 times the capacity, at
times drawn from a seed, whatever the endpoint answers. What waits is bounded (`--waiting`), so that
under overload some are refused with 429 or 503 and the others are answered about as fast as before:
a queue of as many as there are slots doubles the time of a request at most. Beside twice the
capacity stands the same figure at the capacity itself. Exit status 1: a request was neither
answered nor refused.

Whether the queue is fair is seen at twice the capacity, where nearly every request waits: in the
p99 of the time to the first token, in units of its median; and in pairs of requests that waited for
a slot at the same time: the share whose first tokens came in another order than they. Requests that
are admitted in one step get their first tokens together; such pairs are in the strict share, but
not in the one that ignores 10 ms.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.endpoint import DEMO_MODEL, serve_config, serve_endpoint
from harness.serve_driver import (
    HttpClient,
    LoadResult,
    closed_loop,
    find_queued,
    open_loop,
    percentile,
    poisson_arrivals,
    reordered_share,
)
from harness.serve_material import make_prompts
from harness.serve_sides import build_request_bodies

FACTORS = (0.5, 1.0, 2.0)
TARGET_WAITS = 2.0
TIE_SECONDS = 0.01
NEEDS = """needs: the demo's model (`make demo`); 3 GB of memory.
takes: about 10 minutes on two quiet cores; --quick about 2 minutes."""


def print_load(name: str, load: LoadResult) -> None:
    """Print one row of figures."""
    cells = [f"{load.tokens_per_second:>9.1f}{load.requests_per_second:>8.2f}"]
    for values, factor in (
        (load.first_token_seconds, 1000),
        (load.per_token_seconds, 1000),
        (load.request_seconds, 1),
    ):
        p50, p99 = (percentile(values, q) * factor for q in (50, 99))
        cells.append(f"{p50:>9.0f}{p99:>8.0f}" if factor > 1 else f"{p50:>9.2f}{p99:>8.2f}")
    statuses = ", ".join(f"{status or 'none'}: {n}" for status, n in load.statuses.items())
    print(f"{name:<12}{''.join(cells)}   {statuses}", flush=True)


def print_head() -> None:
    """Print the names of the columns."""
    print(
        f"{'':<12}{'tokens/s':>9}{'req/s':>8}{'first ms':>17}{'token ms':>17}{'request s':>17}\n"
        f"{'':<29}{'p50':>9}{'p99':>8}{'p50':>9}{'p99':>8}{'p50':>9}{'p99':>8}   by status"
    )


async def run_closed(client: HttpClient, clients: Sequence[int], each: int) -> list[LoadResult]:
    """Run the closed loops."""
    loads: list[LoadResult] = []
    for count in clients:
        load = await closed_loop(client.ask, num_clients=count, num_requests=count * each)
        loads.append(load)
        print_load(f"{count} clients", load)
    return loads


async def run_open(
    client: HttpClient, capacity: float, seconds: float, seed: int
) -> dict[float, LoadResult]:
    """Run the open loops."""
    loads: dict[float, LoadResult] = {}
    for factor in FACTORS:
        arrivals = poisson_arrivals(factor * capacity, seconds, seed)
        loads[factor] = await open_loop(client.ask, arrivals)
        print_load(f"{factor:g} x", loads[factor])
    return loads


def print_overload(loads: dict[float, LoadResult]) -> None:
    """Print what overload does to those that are answered, and to the others."""
    at, beyond = loads[1.0], loads[2.0]
    for name, part in (("request", "request_seconds"), ("first token", "first_token_seconds")):
        calm, busy = (percentile(getattr(load, part), 99) for load in (at, beyond))
        print(
            f"p99 of a {name} at 2 times the capacity: {busy:.2f} s, at the capacity {calm:.2f} s: "
            f"{busy / calm:.2f} times"
        )
    waits = sorted({one.retry_after for one in beyond.outcomes if one.retry_after})
    print(
        f"refused at 2 times the capacity: {beyond.refused_share:.1%}, at the capacity "
        f"{at.refused_share:.1%}; Retry-After: {', '.join(waits) or 'none was sent'}"
    )
    for status, error in sorted({(one.status, one.error) for one in beyond.outcomes if one.error}):
        print(f"  {status or 'no status'}: {error}")
    kept = beyond.tokens_per_second / at.tokens_per_second
    print(f"throughput at 2 times the capacity: {kept:.2f} of that at the capacity")


def print_fairness(load: LoadResult, num_slots: int) -> None:
    """Print how evenly and in which order the requests of an overloaded endpoint waited."""
    waits = load.first_token_seconds
    p50, p99 = (percentile(waits, percent) for percent in (50, 99))
    print(
        f"first token at 2 times the capacity: p99 {p99:.2f} s, median {p50:.2f} s: "
        f"{p99 / p50:.2f} median waits; target at most {TARGET_WAITS:g}"
    )
    queued = find_queued(load, num_slots)
    strict, tied = (reordered_share(queued, seconds) for seconds in (0.0, TIE_SECONDS))
    print(
        f"{len(queued)} of {len(load.answered)} answered requests waited for a slot; pairs that "
        f"waited at the same time, first tokens in another order than they came: {strict:.2%}, "
        f"by more than {TIE_SECONDS * 1000:g} ms: {tied:.2%}"
    )


async def run(url: str, options: argparse.Namespace) -> int:
    """Ask; return 1 where a request was neither answered nor refused for load."""
    prompts = make_prompts(options.model, 32, (8, 12, 16, 24))
    clients = (1, 4) if options.quick else (1, 2, 4, 8, 16, 32)
    async with HttpClient(
        f"{url}/completions", build_request_bodies(prompts, options.tokens)
    ) as client:
        await closed_loop(client.ask, num_clients=options.slots, num_requests=options.slots)
        print_head()
        closed = await run_closed(client, clients, options.requests)
        capacity = max(load.requests_per_second for load in closed)
        print(f"capacity: {capacity:.2f} requests/s; open loop, {options.seconds:g} s each:")
        opened = await run_open(client, capacity, options.seconds, options.seed)
    print_overload(opened)
    print_fairness(opened[2.0], options.slots)
    failed = [
        one
        for load in [*closed, *opened.values()]
        for one in load.outcomes
        if one.status not in {200, 429, 503}
    ]
    print(f"neither answered nor refused: {len(failed)}")
    for one in failed[:5]:
        print(f"  {one.status or 'no status'}: {one.error}")
    return int(bool(failed))


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each open loop")
    parser.add_argument("--requests", type=int, default=3, help="of each client in a closed loop")
    parser.add_argument("--tokens", type=int, default=24, help="new ones of a request")
    parser.add_argument("--slots", type=int, default=16, help="requests answered at a time")
    parser.add_argument("--waiting", type=int, default=16, help="requests that may wait")
    parser.add_argument(
        "--cpus",
        type=int,
        default=os.cpu_count() or 1,
        help="threads of the model; as many as cores by default",
    )
    parser.add_argument("--proxy", choices=["haproxy", "python"], default="haproxy")
    parser.add_argument("--seed", type=int, default=7, help="of the arrivals")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--quick", action="store_true", help="try out; the figures mean little")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.tokens, options.seconds = 2, 6, 15.0
        options.slots, options.waiting = 4, 2
    print(
        f"{options.cpus} torch threads, {os.cpu_count()} cores, {options.slots} slots, "
        f"{options.waiting} may wait, {options.tokens} new tokens a request, {options.proxy} proxy",
        flush=True,
    )
    config = serve_config(
        options.model, cpus=options.cpus, slots=options.slots, waiting=options.waiting
    )
    with serve_endpoint(config, proxy=options.proxy) as url:
        return asyncio.run(run(url, options))


if __name__ == "__main__":
    sys.exit(main())
