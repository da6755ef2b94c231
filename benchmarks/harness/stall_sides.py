"""One process of `checkpoint_stall.py`: trains, and saves the same tensors in four ways."""

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import async_save
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.llama import SummedLoss
from raytune_llama.model.lora import attach_adapter
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.config import CheckpointConfig
from raytune_llama.train.checkpoint.layout import RunState, SaveResult
from raytune_llama.train.checkpoint.saver import Saver
from raytune_llama.train.engines.config import EngineConfig, OptimConfig
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.engines.deepspeed_zero import deepspeed_config
from raytune_llama.train.engines.optimizer import build_optimizer, parameter_groups
from raytune_llama.train.engines.protocol import STATE_KEYS, trained_parameters
from raytune_llama.train.process_group import ProcessGroup

OURS, TORCH, DEEPSPEED, DCP = "ours", "torch.save", "DeepSpeed save_checkpoint", "DCP async_save"
SIDES = (OURS, TORCH, DEEPSPEED, DCP)
NUM_BASELINE_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class StallSetup:
    """What is trained and saved."""

    trained: str
    """`lora` or `full`."""

    world_size: int
    threads: int
    """Of each process."""

    rounds: int
    folder: Path
    hidden: int = 768
    layers: int = 12
    vocabulary: int = 32_000
    sequence_tokens: int = 256


@dataclass(frozen=True)
class SaveMeasurement:
    """One save of one side, as the first process saw it."""

    side: str
    stall_seconds: float
    """Training stood still."""

    durable_seconds: float
    """From the beginning until all of it was flushed to the disk."""

    slowed_seconds: float
    """By how much the steps beside the writing took longer."""

    step_seconds: float
    """Of a step with nothing beside it."""

    num_bytes: int
    """Of the checkpoint."""


@dataclass
class _Save:
    """A save on its way."""

    is_done: Callable[[], bool]
    finish: Callable[[], float]
    """Wait for it; returns the seconds until it was durable, counted from its beginning."""


@dataclass
class _Log:
    """What `Saver` tells."""

    results: list[SaveResult] = field(default_factory=list)

    def saving(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def saved(self, result: SaveResult) -> None:
        self.results.append(result)


class _Bench:
    def __init__(self, rank: int, setup: StallSetup) -> None:
        self.setup = setup
        self.workers = ProcessGroup(rank, setup.world_size, torch.device("cpu"))
        torch.manual_seed(1)
        module = SummedLoss(_build_model(setup))
        self.engine = DataParallelEngine(module, "fp32", OptimConfig(), self.workers)
        self.deepspeed = self._build_deepspeed()
        self.folder = setup.folder / "checkpoints"
        self.log = _Log()
        self.saver = Saver(
            Place.local(self.folder),
            CheckpointConfig(keep_last=1),
            self.engine,
            self.workers,
            self.log,
        )
        # Its collectives are in a thread: a group of their own, as PyTorch advises.
        self.group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        self.num_saves = 0

    def _build_deepspeed(self) -> Any:  # noqa: ANN401  # the module is untyped
        import deepspeed

        deepspeed.init_distributed(dist_init_required=False)
        torch.manual_seed(1)
        module = SummedLoss(_build_model(self.setup))
        optim = OptimConfig()
        groups = parameter_groups(module.model, trained_parameters(module), optim)
        json = deepspeed_config(
            EngineConfig(precision="fp32", strategy="deepspeed", zero_stage=2),
            optim,
            micro_batch_sequences=1,
            num_micro_batches=1,
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(groups, optim),
            config=json,
            dist_init_required=False,
        )
        # One step, so that there are moments to save.
        engine.backward(engine(*_batch(self.setup)))
        engine.step()
        return engine

    def step(self) -> float:
        """Take an optimizer step; return its seconds."""
        started = time.perf_counter()
        ids_BT, positions_BT, labels_BT = _batch(self.setup)
        batch = MicroBatch(ids_BT, labels_BT, positions_BT)
        self.engine.train_step([batch], [0], float(labels_BT.numel()), 1e-4)
        return time.perf_counter() - started

    def tensors(self) -> dict[str, Tensor]:
        """Return what this process holds of the state: all sides but DeepSpeed's save it."""
        return {
            f"{part}/{each.name}/{each.start}": getattr(each, part)
            for each in self.engine.trainable_state()
            for part in STATE_KEYS
        }

    def start(self, side: str) -> _Save:
        """Begin to save; returns when training may go on."""
        self.num_saves += 1
        path = self.folder / f"{side.split(maxsplit=1)[0]}-{self.num_saves}"
        return {
            OURS: self._start_ours,
            TORCH: self._start_torch,
            DEEPSPEED: self._start_deepspeed,
            DCP: self._start_dcp,
        }[side](path)

    def _start_ours(self, path: Path) -> _Save:  # noqa: ARG002  # it has its own name
        step = self.num_saves
        self.saver.save(RunState(step=step))
        target = self.folder / "checkpoints" / f"step-{step:08d}"

        def finish() -> float:
            self.saver.finish()
            assert self.log.results[-1].problem is None
            return self.log.results[-1].write_seconds

        return _Save(target.exists, finish)

    def _start_torch(self, path: Path) -> _Save:
        started = time.perf_counter()
        path.mkdir(parents=True, exist_ok=True)
        torch.save(self.tensors(), path / f"{self.workers.rank}.pt")
        return _Save(lambda: True, lambda: _flushed(path, started))

    def _start_deepspeed(self, path: Path) -> _Save:
        started = time.perf_counter()
        self.deepspeed.save_checkpoint(str(path), exclude_frozen_parameters=True)
        return _Save(lambda: True, lambda: _flushed(path, started))

    def _start_dcp(self, path: Path) -> _Save:
        started = time.perf_counter()
        ended: list[float] = []
        future: Any = async_save(self.tensors(), checkpoint_id=path, process_group=self.group)
        future.add_done_callback(lambda _: ended.append(time.perf_counter() - started))

        def finish() -> float:
            future.result()
            return _flushed(path, started) if not ended else ended[0]

        return _Save(future.done, finish)

    def measure(self, side: str, quiet_seconds: float) -> SaveMeasurement:
        """Save once, and train beside it until it is written."""
        self.workers.barrier()
        started = time.perf_counter()
        save = self.start(side)
        stall = time.perf_counter() - started
        beside: list[float] = []
        while self.workers.all_reduce_sum([float(not save.is_done())])[0]:
            beside.append(self.step())
        waiting = time.perf_counter()
        durable = save.finish()
        if side in (OURS, DCP):
            stall += time.perf_counter() - waiting
        slowed = sum(beside) - len(beside) * quiet_seconds
        self.workers.barrier()
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        self.workers.barrier()
        if self.workers.is_rank_zero:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        self.workers.barrier()
        return SaveMeasurement(side, stall, durable, slowed, quiet_seconds, size)


def measure(rank: int, setup: StallSetup, results: Any) -> None:  # noqa: ANN401  # a queue
    """Run one process; the first puts its samples into the queue, a list for all rounds."""
    torch.set_num_threads(setup.threads)
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{setup.folder}/rendezvous",
        rank=rank,
        world_size=setup.world_size,
    )
    bench = _Bench(rank, setup)
    samples: list[SaveMeasurement] = []
    with bench.saver:
        bench.step()
        for number in range(setup.rounds + 1):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            for side in order:
                quiet = statistics.median(bench.step() for _ in range(NUM_BASELINE_STEPS))
                sample = bench.measure(side, quiet)
                # In the first round memory is allocated that is kept.
                samples += [sample] if number > 0 else []
    if rank == 0:
        results.put(samples)
    dist.destroy_process_group()


def _build_model(setup: StallSetup) -> Any:  # noqa: ANN401  # with or without adapter
    config = LlamaConfig(
        vocab_size=setup.vocabulary,
        hidden_size=setup.hidden,
        intermediate_size=setup.hidden * 8 // 3,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.hidden // 64,
        num_key_value_heads=setup.hidden // 64,
        max_position_embeddings=setup.sequence_tokens,
    )
    model = LlamaForCausalLM(config)
    return attach_adapter(model, LoraConfig(), seed=1) if setup.trained == "lora" else model


def _batch(setup: StallSetup) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(setup.vocabulary, (1, setup.sequence_tokens + 1), generator=generator)
    return ids[:, :-1], torch.arange(setup.sequence_tokens)[None], ids[:, 1:]


def _flushed(folder: Path, started: float) -> float:
    """Flush files that were only written; return the seconds since a save began."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - started
