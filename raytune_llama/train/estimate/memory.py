"""What a worker holds in memory, by layout: the sums behind `plan=true`.

The pass of a micro-batch is traced (`trace.py`), what an engine does with weights and gradients
is in `schemes.py`, and here they are put on one line of time.
"""

from dataclasses import dataclass

from torch import nn

from raytune_llama.train.engines.config import ShardingLayout
from raytune_llama.train.estimate.schemes import (
    MemoryScheme,
    ParameterSizes,
    WorkerSettings,
    build_scheme,
    is_original,
    offloaded_bytes,
    weight_bytes,
)
from raytune_llama.train.estimate.trace import MicroBatchTrace


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of a model's parameters; a table under two names counts once."""

    resident: int
    """Held in memory: `unique`, and the frozen originals that PEFT keeps beside each module of
    `lora.modules_to_save`."""

    unique: int
    """Of the model with its adapter."""

    trained: int
    """That get gradients."""


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a model, with or without its weights."""
    named = list(model.named_parameters(remove_duplicate=False))
    resident = {parameter: parameter.numel() for _, parameter in named}
    used = {parameter for name, parameter in named if not is_original(name)}
    return ParameterCounts(
        resident=sum(resident.values()),
        unique=sum(parameter.numel() for parameter in used),
        trained=sum(parameter.numel() for parameter in used if parameter.requires_grad),
    )


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of the worker that holds most. The parts are not all there at a time."""

    layout: ShardingLayout
    """Of weights, gradients and optimizer state."""

    weights: int
    """In the run's precision or quantised: all of them, or this worker's part."""

    gathered: int
    """Weights that are there while they are used: of other workers' parts (ZeRO 3, fsdp), or made
    of quantised ones."""

    optimizer: int
    """AdamW's two moments and the float32 masters, where they are no weights themselves."""

    gradients: int
    """Kept until the optimizer's step."""

    buffers: int
    """Most that exchanging, clipping and applying gradients takes beside them."""

    activations: int
    """Kept for the backward pass."""

    loss: int
    """Of the logits in chunks, and the gradients taken of them at once."""

    peak: int
    """Most that is there at a time."""

    offloaded: int
    """In the host's memory instead."""


def estimate_memory(
    model: nn.Module, trace: MicroBatchTrace, settings: WorkerSettings, layout: ShardingLayout
) -> WorkerMemory:
    """Add up what one worker holds.

    Args:
        model: wrapped by its adapter, with or without weights.
        trace: of a micro-batch on this model.
        settings: of the run.
        layout: of the engine.
    """
    sizes = ParameterSizes.from_model(model, settings.num_workers, settings.optim)
    scheme = build_scheme(layout, sizes, settings)
    weights, gathered, coming = weight_bytes(layout, sizes, settings)
    base = weights + scheme.optimizer + scheme.constant
    base += scheme.gradients if scheme.gradients_stay else 0
    forward = coming + trace.decoder_peak_bytes
    passes = max(forward, _walk(trace, scheme, settings, kept=scheme.kept, room=scheme.first))
    if settings.num_micro_batches > 1:
        later = _walk(trace, scheme, settings, kept=scheme.kept_later, room=0)
        passes = max(passes, scheme.held + max(forward, later))
    step = scheme.step if scheme.gradients_stay else scheme.gradients + scheme.step
    offloaded = offloaded_bytes(layout, weights, scheme, settings)
    filled = min(sizes.trained, settings.zero_size("reduce_bucket_size"))
    bucket = scheme.bucket * (
        settings.zero_size("reduce_bucket_size") if settings.on_gpu else filled
    )
    return WorkerMemory(
        layout=layout,
        weights=weights,
        gathered=gathered + coming,
        optimizer=scheme.optimizer,
        gradients=scheme.gradients,
        buffers=scheme.constant
        + max(bucket + scheme.passing + scheme.exchange(filled), scheme.step),
        activations=trace.activation_bytes,
        loss=trace.loss_bytes,
        peak=base + max(gathered + passes, step) - offloaded,
        offloaded=offloaded,
    )


def _walk(
    trace: MicroBatchTrace, scheme: MemoryScheme, settings: WorkerSettings, *, kept: int, room: int
) -> int:
    """Return the most bytes that loss and backward pass take on top of what is always there.

    Gradients are followed from the backward pass into `kept` memory or a bucket, which is emptied
    when the next one does not fit, and at the end.
    """
    capacity = settings.zero_size("reduce_bucket_size")
    peak = trace.activation_bytes + trace.loss_bytes
    done = waiting = filled = 0
    for event in trace.gradients:
        full = capacity if settings.on_gpu else filled
        beside = kept * done + scheme.bucket * full
        peak = max(peak, event.peak_bytes + beside)
        if scheme.bucket and waiting and waiting + event.numel > capacity:
            peak = max(peak, event.live_bytes + beside + scheme.exchange(waiting) + room)
            waiting = 0
        done += event.numel
        waiting += event.numel
        filled = max(filled, min(waiting, capacity))
    full = capacity if settings.on_gpu else filled
    beside = kept * done + scheme.bucket * full
    last = scheme.exchange(min(waiting, capacity)) + room
    return scheme.passing + max(peak, trace.rest_peak_bytes + beside, beside + last)
