"""One worker of a run, in a process of its own that measures its memory: a program.

    python -m tests.train.estimate.memory_probe CONFIG.yaml RANK NUM_WORKERS RENDEZVOUS_FILE

Prints the bytes that were resident more than before the model was loaded: once the engine is
built, and at most in three steps. Each tensor is mapped and unmapped by itself, so that what is
resident is what is live.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.config.settings import load, write_yaml
from raytune_llama.data.batches.step_batches import BatchPlan, MicroBatch
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.llama import SummedLoss
from raytune_llama.model.lora import attach_adapter
from raytune_llama.model.quantized_layers import quantize_base
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.build import build_engine
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.engines.deepspeed_zero import DeepSpeedEngine
from raytune_llama.train.engines.fsdp import FullyShardedEngine
from raytune_llama.train.engines.protocol import TrainEngine
from raytune_llama.train.process_group import ProcessGroup

ROOT = Path(__file__).parents[3]
NUM_STEPS = 3


def measure(config: PretrainConfig, folder: Path) -> list[dict[str, int]]:
    """Run the workers of a config; return what each of them printed."""
    folder.mkdir()
    file = folder / "config.yaml"
    write_yaml(config, file)
    count = config.scale.max_workers
    environment = {
        **os.environ,
        # Every tensor of this size is a mapping of its own.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.train.estimate.memory_probe",
                *(str(file), str(rank), str(count), str(folder / "rendezvous")),
            ],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [worker.communicate(timeout=500) for worker in workers]
    assert not any(worker.returncode for worker in workers), outputs[0][1][-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def resident(field: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def build_batches(config: PretrainConfig, count: int) -> list[MicroBatch]:
    """Return micro-batches of random ids; every row holds two documents."""
    shape = (config.batch.micro_batch_sequences, config.batch.sequence_tokens)
    half = config.batch.sequence_tokens // 2
    positions = (torch.arange(shape[1]) % half).expand(shape).contiguous()
    return [
        MicroBatch(torch.randint(0, 400, shape), torch.randint(0, 400, shape), positions)
        for _ in range(count)
    ]


def warm_up(config: PretrainConfig, batch: MicroBatch, workers: ProcessGroup) -> None:
    """Train a tiny model for a step: libraries and kernels take memory at their first use."""
    tiny = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(tiny)
    if config.model.quantization is not None:
        quantize_base(model, config.model.quantization, (), workers.device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    module = SummedLoss(attach_adapter(model, LoraConfig(), seed=1))
    engine: TrainEngine
    if config.engine.strategy == "ddp":
        engine = DataParallelEngine(module, config.engine.precision, config.optim, workers)
    elif config.engine.strategy == "fsdp":
        engine = FullyShardedEngine(module, config.engine, config.optim, workers)
    else:
        engine = DeepSpeedEngine(
            module,
            config.engine,
            config.optim,
            workers,
            micro_batch_sequences=1,
            num_micro_batches=1,
        )
    tensors = (batch.ids_BT, batch.labels_BT, batch.positions_BT)
    for _ in range(2):
        engine.train_step([MicroBatch(*(each[:1, :16] for each in tensors))], [0], 1.0, 1e-4)


def main() -> None:
    file, rank, num_workers, rendezvous = sys.argv[1:]
    config = load(PretrainConfig, [file])
    os.environ["LOCAL_RANK"] = rank
    torch.set_num_threads(1)
    workers = ProcessGroup.single_process()
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(num_workers)
    )
    if int(num_workers) > 1:
        workers = ProcessGroup.from_torch(torch.device("cpu"))
    plan = BatchPlan.create(
        [1000],
        sequence_tokens=config.batch.sequence_tokens,
        sequences_per_step=config.batch.sequences_per_step,
        micro_batch_sequences=config.batch.micro_batch_sequences,
        seed=1,
        max_steps=NUM_STEPS,
    )
    count = plan.num_micro_batches(int(num_workers))
    batches = build_batches(config, count)
    warm_up(config, batches[0], workers)
    workers.barrier()
    gc.collect()
    before = resident("VmRSS")
    engine = build_engine(config, plan, workers)
    gc.collect()
    built = resident("VmRSS")
    # "5" sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(NUM_STEPS):
        engine.train_step(batches, list(range(count)), 1000.0, 1e-4)
    found = {"built": built - before, "peak": resident("VmHWM") - before}
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
