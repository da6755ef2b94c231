"""LoRA adapters while serving: our engine against vLLM's, both called directly in one process.

    python benchmarks/serve_adapters.py [--rounds 3] [--cpus N] [--tokens 24]

16 clients ask the demo's model in fp32 for answers of the same length, greedily: of the base, of
one adapter of rank 8 on all linear layers, and of four such adapters, four clients each. The sides
take turns. vLLM runs where it is installed: `make test-vllm` makes an environment of its own for
it, `.vllm-venv`, whose Python has both.

Prints tokens/s of each case, ours against vLLM's, and what adapters cost each side.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from harness.endpoint import DEMO_MODEL
from harness.serve_direct import send_request
from harness.serve_material import make_prompts, write_random_adapter

from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from raytune_llama.serve.engine.choice import find_vllm

CLIENTS = 16
LENGTHS = (40, 60, 80, 100)
"""Tokens of the prompts."""

CASES: dict[str, tuple[str, ...]] = {
    "base": ("",),
    "one adapter": (":a0",),
    "four adapters": (":a0", ":a1", ":a2", ":a3"),
}
"""What is appended to the name of the model, in turn."""

NEEDS = """needs: the demo's model (`make demo`), 5 GB of memory; vLLM for the comparison.
takes: about 5 minutes on two quiet cores."""


def load(engine: str, adapters: Path, options: argparse.Namespace) -> LoadedModel:
    """Load the demo's model into this process, with an engine of this name."""
    model = ServedModelConfig(
        path=str(DEMO_MODEL),
        name=engine,
        precision="fp32",
        adapters_dir=str(adapters),
        max_adapters=4,
        max_adapter_rank=8,
    )
    replicas = ReplicaConfig(engine=engine, slots=CLIENTS, waiting=CLIENTS, cpus=options.cpus)  # type: ignore[arg-type]
    return LoadedModel(model, ServeConfig(models=(model,), replicas=replicas))


async def ask_all(
    model: LoadedModel, name: str, prompts: Sequence[str], num_tokens: int, suffixes: Sequence[str]
) -> float:
    """Let all clients ask at once; return the tokens per second of all together."""
    bodies = [
        {
            "model": name + suffixes[number % len(suffixes)],
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
        }
        for number, prompt in enumerate(prompts)
    ]
    start = time.perf_counter()
    results = await asyncio.gather(*(send_request(model, body) for body in bodies))
    return sum(result.num_tokens for result in results) / (time.perf_counter() - start)


async def measure(
    models: Mapping[str, LoadedModel], prompts: Sequence[str], options: argparse.Namespace
) -> dict[tuple[str, str], list[float]]:
    """Return the tokens per second of each side in each case, round by round."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds + 1):
        for case, suffixes in CASES.items():
            for name, model in models.items():
                speed = await ask_all(model, name, prompts, options.tokens, suffixes)
                if number:  # the first round loads adapters and warms up
                    speeds.setdefault((name, case), []).append(speed)
    return speeds


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="threads a side")
    parser.add_argument("--tokens", type=int, default=24, help="new ones of an answer")
    options = parser.parse_args()
    prompts = [prompt.text for prompt in make_prompts(DEMO_MODEL, CLIENTS, LENGTHS)]
    engines = ["transformers", *(["vllm"] if find_vllm() else [])]
    with tempfile.TemporaryDirectory() as name:
        adapters = Path(name)
        for seed in range(4):
            write_random_adapter(DEMO_MODEL, adapters / f"a{seed}", seed=seed)
        with asyncio.Runner() as loop:
            models = {engine: load(engine, adapters, options) for engine in engines}
            try:
                speeds = loop.run(measure(models, prompts, options))
            finally:
                for model in models.values():
                    model.close()
    print_speeds(speeds, engines, options)


def print_speeds(
    speeds: Mapping[tuple[str, str], Sequence[float]],
    engines: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Print each case's medians, and the ratios."""
    print(f"{CLIENTS} clients, {options.tokens} new tokens each, {options.cpus} threads a side")
    for case in CASES:
        middle = {engine: statistics.median(speeds[engine, case]) for engine in engines}
        parts = [
            f"{engine} {speed:.1f} tokens/s "
            f"({speed / statistics.median(speeds[engine, 'base']):.2f} of its base)"
            for engine, speed in middle.items()
        ]
        if "vllm" in middle:
            parts.append(f"{middle['transformers'] / middle['vllm']:.2f} times vLLM's")
        print(f"{case}: {'; '.join(parts)}")


if __name__ == "__main__":
    main()
