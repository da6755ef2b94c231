"""What HTTP and Ray Serve cost: the endpoint against its replica called directly in one process.

    python benchmarks/serve_overhead.py [--rounds 3] [--cpus N] [--quick]

The same greedy requests, the demo's model in fp32, the same number of torch threads on both sides.
Throughput is that of 16 clients, the first token's time that of one client alone. Ray's cluster is
started for its own runs and stopped behind each, so that the direct side does not share the machine
with it. By default one core is left to what is not the model: where its threads take every core,
whatever else runs is taken from the model itself.
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness.endpoint import DEMO_MODEL
from harness.serve_driver import LoadResult, percentile
from harness.serve_material import make_prompts
from harness.serve_sides import (
    Levels,
    build_request_bodies,
    refuse_failures,
    run_direct,
    run_served,
)

TARGET_PERCENT, TARGET_MS = 5.0, 15.0
DIRECT, SERVED = "direct", "HTTP and Ray Serve"
CLIENTS = 16
NEEDS = """needs: the demo's model (`make demo`); 2 GB of memory a side, one at a time.
takes: about 3 minutes a round on two cores; --quick about 2 minutes in all."""


@dataclass(frozen=True)
class ServeMeasurement:
    """One side's figures of one round."""

    alone: LoadResult
    """One client."""

    crowd: LoadResult
    """All clients."""

    @property
    def first_ms(self) -> float:
        """Median time to the first token of one client."""
        return statistics.median(self.alone.first_token_seconds) * 1000

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


def print_cpu_seconds(taken: dict[str, float], load: LoadResult) -> None:
    """Print what each part of the endpoint computed for a token."""
    num_tokens = sum(one.num_tokens for one in load.answered)
    parts = sorted(taken.items(), key=lambda item: -item[1])
    cells = ", ".join(f"{part} {seconds / num_tokens * 1000:.2f}" for part, seconds in parts)
    print(f"  CPU milliseconds a token: {cells}", flush=True)


def main() -> int:
    """Run the benchmark; return 1 where the two sides' answers differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=6, help="of each of the 16 clients")
    parser.add_argument("--tokens", type=int, default=32, help="new ones of a request")
    parser.add_argument("--cpus", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--quick", action="store_true", help="try out; the figures mean little")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests, options.tokens = 1, 1, 8
    bodies = build_request_bodies(
        make_prompts(options.model, CLIENTS, (8, 12, 16, 24)), options.tokens
    )
    levels: Levels = [(1, CLIENTS), (CLIENTS, CLIENTS * options.requests)]
    print(f"{options.cpus} torch threads a side, {os.cpu_count()} cores, {options.tokens} tokens")
    measured: dict[str, list[ServeMeasurement]] = {DIRECT: [], SERVED: []}
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            for side in [DIRECT, SERVED] if number % 2 == 0 else [SERVED, DIRECT]:
                taken = []
                if side == DIRECT:
                    loads = run_direct(
                        Path(name), options.model, bodies, levels, cpus=options.cpus, slots=CLIENTS
                    )
                else:
                    loads, taken = run_served(
                        options.model, bodies, levels, cpus=options.cpus, slots=CLIENTS
                    )
                refuse_failures(side, loads)
                measured[side].append(ServeMeasurement(*loads))
                print(f"round {number + 1}: {measured[side][-1].describe(side)}", flush=True)
                if taken:
                    print_cpu_seconds(taken[1], loads[1])
    return print_result(measured)


def print_result(measured: dict[str, list[ServeMeasurement]]) -> int:
    """Print the differences, median over rounds; return 1 where answers differ."""
    pairs = list(zip(measured[DIRECT], measured[SERVED], strict=True))
    lost = [
        (1 - served.crowd.tokens_per_second / direct.crowd.tokens_per_second) * 100
        for direct, served in pairs
    ]
    more = [served.first_ms - direct.first_ms for direct, served in pairs]
    print(
        f"throughput lost at {CLIENTS} clients, median over rounds: {statistics.median(lost):+.2f} "
        f"% (rounds {', '.join(f'{one:+.1f}' for one in lost)}); target at most {TARGET_PERCENT}\n"
        f"more on the first token, median over rounds: {statistics.median(more):+.1f} ms (rounds "
        f"{', '.join(f'{one:+.1f}' for one in more)}); target at most {TARGET_MS} ms"
    )
    wanted = [one.text for one in measured[DIRECT][0].alone.outcomes]
    sides = [side for pair in pairs for side in pair]
    equal = all([one.text for one in side.alone.outcomes] == wanted for side in sides)
    print(f"answers of all runs: {'equal' if equal else 'NOT EQUAL'}")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
