"""Compute alone of a pack: K runs on one base against the same runs one after another, no Ray.

    python benchmarks/pack_throughput.py [--shape demo|tiny|8b] [--device cpu|cuda] [--slots 1 2 4]
        [--joint | --no-joint]

Weights are random. Every run has a LoRA adapter of rank 8 on all seven projections, dropout 0.05,
AdamW and clipping, and reads random tokens. Reported are input tokens per second of all runs
together, the memory of the device if it is a GPU, and the ratio to the same number of runs trained
one after another on a base of their own; on CPUs a ratio near 1 is expected.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.config.settings import from_dict
from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.model.llama import DTYPES, SummedLoss
from raytune_llama.model.lora import attach_adapter
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.pack.engine import SlotEngine
from raytune_llama.train.pack.pack import compute_round
from raytune_llama.train.pack.shared_model import SharedModel
from raytune_llama.train.pack.slot import Slot
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.result import RunResult

WARMUP_STEPS = 2
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2000},
    "demo": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 7,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def make_config(options: argparse.Namespace) -> PretrainConfig:
    """Return the settings of a run; of its paths nothing is read."""
    return from_dict(
        PretrainConfig,
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"sources": [{"path": "unused"}], "store_dir": "unused"},
            "lora": {"rank": 8, "dropout": 0.05},
            "engine": {
                "precision": options.precision,
                "strategy": "ddp",
                "gradient_checkpointing": options.checkpointing,
            },
            "max_steps": 1,
        },
    )


def make_model(options: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """Return the base with random weights, on the device."""
    shape: dict[str, Any] = {**SHAPES[options.shape], "max_position_embeddings": 2048}
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[options.precision])
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    return model


def batches(options: argparse.Namespace, seed: int) -> Iterator[MicroBatch]:
    """Yield micro-batches of random tokens, all of which but the last are targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (options.sequences, options.tokens)
    positions = torch.arange(options.tokens).expand(shape).contiguous()
    while True:
        ids = torch.randint(SHAPES[options.shape]["vocab_size"], shape, generator=generator)
        labels = torch.cat([ids[:, 1:], torch.full((shape[0], 1), -100)], dim=1)
        yield MicroBatch(ids, labels, positions)


def take_steps(
    engine: DataParallelEngine, options: argparse.Namespace, seed: int, steps: int
) -> None:
    """Take optimizer steps of one micro-batch each."""
    targets = options.sequences * (options.tokens - 1)
    source = batches(options, seed)
    for step in range(steps):
        engine.train_step([next(source)], [step], targets, 1e-4)


def time_pack(options: argparse.Namespace, workers: ProcessGroup, num_slots: int) -> float:
    """Return the seconds of a step of all runs in a pack."""
    config = make_config(options)
    assert config.lora is not None
    shared = SharedModel(
        make_model(options, workers.device),
        options.precision,
        workers.device,
        gradient_checkpointing=options.checkpointing,
        joint=options.joint,
    )
    lora = config.lora

    def run(slot: Slot) -> RunResult:
        module = SummedLoss(attach_adapter(shared.new_copy(), lora, seed=0))
        engine = SlotEngine(module, config, workers, slot)
        # One more than is timed: the last hand-in is never computed.
        take_steps(engine, options, seed=0, steps=WARMUP_STEPS + options.steps + 1)
        return RunResult("finished", options.steps)

    slots = [Slot(number, run) for number in range(num_slots)]
    for slot in slots:
        slot.start()
    for _ in range(WARMUP_STEPS):
        compute_round(shared, slots)
    start = now(workers.device)
    for _ in range(options.steps):
        compute_round(shared, slots)
    seconds = (now(workers.device) - start) / options.steps
    for slot in slots:
        slot.leave()
    return seconds


def time_alone(options: argparse.Namespace, workers: ProcessGroup) -> float:
    """Return the seconds of a step of one run on a base of its own."""
    config = make_config(options)
    assert config.lora is not None
    model = make_model(options, workers.device)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = SummedLoss(attach_adapter(model, config.lora, seed=0))
    engine = DataParallelEngine(module, options.precision, config.optim, workers)
    take_steps(engine, options, seed=0, steps=WARMUP_STEPS)
    start = now(workers.device)
    take_steps(engine, options, seed=1, steps=options.steps)
    return (now(workers.device) - start) / options.steps


def now(device: torch.device) -> float:
    """Return the time once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_gib(device: torch.device) -> str:
    """Return the peak memory of a GPU since the last call, in words; empty on a CPU."""
    if device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return f", {peak:.2f} GiB"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=DTYPES)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--joint", action=argparse.BooleanOptionalAction)
    options = parser.parse_args()
    device = torch.device(options.device)
    options.precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    workers = ProcessGroup.single_process(device)
    tokens = options.sequences * options.tokens
    print(f"{Path(__file__).name}: {vars(options)}, {torch.get_num_threads()} threads", flush=True)
    alone = time_alone(options, workers)
    print(f"alone: {tokens / alone:,.0f} tokens/s{peak_gib(device)}", flush=True)
    for number in options.slots:
        seconds = time_pack(options, workers, number)
        print(
            f"{number} in a pack: {number * tokens / seconds:,.0f} tokens/s, "
            f"{number * alone / seconds:.2f} of one after another{peak_gib(device)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
