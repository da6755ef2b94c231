"""What HTTP and Ray Serve cost: the endpoint against its loaded model called directly.

    python benchmarks/serve_overhead.py [--rounds 3] [--cpus N] [--gateway] [--quick]

The same greedy requests, the demo's model in fp32, the same number of torch threads on all sides:
direct in one process without HTTP, behind HAProxy, behind Ray Serve's own proxy in Python and, with
`--gateway`, as one of two models behind HAProxy and the gateway. Throughput is that of 16 clients,
the time to the first token that of one client alone. Sides take turns, every other round in the
other order; each has the machine to itself. By default one core is left to what is not the model:
where its threads take every core, whatever else runs is taken from the model itself.

CPU per token is that of 16 clients, per part: HAProxy; Ray Serve's proxy (behind HAProxy, the
process that configures it and the Python proxy in reserve); the gateways; the replica. A replica is
divided by threads. The benchmark has Python threads bear their names in the system, so its engine
is the thread `engine` and the OpenMP workers that this thread starts, which inherit its name. All
its other threads are outside: HTTP, the application, tokenization, and Ray's own. The target is for
the sum of the parts between client and engine, of which nothing is subtracted; Ray's controller and
the other processes (dashboard, raylet, a second model without requests) are not on a request's path
and are printed beside it. Health checks and reports take CPU time without any requests too: it is
printed per second, and the sum once more less that. The slower the model, the larger is its share
per token.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.endpoint import DEMO_MODEL
from harness.processes import PARTS, PATH_PARTS
from harness.serve_driver import LoadResult, percentile
from harness.serve_material import make_prompts
from harness.serve_sides import (
    Levels,
    build_request_bodies,
    refuse_failures,
    run_direct,
    run_served,
)

from raytune_llama.serve.config import ProxyChoice

TARGET_RATIO, TARGET_MS, TARGET_CPU_MS = 0.95, 5.0, 0.3
DIRECT, HAPROXY, PYTHON, GATEWAY = "direct", "HAProxy", "Python proxy", "HAProxy and gateway"
SERVED: dict[str, tuple[ProxyChoice, int]] = {
    HAPROXY: ("haproxy", 1),
    PYTHON: ("python", 1),
    GATEWAY: ("haproxy", 2),
}
"""Proxy and number of models of each served side."""

CLIENTS = 16
NEEDS = """needs: the demo's model (`make demo`); 2 GB of memory, 3 GB with --gateway.
takes: about 6 minutes a round on two quiet cores, 8 with --gateway; --quick about 5 in all."""


@dataclass(frozen=True)
class ServeMeasurement:
    """One side's figures of one round."""

    alone: LoadResult
    """One client."""

    crowd: LoadResult
    """All clients."""

    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """With all clients, by part of the endpoint."""

    idle_cpu: dict[str, float] = field(default_factory=dict)
    """CPU seconds per second without requests, by part."""

    @property
    def first_ms(self) -> float:
        """Median time to the first token of one client."""
        return statistics.median(self.alone.first_token_seconds) * 1000

    def cpu_ms(self, *parts: str) -> float:
        """CPU milliseconds of some parts per token."""
        num_tokens = sum(one.num_tokens for one in self.crowd.answered)
        return sum(self.cpu_seconds.get(part, 0.0) for part in parts) / num_tokens * 1000

    def cpu_ms_beyond_idle(self, *parts: str) -> float:
        """CPU milliseconds of some parts per token, less what they take without requests."""
        num_tokens = sum(one.num_tokens for one in self.crowd.answered)
        return self.cpu_ms(*parts) - self.idle_ms(*parts) * self.crowd.seconds / num_tokens

    def idle_ms(self, *parts: str) -> float:
        """CPU milliseconds of some parts per second without requests."""
        return sum(self.idle_cpu.get(part, 0.0) for part in parts) * 1000

    def describe(self, name: str) -> str:
        """Return one line."""
        crowd = self.crowd
        return (
            f"{name}: {crowd.tokens_per_second:.2f} tokens/s at {CLIENTS} clients (first token p50 "
            f"{percentile(crowd.first_token_seconds, 50) * 1000:.0f} ms, a token p50 "
            f"{percentile(crowd.per_token_seconds, 50) * 1000:.1f} ms), alone: first token "
            f"{self.first_ms:.1f} ms, a token "
            f"{statistics.median(self.alone.per_token_seconds) * 1000:.2f} ms"
        )


Measured = dict[str, list[ServeMeasurement]]
"""The rounds of each side."""


def measure(
    side: str, folder: Path, options: argparse.Namespace, bodies: list[dict[str, Any]]
) -> ServeMeasurement:
    """Run one side once."""
    levels: Levels = [(1, CLIENTS), (CLIENTS, CLIENTS * options.requests)]
    if side == DIRECT:
        loads = run_direct(folder, options.model, bodies, levels, cpus=options.cpus, slots=CLIENTS)
        refuse_failures(side, loads)
        alone, crowd = loads
        return ServeMeasurement(alone, crowd)
    proxy, num_models = SERVED[side]
    run = run_served(
        *(folder, options.model, bodies, levels),
        cpus=options.cpus,
        slots=CLIENTS,
        proxy=proxy,
        num_models=num_models,
    )
    refuse_failures(side, run.loads)
    alone, crowd = run.loads
    return ServeMeasurement(alone, crowd, run.cpu_seconds[1], run.idle_cpu)


def print_speed(measured: Measured) -> None:
    """Print throughput and first token of each side, median over rounds."""
    print(
        f"\n{'median over rounds':<20}{'tokens/s':>9}{'of direct':>11}{'first token':>13}"
        f"{'more':>9}   rounds: of direct; more ms on the first token"
    )
    for side, runs in measured.items():
        pairs = list(zip(measured[DIRECT], runs, strict=True))
        ratios = [one.crowd.tokens_per_second / d.crowd.tokens_per_second for d, one in pairs]
        more = [one.first_ms - direct.first_ms for direct, one in pairs]
        speed = statistics.median(one.crowd.tokens_per_second for one in runs)
        first = statistics.median(one.first_ms for one in runs)
        rounds = "; ".join((", ".join(f"{one:.3f}" for one in ratios), _listed(more)))
        print(
            f"{side:<20}{speed:>9.2f}{statistics.median(ratios):>11.3f}{first:>10.1f} ms"
            f"{statistics.median(more):>6.1f} ms   {rounds}"
        )
    print(f"target: at least {TARGET_RATIO} of direct, at most {TARGET_MS:g} ms more")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{one:+.1f}" for one in values)


def print_cpu(measured: Measured) -> None:
    """Print the CPU time of each part, median over rounds."""
    served = {side: runs for side, runs in measured.items() if side != DIRECT}

    def print_row(name: str, value: Callable[[ServeMeasurement], float], note: str = "") -> None:
        cells = [f"{statistics.median(map(value, runs)):>21.3f}" for runs in served.values()]
        print(f"{name:<34}{''.join(cells)}{note}")

    print(f"\n{'CPU milliseconds per token':<34}{''.join(f'{side:>21}' for side in served)}")
    for part in PARTS:
        print_row(f"  {part}", lambda one, part=part: one.cpu_ms(part))
    print_row(
        "between client and engine",
        lambda one: one.cpu_ms(*PATH_PARTS),
        f"   target at most {TARGET_CPU_MS}",
    )
    print_row("  less what it takes anyway", lambda one: one.cpu_ms_beyond_idle(*PATH_PARTS))
    print("CPU milliseconds per second without requests")
    print_row("  between client and engine", lambda one: one.idle_ms(*PATH_PARTS))
    for part in PARTS:
        print_row(f"  {part}", lambda one, part=part: one.idle_ms(part))


def print_result(measured: Measured) -> int:
    """Print all figures; return 1 where answers differ."""
    print_speed(measured)
    print_cpu(measured)
    wanted = [one.text for one in measured[DIRECT][0].alone.outcomes]
    equal = all(
        [one.text for one in run.alone.outcomes] == wanted
        for runs in measured.values()
        for run in runs
    )
    print(f"answers of all runs: {'equal' if equal else 'NOT EQUAL'}")
    return int(not equal)


def main() -> int:
    """Run the benchmark; return 1 where the sides' answers differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=6, help="of each of the 16 clients")
    parser.add_argument("--tokens", type=int, default=32, help="new ones of a request")
    parser.add_argument("--cpus", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--gateway", action="store_true", help="also two models and the gateway")
    parser.add_argument("--quick", action="store_true", help="try out; the figures mean little")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests, options.tokens = 1, 1, 8
    bodies = build_request_bodies(
        make_prompts(options.model, CLIENTS, (8, 12, 16, 24)), options.tokens
    )
    print(f"{options.cpus} torch threads a side, {os.cpu_count()} cores, {options.tokens} tokens")
    sides = [DIRECT, HAPROXY, PYTHON, *([GATEWAY] if options.gateway else [])]
    measured: Measured = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                run = measure(side, Path(name), options, bodies)
                measured[side].append(run)
                print(f"round {number + 1}: {run.describe(side)}", flush=True)
    return print_result(measured)


if __name__ == "__main__":
    sys.exit(main())
