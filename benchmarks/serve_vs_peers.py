"""Serving against vLLM, `transformers serve`, llama.cpp's server, serial and batched generation.

    python benchmarks/serve_vs_peers.py [--rounds 3] [--cpus N] [--quick]

One model in fp32, as `jobs/merge.py` makes it for each side: the demo's with a small random
adapter, as a Hugging Face directory and as a GGUF file. 16 clients ask for 24 new tokens each,
greedily. Nobody is told to go on behind the end of a text: the prompts are stretches of this
repository's licence whose answers have no end within 24 tokens, as transformers says before the
rounds begin. Ours runs behind HAProxy on Ray Serve, and the loaded model is also called directly.
Each server is warmed up by one request a client; the reference by a shorter answer. Exit status 1:
ours does not say what transformers says.
"""

import argparse
import asyncio
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.endpoint import DEMO_MODEL
from harness.material import SEED, write_json
from harness.peers import PACKAGES, PROGRAMS
from harness.serve_driver import LoadResult, percentile
from harness.serve_material import (
    Prompt,
    generate,
    load_reference,
    make_prompts,
    write_random_adapter,
)
from harness.serve_peers import (
    INSTALL_LLAMA_CPP,
    INSTALL_TRANSFORMERS,
    INSTALL_VLLM,
    VLLM_PYTHON,
    has_llama_cpp,
    has_transformers_serve,
    has_vllm_serve,
    llama_cpp_bodies,
    llama_cpp_serve,
    transformers_bodies,
    transformers_serve,
    vllm_serve,
)
from harness.serve_sides import (
    build_request_bodies,
    refuse_failures,
    run_direct,
    run_json,
    run_load_level,
    run_served,
    thread_environment,
)

from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.tokenizer.loader import load_tokenizer

CLIENTS = 16
LENGTHS = (8, 12, 16, 24)
SERIAL, STATIC = "transformers, serial", "transformers, static batch"
OURS, ENGINE = "ours, HAProxy and Ray Serve", "ours, called directly"
CB, LLAMA_CPP = "transformers serve, continuous batching", "llama.cpp's server"
VLLM, OVER_VLLM = "vllm serve", "ours, with vLLM as engine"
TARGETS = {SERIAL: 3.5, STATIC: 0.93, CB: 1.0}
VLLM_TARGET = 0.95
"""Least throughput of our endpoint with vLLM as engine, in units of `vllm serve`'s."""
NEEDS = f"""needs: the demo's model (`make demo`); 3 GB of memory, 2 GB on the disk.
  transformers serve: {INSTALL_TRANSFORMERS}
  llama.cpp's server: {INSTALL_LLAMA_CPP}
  vllm serve: {INSTALL_VLLM}
takes: about 5 minutes a round on two quiet cores; --quick about 5 minutes in all."""


@dataclass(frozen=True)
class PeerMeasurement:
    """One side in one round."""

    tokens_per_second: float
    texts: list[str]
    """Answer to each prompt."""

    load: LoadResult | None = None
    """None: no server."""


@dataclass(frozen=True)
class PeerBenchmark:
    """What all sides share."""

    folder: Path
    model: Path
    gguf: Path
    prompts: list[Prompt]
    num_new: int
    num_requests: int
    cpus: int
    llama_site: Path

    def run_reference(self) -> dict[str, PeerMeasurement]:
        """Run transformers without a server, both ways in one process."""
        settings = {
            "model": str(self.model),
            "prompts": [prompt.ids for prompt in self.prompts],
            "num_new": self.num_new,
        }
        file = write_json(self.folder / "reference.json", settings)
        command = [sys.executable, str(PROGRAMS / "serve_reference.py"), str(file)]
        told = run_json(command, thread_environment(self.cpus))
        tokenizer = load_tokenizer(self.model)
        num_tokens = len(self.prompts) * self.num_new
        return {
            name: PeerMeasurement(
                num_tokens / told[way]["seconds"],
                [str(tokenizer.decode(ids)) for ids in told[way]["ids"]],
            )
            for name, way in ((SERIAL, "serial"), (STATIC, "static"))
        }

    def run_ours(self) -> dict[str, PeerMeasurement]:
        """Ask our endpoint."""
        run = run_served(
            self.folder, self.model, self._ours, self._levels, cpus=self.cpus, slots=CLIENTS
        )
        return {OURS: self._run_of(OURS, run.loads[0])}

    def run_engine(self) -> dict[str, PeerMeasurement]:
        """Call the loaded model in one process, without HTTP."""
        loads = run_direct(
            self.folder, self.model, self._ours, self._levels, cpus=self.cpus, slots=CLIENTS
        )
        return {ENGINE: self._run_of(ENGINE, loads[0])}

    def run_transformers_serve(self) -> dict[str, PeerMeasurement]:
        """Ask `transformers serve`."""
        bodies = transformers_bodies(self.model, self.prompts, self.num_new)
        return {CB: self._ask(CB, transformers_serve(self.model, self.cpus), bodies)}

    def run_llama_cpp(self) -> dict[str, PeerMeasurement]:
        """Ask llama.cpp's server."""
        server = llama_cpp_serve(self.gguf, self.cpus, self.llama_site)
        bodies = llama_cpp_bodies(self.prompts, self.num_new)
        return {LLAMA_CPP: self._ask(LLAMA_CPP, server, bodies)}

    def run_vllm(self) -> dict[str, PeerMeasurement]:
        """Ask `vllm serve`, then our endpoint with vLLM as engine."""
        server = vllm_serve(self.model, self.cpus, slots=CLIENTS)
        theirs = self._ask(VLLM, server, self._ours)
        run = run_served(
            *(self.folder, self.model, self._ours, self._levels),
            cpus=self.cpus,
            slots=CLIENTS,
            vllm_python=VLLM_PYTHON,
        )
        return {VLLM: theirs, OVER_VLLM: self._run_of(OVER_VLLM, run.loads[0])}

    @property
    def _ours(self) -> list[dict[str, Any]]:
        return build_request_bodies(self.prompts, self.num_new)

    @property
    def _levels(self) -> list[tuple[int, int]]:
        return [(CLIENTS, self.num_requests)]

    def _ask(
        self, name: str, server: AbstractContextManager[str], bodies: list[dict[str, Any]]
    ) -> PeerMeasurement:
        with server as url:
            asked = run_load_level(
                f"{url}/completions", bodies, num_clients=CLIENTS, num_requests=self.num_requests
            )
            return self._run_of(name, asyncio.run(asked))

    def _run_of(self, name: str, load: LoadResult) -> PeerMeasurement:
        refuse_failures(name, [load])
        # Not every server counts; that all is there shows in the reason for the end.
        ended = {one.finish for one in load.outcomes}
        if ended != {"length"}:
            raise RuntimeError(f"{name}: answers ended by {ended}, wanted length alone")
        num_tokens = len(load.outcomes) * self.num_new
        texts = [one.text for one in load.outcomes[: len(self.prompts)]]
        return PeerMeasurement(num_tokens / load.seconds, texts, load)


def make_models(folder: Path, gguf_type: str) -> tuple[Path, Path]:
    """Merge a small random adapter into the demo's model, as directory and as GGUF file."""
    adapter = write_random_adapter(DEMO_MODEL, folder / "adapter", seed=SEED)
    made: list[Path] = []
    for form in (
        {"output_format": "huggingface"},
        {"output_format": "gguf", "gguf_type": gguf_type},
    ):
        target = folder / form["output_format"]
        fields: dict[str, Any] = {"base": str(DEMO_MODEL), "adapters": (str(adapter),), **form}
        merge_adapters(MergeConfig(target=str(target), **fields))
        made.append(target)
    return made[0], made[1] / f"model-{gguf_type}.gguf"


def choose_prompts(model: Path, num_new: int) -> list[Prompt]:
    """Return prompts whose greedy answers have no end of text."""
    candidates = make_prompts(model, 2 * CLIENTS, LENGTHS)
    reference, ends = load_reference(model), load_tokenizer(model).all_special_ids
    answers = generate(reference, [prompt.ids for prompt in candidates], num_new)
    kept = [
        prompt
        for prompt, ids in zip(candidates, answers, strict=True)
        if not set(ids).intersection(ends)
    ]
    if len(kept) < CLIENTS:
        raise RuntimeError(f"{len(kept)} prompts have no end in their answers, wanted {CLIENTS}")
    return kept[:CLIENTS]


def sides_of(
    bench: PeerBenchmark, left_out: Sequence[str]
) -> Iterator[Callable[[], dict[str, PeerMeasurement]]]:
    """Yield what runs each side; what is not installed is named and left out."""
    yield bench.run_reference
    yield bench.run_engine
    yield bench.run_ours
    for name, is_there, run, install in (
        (CB, has_transformers_serve(), bench.run_transformers_serve, INSTALL_TRANSFORMERS),
        (LLAMA_CPP, has_llama_cpp(bench.llama_site), bench.run_llama_cpp, INSTALL_LLAMA_CPP),
        (VLLM, has_vllm_serve(), bench.run_vllm, INSTALL_VLLM),
    ):
        if name in left_out:
            print(f"{name} is left out, as asked")
        elif is_there:
            yield run
        else:
            print(f"{name} is not installed here, and left out; to install it: {install}")


def print_table(measured: dict[str, list[PeerMeasurement]]) -> None:
    """Print each side's throughput, the ratios of ours to it, and which answers agree."""
    wanted = measured[SERIAL][0].texts
    print(f"\n{'':<41}{'tokens/s':>9}{'ours / it':>10}{'direct / it':>12}{'answers as serial':>19}")
    for name, runs in measured.items():
        speed = statistics.median(run.tokens_per_second for run in runs)
        ratios = [
            statistics.median(
                ours.tokens_per_second / run.tokens_per_second
                for ours, run in zip(measured[side], runs, strict=True)
            )
            for side in (OURS, ENGINE)
        ]
        same = sum(text == other for text, other in zip(runs[0].texts, wanted, strict=True))
        target = f"   target {TARGETS[name]}" if name in TARGETS else ""
        print(
            f"{name:<41}{speed:>9.1f}{ratios[0]:>10.2f}{ratios[1]:>12.2f}"
            f"{f'{same} of {len(wanted)}':>19}{target}"
        )
    if VLLM in measured:
        pairs = zip(measured[OVER_VLLM], measured[VLLM], strict=True)
        ratio = statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)
        print(f"{OVER_VLLM}: {ratio:.2f} of {VLLM}, target {VLLM_TARGET}")
    for name, runs in measured.items():
        load = runs[0].load
        if load is not None:
            cells = [
                f"{label} p50 {percentile(values, 50):.2f} s, p99 {percentile(values, 99):.2f} s"
                for label, values in (
                    ("first token", load.first_token_seconds),
                    ("request", load.request_seconds),
                )
            ]
            print(f"{name}, round 1: {'; '.join(cells)}")


def main() -> int:
    """Run the benchmark; return 1 where ours and transformers answer otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3, help="of each of the 16 clients")
    parser.add_argument("--tokens", type=int, default=24, help="new ones of a request")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="threads a side")
    parser.add_argument("--gguf-type", choices=["f32", "f16", "q8_0"], default="f32")
    parser.add_argument(
        "--llama-site", type=Path, default=PACKAGES, help="folder with llama-cpp-python[server]"
    )
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="PEER", help="by its name")
    parser.add_argument("--quick", action="store_true", help="try out; the figures mean little")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests, options.tokens = 1, 1, 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, gguf = make_models(folder, options.gguf_type)
        prompts = choose_prompts(model, options.tokens)
        gc.collect()
        num_requests = CLIENTS * options.requests
        bench = PeerBenchmark(
            *(folder, model, gguf, prompts, options.tokens, num_requests),
            cpus=options.cpus,
            llama_site=options.llama_site,
        )
        sides = list(sides_of(bench, options.leave_out))
        print(f"{options.cpus} threads a side, {os.cpu_count()} cores, {options.tokens} tokens")
        measured: dict[str, list[PeerMeasurement]] = {}
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                for key, run in side().items():
                    measured.setdefault(key, []).append(run)
                    speed = f"{run.tokens_per_second:.1f} tokens/s"
                    print(f"round {number + 1}: {key}: {speed}", flush=True)
    print_table(measured)
    wanted = measured[SERIAL][0].texts
    ours = [run.texts for side in (OURS, ENGINE) for run in measured[side]]
    return int(any(texts != wanted for texts in ours))


if __name__ == "__main__":
    sys.exit(main())
