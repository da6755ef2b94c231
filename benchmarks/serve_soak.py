"""The endpoint under half its load for an hour: memory, threads, open files and latency over time.

    python benchmarks/serve_soak.py [--minutes 60] [--cpus N] [--proxy python] [--quick]

The demo's model in fp32 on the CPU, one replica behind HAProxy (or Ray Serve's own proxy) on
loopback. A closed loop of 16 clients finds the capacity for a mix of requests: completions and
chats, streamed and whole, clients that disconnect while their answer is running, and invalid
requests (`harness/serve_mix.py`). Then an open loop sends the mix at half of that, at times drawn
from a seed. Every 10 s the resident memory, threads and open files of each process of the endpoint
are read; a table of them is printed every 5 minutes. At the end: the slope of each process's
resident memory by least squares, after the first 10 minutes (the first sixth, if that is less), and
the time to the first token in the first and in the last fifth of the time.

Exit status 1: a request was neither answered nor refused as it should be, or a process of the
endpoint was replaced. A refusal for load (429) is no failure; a 503 is one.
"""

import argparse
import asyncio
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from harness.endpoint import DEMO_MODEL, serve_config, serve_endpoint
from harness.processes import (
    CLIENT,
    OTHERS,
    EndpointProcess,
    ProcessUsage,
    find_processes,
    read_usage,
)
from harness.serve_driver import RequestResult, closed_loop, percentile, poisson_arrivals
from harness.serve_material import make_prompts
from harness.serve_mix import KINDS, REFUSED, MixedClient, RequestKind

LOAD = 0.5
CAPACITY_CLIENTS = 16
SAMPLE_SECONDS, TABLE_SECONDS = 10.0, 300.0
WARM_SECONDS, WARM_SHARE = 600.0, 1 / 6
REQUEST_SECONDS = 300.0
NEEDS = """needs: the demo's model (`make demo`); 3 GB of memory.
takes: the minutes given and about 3 more, an hour by default; --quick about 3 minutes."""


@dataclass
class SoakRecord:
    """What came of the requests, and what the processes held meanwhile."""

    start: float
    """On the clock of `time.perf_counter`."""

    processes: dict[int, EndpointProcess]
    """Processes of the endpoint before the first request, by their ids."""

    samples: dict[int, list[tuple[float, ProcessUsage]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Seconds since the start and usage, by process id."""

    statuses: dict[RequestKind, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """Number of requests of each kind by status."""

    first_tokens: list[tuple[float, float]] = field(default_factory=list)
    """Of streamed answers: seconds from the start to the request, and to its first token."""

    failures: list[str] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)
    """Names of processes that ended or were added."""

    def add(self, kind: RequestKind, outcome: RequestResult) -> None:
        """Record a request."""
        self.statuses[kind][outcome.status] += 1
        if outcome.status not in {kind.expected, *REFUSED}:
            self.failures.append(f"{kind.name}: {outcome.status or 'no status'}: {outcome.error}")
        # An answer may have no text: the end of text was its first token.
        elif kind.is_streamed and not math.isnan(outcome.first_token):
            self.first_tokens.append((outcome.started - self.start, outcome.first_token))

    def sample(self) -> None:
        """Read what each process holds."""
        now = time.perf_counter() - self.start
        found = endpoint_processes()
        for pid in found.keys() ^ self.processes.keys():
            self.replaced.add(f"{(found | self.processes)[pid].name} {pid}")
        for pid in found.keys() & self.processes.keys():
            usage = read_usage(pid)
            if usage is not None:
                self.samples[pid].append((now, usage))


def endpoint_processes() -> dict[int, EndpointProcess]:
    """Return the running processes of the endpoint by their ids, without Ray's own."""
    found = find_processes()
    return {one.pid: one for one in found if one.part not in {CLIENT, OTHERS}}


def print_usage(record: SoakRecord) -> None:
    """Print the last sample of each process, and the requests so far."""
    total = sum((Counter(one) for one in record.statuses.values()), Counter[int]())
    by_status = ", ".join(f"{status or 'none'}: {n}" for status, n in sorted(total.items()))
    minutes = (time.perf_counter() - record.start) / 60
    print(f"{minutes:.1f} minutes, requests by status: {by_status}; {len(record.failures)} failed")
    for pid, process in record.processes.items():
        if not record.samples[pid]:
            continue
        usage = record.samples[pid][-1][1]
        print(
            f"  {process.name:<18}{usage.rss_mib:>9.1f} MiB{usage.num_threads:>6} threads"
            f"{usage.num_files:>6} files"
        )
    sys.stdout.flush()


async def watch(record: SoakRecord) -> None:
    """Sample every 10 s, print every 5 minutes; until it is cancelled."""
    next_table = record.start + TABLE_SECONDS
    while True:
        # In a thread: reading must not delay the client.
        await asyncio.to_thread(record.sample)
        if time.perf_counter() >= next_table:
            print_usage(record)
            next_table += TABLE_SECONDS
        await asyncio.sleep(SAMPLE_SECONDS)


async def send_all(client: MixedClient, record: SoakRecord, arrivals: Sequence[float]) -> None:
    """Send a request at each of the times, and await all answers."""

    async def one(number: int) -> None:
        record.add(client.kind_of(number), await client.ask(number))

    async with asyncio.TaskGroup() as group:
        for number, when in enumerate(arrivals):
            await asyncio.sleep(record.start + when - time.perf_counter())
            group.create_task(one(number))


def slope_per_hour(samples: Sequence[tuple[float, ProcessUsage]], warm_seconds: float) -> float:
    """Return the growth of resident memory in MiB per hour, by least squares.

    Args:
        samples: seconds and usage.
        warm_seconds: seconds at the beginning that are left out.
    """
    kept = [(seconds, usage.rss_mib) for seconds, usage in samples if seconds >= warm_seconds]
    if len(kept) < 2:
        return math.nan
    times, sizes = np.array(kept).T
    return float(np.polyfit(times, sizes, 1)[0]) * 3600


def print_growth(record: SoakRecord, warm_seconds: float) -> None:
    """Print how each process changed after it was warm."""
    print(
        f"\n{f'after the first {warm_seconds / 60:.1f} min':<26}{'MiB, first and last':>21}", end=""
    )
    print(f"{'MiB per hour':>14}{'threads':>14}{'files':>14}")
    for pid, process in record.processes.items():
        warm = [usage for seconds, usage in record.samples[pid] if seconds >= warm_seconds]
        if not warm:
            continue
        first, last = warm[0], warm[-1]
        slope = slope_per_hour(record.samples[pid], warm_seconds)
        print(
            f"{f'{process.name} ({pid})':<26}{first.rss_mib:>12.1f}{last.rss_mib:>9.1f}"
            f"{slope:>+14.2f}{f'{first.num_threads}, {last.num_threads}':>14}"
            f"{f'{first.num_files}, {last.num_files}':>14}"
        )


def print_latency(record: SoakRecord, seconds: float) -> None:
    """Print the time to the first token at the beginning and at the end."""
    for name, low, high in (("first", 0.0, 0.2), ("last", 0.8, 1.0)):
        times = [token for when, token in record.first_tokens if low <= when / seconds <= high]
        print(
            f"first token in the {name} fifth: p50 {percentile(times, 50) * 1000:.0f} ms, "
            f"p99 {percentile(times, 99) * 1000:.0f} ms ({len(times)} streamed answers)"
        )


def print_statuses(statuses: Mapping[RequestKind, Counter[int]]) -> None:
    """Print the number of requests of each kind by status."""
    for kind in KINDS:
        counts = ", ".join(f"{status or 'none'}: {n}" for status, n in statuses[kind].items())
        print(f"{kind.name:<26}expected {kind.expected}; {counts or 'none was sent'}")


async def run(url: str, options: argparse.Namespace) -> int:
    """Ask; return 1 where a request failed or a process was replaced."""
    prompts = make_prompts(options.model, 32, (8, 12, 16, 24))
    seconds = options.minutes * 60
    async with MixedClient(
        url, prompts, num_new=options.tokens, seed=options.seed, seconds=REQUEST_SECONDS
    ) as client:
        number = CAPACITY_CLIENTS * options.requests
        await closed_loop(client.ask, num_clients=CAPACITY_CLIENTS, num_requests=CAPACITY_CLIENTS)
        load = await closed_loop(client.ask, num_clients=CAPACITY_CLIENTS, num_requests=number)
        rate = LOAD * number / load.seconds
        print(
            f"capacity {number / load.seconds:.2f} requests/s; {rate:.2f} requests/s for "
            f"{options.minutes:g} minutes",
            flush=True,
        )
        record = SoakRecord(time.perf_counter(), endpoint_processes())
        watching = asyncio.create_task(watch(record))
        await send_all(client, record, poisson_arrivals(rate, seconds, options.seed))
        if watching.done():
            watching.result()  # raises what has ended it
        watching.cancel()
    record.sample()
    print_usage(record)
    print_growth(record, min(WARM_SECONDS, WARM_SHARE * seconds))
    print_latency(record, seconds)
    print_statuses(record.statuses)
    print(f"neither answered nor refused as expected: {len(record.failures)}")
    for failure in record.failures[:5]:
        print(f"  {failure}")
    print(f"processes replaced: {', '.join(sorted(record.replaced)) or 'none'}")
    return int(bool(record.failures or record.replaced))


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=10, help="of each client for the capacity")
    parser.add_argument("--tokens", type=int, default=24, help="new ones of a request")
    parser.add_argument("--cpus", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--proxy", choices=["haproxy", "python"], default="haproxy")
    parser.add_argument("--seed", type=int, default=7, help="of the arrivals and of the mix")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--quick", action="store_true", help="try out; the figures mean little")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.requests, options.tokens = 1.0, 2, 8
    print(
        f"{options.cpus} torch threads, {os.cpu_count()} cores, {options.tokens} new tokens a "
        f"request, {options.proxy} proxy; done in about {options.minutes + 3:g} minutes",
        flush=True,
    )
    config = serve_config(options.model, cpus=options.cpus, slots=16, waiting=64)
    with serve_endpoint(config, proxy=options.proxy) as url:
        return asyncio.run(run(url, options))


if __name__ == "__main__":
    sys.exit(main())
