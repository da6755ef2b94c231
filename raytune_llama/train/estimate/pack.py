"""Estimates the memory of a pack: one base, and what each run adds to it."""

from collections.abc import Sequence
from typing import NamedTuple

from raytune_llama.model.llama import DTYPES, build_empty_model
from raytune_llama.model.vocab import check_vocabulary, num_embedding_rows
from raytune_llama.storage.directories import fetched
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.estimate.memory import WorkerMemory, count_parameters
from raytune_llama.train.estimate.plan import build_model, plan_workers

MAX_MEASURED = 8
"""Largest number of unlike runs whose memory is estimated, the largest first."""

_TABLE_BOUND = 10**7
"""What a trained embedding table counts for when runs are sorted by size: more than all else."""


class PackMemory(NamedTuple):
    """Bytes that a pack's worker holds on its device."""

    shared: int
    """Bytes held once: the base's weights."""

    slot: int
    """Bytes that the largest run adds: its adapter with moments, gradients, activations and loss;
    on a CPU also the copy that a checkpoint is written from."""

    alone: int
    """Bytes that a worker of the largest run holds without a pack, counted alike."""

    def total(self, num_slots: int) -> int:
        """Return the bytes with so many runs."""
        return self.shared + num_slots * self.slot

    def count_slots(self, num_bytes: float) -> int:
        """Return the largest number of runs that fit into memory, at least 1."""
        return max(1, int((num_bytes - self.shared) // self.slot))


def plan_pack(configs: Sequence[AnyTrainConfig]) -> PackMemory:
    """Estimate the memory of a pack from the runs that it may hold, which share one base.

    Activations of all runs are held at once, since they have one backward pass.

    Args:
        configs: the runs, with absolute paths.
    """
    unlike = {_sizes(config): config for config in configs}
    largest = sorted(unlike.items(), key=lambda item: _bound(item[1]), reverse=True)[:MAX_MEASURED]
    path = fetched(configs[0].model.path)
    num_rows = num_embedding_rows(build_empty_model(path))
    fit = check_vocabulary(num_rows, path, fetched(configs[0].model.tokenizer_path))
    num_rows = max(fit.num_rows, fit.num_ids)
    found = [_plan_run(config, num_rows) for _, config in largest]
    return PackMemory(*(max(sizes) for sizes in zip(*found, strict=True)))


def _sizes(config: AnyTrainConfig) -> str:
    """Return what the memory of a run depends on, apart from its base."""
    assert config.lora is not None
    lora = config.lora
    return repr((lora.rank, lora.targets, lora.modules_to_save, config.batch))


def _bound(config: AnyTrainConfig) -> float:
    """Return a number that grows with a run's memory."""
    assert config.lora is not None
    tokens = config.batch.micro_batch_sequences * config.batch.sequence_tokens
    num_tables = len(config.lora.modules_to_save)
    return tokens + config.lora.rank * len(config.lora.targets) + _TABLE_BOUND * num_tables


def _plan_run(config: AnyTrainConfig, num_rows: int) -> PackMemory:
    empty = build_empty_model(fetched(config.model.path), num_rows=num_rows)
    model = build_model(config, empty)
    counts = count_parameters(model)
    frozen = DTYPES[config.engine.precision].itemsize * (counts.resident - counts.trained)
    plan = plan_workers(config, model, config.scale.min_workers)
    memory: WorkerMemory = next(each for each in plan.memory if each.layout == "ddp")
    peak = memory.peak
    if config.checkpoint.background and not config.scale.use_gpu:
        peak += counts.checkpoint_bytes
    return PackMemory(frozen, max(peak - frozen, 1), peak)
