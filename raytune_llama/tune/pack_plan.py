"""Whether trials can be packed, how many at a time, and what a sweep takes (`plan=true`)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from raytune_llama.config.settings import ConfigError
from raytune_llama.model.llama import build_empty_model
from raytune_llama.storage.directories import fetched
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.estimate.pack import PackMemory, plan_pack
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.pack.checks import check_packable, check_packable_model, check_shared
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.search import count_trials

logger = logging.getLogger(__name__)

PROCESS_BYTES = 2**30
"""Memory of a worker's process on a CPU apart from tensors: Python and its libraries."""

GPU_SHARE = 0.9
"""Share of a GPU's memory that tensors can use; the rest is the driver's and fragmentation."""

_SHOWN_SLOTS = (1, 2, 4, 8, 16)


def check_pack(configs: Sequence[AnyTrainConfig]) -> None:
    """Reject trials that cannot share one base in a pack.

    Raises:
        ConfigError: names the fields.
    """
    problems = {problem: None for config in configs for problem in check_packable(config)}
    found = [*problems, *check_shared(configs)]
    if not found:
        found = check_packable_model(build_empty_model(fetched(configs[0].model.path)))
    if found:
        raise ConfigError(found)


def choose_num_slots(
    sweep: SweepConfig,
    configs: Sequence[AnyTrainConfig],
    nodes: Sequence[Mapping[str, Any]],
    num_packs: int,
) -> int:
    """Return the number of trials per pack; `auto`: as many as fit, spread over all packs.

    Args:
        sweep: config of the sweep, with `pack`.
        configs: configs of its samples, with absolute paths.
        nodes: nodes of the cluster, as `ray.nodes()` lists them.
        num_packs: number of packs that the cluster can hold, over which trials are spread.
    """
    assert sweep.pack is not None
    if sweep.pack != "auto":
        return sweep.pack
    memory = plan_pack(configs)
    scale = configs[0].scale
    available = _gpu_bytes(scale) if scale.use_gpu else _cpu_bytes(scale, nodes)
    found = min(memory.count_slots(available), -(-count_trials(sweep) // num_packs))
    if memory.total(found) > available:
        logger.warning(
            "pack=auto: one trial may not fit into the memory of a worker; lower "
            "batch.micro_batch_sequences, or use nodes with more"
        )
    logger.info(
        "pack=auto: %d trials at a time, %.2f of %.2f GiB of a worker",
        found,
        memory.total(found) / 2**30,
        available / 2**30,
    )
    return found


def _cpu_bytes(scale: ScaleConfig, nodes: Sequence[Mapping[str, Any]]) -> float:
    """Return the memory that a node has per worker, at the node that has least."""
    needs = scale.worker_needs.shared()
    shares = [
        node["Resources"].get("memory", 0.0) / num_workers
        for node in nodes
        if (num_workers := needs.count_on(node))
    ]
    return min(shares, default=0.0) - PROCESS_BYTES


def _gpu_bytes(scale: ScaleConfig) -> float:
    """Return the memory of a worker's share of a GPU, on one of its nodes."""

    def total_bytes() -> int:
        import torch

        return torch.cuda.get_device_properties(0).total_memory

    task: Any = ray.remote(total_bytes).options(
        num_gpus=scale.gpus_per_worker,
        num_cpus=0,
        accelerator_type=scale.accelerator_type,
        label_selector=scale.label_selector or None,
    )
    found: int = ray.get(task.remote())
    return GPU_SHARE * scale.gpus_per_worker * found


def render_sweep_plan(sweep: SweepConfig, configs: Sequence[AnyTrainConfig]) -> str:
    """Return what a sweep will take, as text for a terminal.

    Args:
        sweep: config of the sweep.
        configs: configs of its samples, with absolute paths.
    """
    num_trials = count_trials(sweep)
    lines = [f"trials       {num_trials} of up to {sweep.max_steps:,} steps"]
    if sweep.pack is None:
        lines += [
            "starts       one group of workers per trial",
            "             with pack=K, K trials share one base and one start; plan=true pack=K "
            "shows their memory",
        ]
        return "\n".join(lines)
    return "\n".join([*lines, *_pack_lines(sweep, plan_pack(configs), num_trials, configs[0])])


def _pack_lines(
    sweep: SweepConfig, memory: PackMemory, num_trials: int, config: AnyTrainConfig
) -> Iterator[str]:
    device = "GPU" if config.scale.use_gpu else "CPU"
    yield f"starts       one group of workers per pack, instead of {num_trials}"
    counts = [*_SHOWN_SLOTS]
    if sweep.pack != "auto":
        assert sweep.pack is not None
        counts = sorted({*counts, sweep.pack})
    yield f"pack         {sweep.pack}; GiB of a worker on a {device}, {config.engine.precision}:"
    yield _row("trials at a time", [f"{n}{'*' if n == sweep.pack else ''}" for n in counts])
    yield _row("packed", [_gib(memory.total(n)) for n in counts])
    yield _row("each on its own", [_gib(n * memory.alone) for n in counts])
    yield _row("packed / own", [f"{memory.total(n) / (n * memory.alone):.2f}" for n in counts])
    yield (
        f"             the base {_gib(memory.shared)} once, {_gib(memory.slot)} for the largest "
        "trial; Python and its libraries, about 1 GiB per worker, are not counted"
    )


def _row(label: str, cells: Sequence[str]) -> str:
    return f"  {label:<20}" + "".join(f"{cell:>9}" for cell in cells)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.3f}"
