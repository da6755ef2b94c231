"""How each engine lays out weights, gradients and optimizer state, in bytes of a worker.

`ddp` is `engines/ddp.py`, `fsdp` is `torch/distributed/fsdp/_fully_shard` of PyTorch 2.13. For ZeRO
the names of methods are those of DeepSpeed 0.19.8, in `runtime/zero/stage_1_and_2.py` and
`stage3.py`, with the settings of `deepspeed_config`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from raytune_llama.model.llama import DTYPES, Precision, decoder_layers
from raytune_llama.train.engines.config import ShardingLayout
from raytune_llama.train.engines.ddp import BUCKET_NUMEL
from raytune_llama.train.engines.optimizer import OptimConfig, parameter_groups

FLOAT_BYTES = 4
DOUBLE_BYTES = 8

ZERO_DEFAULTS: Mapping[str, int] = {
    "reduce_bucket_size": 5 * 10**8,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_max_live_parameters": 10**9,
    "stage3_param_persistence_threshold": 10**5,
}
"""What DeepSpeed takes, in numbers, where `protocol.deepspeed` says nothing."""


def is_original(name: str) -> bool:
    """Whether a parameter is the frozen original that PEFT keeps beside a saved module."""
    return ".original_module." in name


@dataclass(frozen=True)
class QuantizedWeights:
    """What a quantised base saves and costs."""

    numel: int
    """Numbers of the weights that are quantised."""

    storage_bytes: int
    """That they take."""

    largest: int
    """Numbers of the largest, which is made whole while it is used."""


@dataclass(frozen=True)
class WorkerSettings:
    """What decides a worker's memory, beside the model."""

    precision: Precision
    """Of frozen weights and of computing."""

    optim: OptimConfig
    """Of the run: what the optimizer treats apart is cut apart."""

    num_workers: int
    """Of the run."""

    on_gpu: bool
    """Whether buffers are there in full. Of a buffer on a CPU only what is written to is."""

    num_micro_batches: int
    """Of a worker in a step."""

    offload_optimizer: bool
    """Keep masters and moments in host memory (ZeRO)."""

    offload_parameters: bool
    """Keep partitioned weights in host memory (ZeRO 3), with all that belongs to them (fsdp)."""

    zero: Mapping[str, Any]
    """DeepSpeed's settings of ZeRO that are not its defaults."""

    quantized: QuantizedWeights | None = None
    """Of the base; None where it is in the run's precision."""

    @property
    def element_bytes(self) -> int:
        """Bytes of a number in the run's precision."""
        return DTYPES[self.precision].itemsize

    def zero_size(self, name: str) -> int:
        """Return one of DeepSpeed's sizes, in numbers."""
        return int(self.zero.get(name, ZERO_DEFAULTS[name]))


@dataclass(frozen=True)
class MemoryScheme:
    """How an engine treats gradients. Sizes are bytes."""

    optimizer: int
    """Masters and moments."""

    gradients: int
    """That wait for the step."""

    step: int = 0
    """Beside them, while they are clipped and the optimizer steps."""

    gradients_stay: bool = False
    """Whether room for them is there all the time."""

    constant: int = 0
    """Buffers that are there all the time."""

    kept: int = 0
    """Of each number that waits for the end of the first backward pass."""

    kept_later: int = 0
    """The same in a later micro-batch, whose gradients are added to those before."""

    held: int = 0
    """Gradients of earlier micro-batches, during a later one."""

    first: int = 0
    """Room for gradients that the first exchange of a step makes."""

    passing: int = 0
    """Gradients on their way, in the backward pass, wherever it is."""

    bucket: int = 0
    """Of each number that waits in a bucket to be exchanged; 0 without one."""

    exchange: Callable[[int], int] = lambda _: 0
    """Beside the bucket, while so many numbers are exchanged."""


@dataclass(frozen=True)
class FsdpUnit:
    """Numbers of parameters that FSDP makes whole together."""

    numel: int
    """All of them."""
    trained_numel: int
    """That get gradients."""

    @classmethod
    def from_parameters(cls, parameters: Iterable[nn.Parameter]) -> "FsdpUnit":
        """Add up parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in parameters]
        return cls(sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained))


@dataclass(frozen=True)
class ParameterSizes:
    """Numbers of a model's parameters as the engines cut them up."""

    num_workers: int
    """That they are cut for."""
    resident: tuple[int, ...]
    """Of every parameter."""
    used: tuple[int, ...]
    """The same without the originals of saved modules, which no forward pass reads."""
    groups: tuple[tuple[int, ...], ...]
    """Of trained parameters that the optimizer treats apart, such as matrices and vectors."""
    root_unit: FsdpUnit
    """What is in no layer of the decoder."""
    layer_unit: FsdpUnit
    """Its largest layer."""

    @classmethod
    def from_model(cls, model: nn.Module, num_workers: int, optim: OptimConfig) -> "ParameterSizes":
        """Measure a model, with or without its weights."""
        named = list(model.named_parameters(remove_duplicate=False))
        used = {p: p.numel() for name, p in named if not is_original(name)}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = parameter_groups(model, trained, optim)
        layers = decoder_layers(model)
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        units = [FsdpUnit.from_parameters(layer.parameters()) for layer in layers]
        return cls(
            num_workers=num_workers,
            root_unit=FsdpUnit.from_parameters(p for p in model.parameters() if p not in inside),
            layer_unit=max(units, key=lambda unit: unit.numel, default=FsdpUnit(0, 0)),
            resident=tuple({p: p.numel() for _, p in named}.values()),
            used=tuple(used.values()),
            groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
        )

    @property
    def trained(self) -> int:
        """Of all trained parameters."""
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        """Of the largest trained parameter."""
        return max(map(max, self.groups))

    @property
    def partition(self) -> int:
        """Of a worker's part where a group is cut into W equal stretches (ZeRO 1 and 2)."""
        return sum(math.ceil(sum(group) / self.num_workers) for group in self.groups)

    @property
    def partition_overlap(self) -> int:
        """Of all parameters that such a stretch has a part of, for the worker with most."""
        most = 0
        for group in self.groups:
            ends = list(itertools.accumulate(group))
            length = math.ceil(ends[-1] / self.num_workers)
            most += max(
                sum(
                    size
                    for size, end in zip(group, ends, strict=True)
                    if end > start and end - size < start + length
                )
                for start in range(0, ends[-1], length)
            )
        return most

    @property
    def sharded(self) -> int:
        """Of a worker's part where each trained parameter is cut into W pieces (ZeRO 3)."""
        return sum(self.shard_size(size) for group in self.groups for size in group)

    def shard_size(self, size: int) -> int:
        """Return the numbers of one of W pieces of a parameter."""
        return math.ceil(size / self.num_workers)


def build_scheme(
    layout: ShardingLayout, sizes: "ParameterSizes", settings: WorkerSettings
) -> MemoryScheme:
    """Return the scheme of a layout."""
    makers: dict[ShardingLayout, Callable[[ParameterSizes, WorkerSettings], MemoryScheme]] = {
        "ddp": _plain,
        "ZeRO 1": _zero_1,
        "ZeRO 2": _zero_2,
        "ZeRO 3": _zero_3,
        "fsdp": _fully_sharded,
    }
    return makers[layout](sizes, settings)


def _plain(sizes: ParameterSizes, settings: WorkerSettings) -> MemoryScheme:
    """`DataParallelEngine`: weights, float32 masters and gradients whole on each worker.

    In float32 the weights are their own masters, and micro-batches add up in their gradients.
    Half-precision gradients are added to the masters' after each micro-batch, one by one.
    """
    number, n = settings.element_bytes, sizes.trained
    is_half = number < FLOAT_BYTES
    message = FLOAT_BYTES * _largest_message(sizes) if sizes.num_workers > 1 else 0
    one = FLOAT_BYTES * sizes.largest if is_half else 0
    return MemoryScheme(
        optimizer=(3 if is_half else 2) * FLOAT_BYTES * n,
        gradients=FLOAT_BYTES * n,
        step=message,
        kept=number,
        kept_later=number if is_half else 0,
        held=FLOAT_BYTES * n,
        exchange=lambda _: one,
    )


def _largest_message(sizes: ParameterSizes) -> int:
    """Return the numbers of the largest bucket that is copied together to be summed."""
    largest = filled = count = 0
    for size in itertools.chain(*sizes.groups):
        filled, count = filled + size, count + 1
        largest = max(largest, filled if count > 1 else 0)
        if filled >= BUCKET_NUMEL:
            filled = count = 0
    return largest


def _zero_1(sizes: ParameterSizes, settings: WorkerSettings) -> MemoryScheme:
    """Stage 1: micro-batches add up in whole gradients, which are exchanged once a step.

    On a CPU the bucket takes the gradients' place as it is filled; on a GPU it is there in full
    from the first gradient on (`setup_buckets`). In half precision with float32 sums (fp16) the
    exchange writes into a float32 part. Else (fp32, and bf16, for which `deepspeed_config` sets
    no type of sums) it is that of stage 2 in one precision, `_one_precision`.
    """
    n, part = sizes.trained, FLOAT_BYTES * sizes.partition
    if settings.precision == "fp16":
        return MemoryScheme(
            optimizer=3 * part,
            gradients=part,
            step=_norm_bytes(sizes),
            kept=FLOAT_BYTES,
            held=FLOAT_BYTES * n,
            first=part,
            bucket=FLOAT_BYTES if settings.on_gpu else 0,
            exchange=lambda count: FLOAT_BYTES * count,
        )
    number = settings.element_bytes
    return _one_precision(
        sizes,
        settings,
        kept=number,
        held=number * n,
        bucket=number if settings.on_gpu else 0,
    )


def _zero_2(sizes: ParameterSizes, settings: WorkerSettings) -> MemoryScheme:
    """Stage 2: gradients go into a bucket as they are made; of the sums a worker keeps its part.

    In half precision the bucket is copied (`allreduce_bucket`), converted to float32, summed over
    the workers, and added to the worker's float32 part.
    """
    if settings.precision == "fp32":
        touched = FLOAT_BYTES * sizes.partition_overlap
        return _one_precision(sizes, settings, kept=0, held=touched, bucket=FLOAT_BYTES)
    number, part = settings.element_bytes, FLOAT_BYTES * sizes.partition
    return MemoryScheme(
        optimizer=3 * part,
        gradients=part,
        step=_norm_bytes(sizes),
        held=part,
        first=part,
        bucket=number,
        exchange=lambda count: (number + FLOAT_BYTES) * count,
    )


def _one_precision(
    sizes: ParameterSizes, settings: WorkerSettings, *, kept: int, held: int, bucket: int
) -> MemoryScheme:
    """Stages 1 and 2 where gradients are summed up in the weights' own precision.

    The bucket is copied to be exchanged between several workers, and converted where the weights
    are not float32. Then all parameters that the worker has a part of get whole gradients of their
    own (`grads_in_partition`), of which the step makes one flat float32 part (`step`).
    """
    number = settings.element_bytes
    touched, part = number * sizes.partition_overlap, FLOAT_BYTES * sizes.partition
    converted = FLOAT_BYTES if number < FLOAT_BYTES else 0
    copied = number if sizes.num_workers > 1 else 0
    flat = part + (number * sizes.partition if converted else 0)
    return MemoryScheme(
        optimizer=3 * part,
        gradients=touched,
        step=max(_norm_bytes(sizes), flat),
        kept=kept,
        held=held,
        bucket=bucket,
        exchange=lambda count: max((copied + converted) * count, touched),
    )


def _norm_bytes(sizes: ParameterSizes) -> int:
    """Return what `get_grad_norm_direct` takes: the largest gradient of the part as doubles."""
    return DOUBLE_BYTES * min(sizes.largest, sizes.partition)


def _zero_3(sizes: ParameterSizes, settings: WorkerSettings) -> MemoryScheme:
    """Stage 3: a float32 bucket and the worker's float32 gradients are there all the time.

    The bucket is copied to be exchanged (`reduce_scatter_coalesced`), and gloo, which CPUs use,
    copies it once more. The step makes the worker's gradients flat.
    """
    part = FLOAT_BYTES * sizes.sharded
    capacity = settings.zero_size("reduce_bucket_size")
    bucket = capacity if settings.on_gpu else min(sizes.trained, capacity)
    copies = 1 if settings.on_gpu or sizes.num_workers == 1 else 2
    return MemoryScheme(
        optimizer=3 * part,
        gradients=part,
        gradients_stay=True,
        constant=FLOAT_BYTES * bucket,
        step=max(DOUBLE_BYTES * sizes.shard_size(sizes.largest), part),
        exchange=lambda count: copies * FLOAT_BYTES * count,
    )


def _fully_sharded(sizes: ParameterSizes, settings: WorkerSettings) -> MemoryScheme:
    """`FullyShardedEngine`: float32 parts are their own masters, and so are their gradients.

    Gradients of a layer are copied together in float32 to be summed (`foreach_reduce`) as soon as
    it is done; those outside of layers wait for the end of the backward pass.
    """
    part = FLOAT_BYTES * sizes.sharded
    number, layer, outside = (
        settings.element_bytes,
        sizes.layer_unit.trained_numel,
        sizes.root_unit.trained_numel,
    )
    return MemoryScheme(
        optimizer=2 * part,
        gradients=part,
        gradients_stay=True,
        passing=number * outside + (number + FLOAT_BYTES) * layer,
        exchange=lambda _: FLOAT_BYTES * outside,
    )


def weight_bytes(
    layout: ShardingLayout, sizes: ParameterSizes, settings: WorkerSettings
) -> tuple[int, int, int]:
    """Return the bytes of weights that a worker holds, has gathered, and that are on their way.

    ZeRO 3 cuts every parameter into W pieces and keeps small ones whole too. What is gathered is
    kept as long as it is needed again within `stage3_max_reuse_distance` numbers, and fetching
    ahead goes on up to `stage3_max_live_parameters`. What is fetched ahead comes in one buffer and
    is copied out of it. Where all weights may be live, they are so at the end of the decoder, and
    nothing comes any more; else something comes all the time. One worker has nothing to gather.
    """
    number = settings.element_bytes
    if layout == "fsdp":
        return _sharded_weights(sizes, number)
    if settings.quantized is not None:
        held = number * (sum(sizes.resident) - settings.quantized.numel)
        return held + settings.quantized.storage_bytes, number * settings.quantized.largest, 0
    if layout != "ZeRO 3" or sizes.num_workers == 1:
        return number * sum(sizes.resident), 0, 0
    threshold = settings.zero_size("stage3_param_persistence_threshold")
    whole = sum(size for size in sizes.resident if size <= threshold)
    pieces = sum(sizes.shard_size(size) for size in sizes.resident)
    gathered = sum(size for size in sizes.used if size > threshold)
    most = settings.zero_size("stage3_max_live_parameters")
    coming = min(gathered, settings.zero_size("stage3_prefetch_bucket_size"))
    if gathered > most:
        return number * (pieces + whole), number * (most + coming), 0
    return number * (pieces + whole), number * gathered, number * coming


def _sharded_weights(sizes: ParameterSizes, number: int) -> tuple[int, int, int]:
    """Return the same for fsdp, where trained weights are float32 and nothing else comes.

    Whole are the weights outside of layers, the layer in use, and the next one, twice: what comes
    is copied out of one buffer.
    """
    trained = sizes.sharded
    pieces = sum(sizes.shard_size(size) for size in sizes.resident)
    held = number * (pieces - trained) + FLOAT_BYTES * trained
    return held, number * (sizes.root_unit.numel + 3 * sizes.layer_unit.numel), 0


def offloaded_bytes(
    layout: ShardingLayout, weights: int, scheme: MemoryScheme, settings: WorkerSettings
) -> int:
    """Return the bytes that a worker on a GPU keeps in host memory instead.

    Args:
        layout: of the engine.
        weights: bytes of its weights.
        scheme: of its gradients and optimizer state.
        settings: of the run.
    """
    if not settings.on_gpu:
        return 0
    if layout == "fsdp":
        everything = weights + scheme.optimizer + scheme.gradients
        return everything if settings.offload_parameters else 0
    optimizer = scheme.optimizer if settings.offload_optimizer else 0
    return optimizer + (weights if settings.offload_parameters else 0)
