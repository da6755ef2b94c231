"""What a worker holds in memory, by layout: the sums behind `plan=true`.

The pass of a micro-batch is traced (`tracing.py`), what an engine does with weights and gradients
is in `schemes.py`, and here they are put on one line of time.
"""

from dataclasses import dataclass

from torch import nn

from raytune_llama.train.schemes import (
    FLOAT_BYTES,
    Scheme,
    Sizes,
    WorkerSettings,
    is_original,
    scheme_of,
)
from raytune_llama.train.strategy import Layout
from raytune_llama.train.tracing import MicroBatchTrace


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

    layout: Layout
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
    model: nn.Module, trace: MicroBatchTrace, settings: WorkerSettings, layout: Layout
) -> WorkerMemory:
    """Add up what one worker holds.

    Args:
        model: wrapped by its adapter, with or without weights.
        trace: of a micro-batch on this model.
        settings: of the run.
        layout: of the engine.
    """
    sizes = Sizes.of(model, settings.num_workers, settings.optim)
    scheme = scheme_of(layout, sizes, settings)
    weights, gathered, coming = _weights(sizes, settings, layout)
    base = weights + scheme.optimizer + scheme.constant
    base += scheme.gradients if scheme.gradients_stay else 0
    forward = coming + trace.decoder_peak_bytes
    passes = max(forward, _walk(trace, scheme, settings, kept=scheme.kept, room=scheme.first))
    if settings.num_micro_batches > 1:
        later = _walk(trace, scheme, settings, kept=scheme.kept_later, room=0)
        passes = max(passes, scheme.held + max(forward, later))
    step = scheme.step if scheme.gradients_stay else scheme.gradients + scheme.step
    offloaded = 0
    if settings.on_gpu and layout.startswith("ZeRO") and settings.offload_optimizer:
        offloaded += scheme.optimizer
    if settings.on_gpu and layout == "ZeRO 3" and settings.offload_parameters:
        offloaded += weights
    if settings.on_gpu and layout == "fsdp" and settings.offload_parameters:
        offloaded += weights + scheme.optimizer + scheme.gradients
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
    trace: MicroBatchTrace, scheme: Scheme, settings: WorkerSettings, *, kept: int, room: int
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


def _weights(sizes: Sizes, settings: WorkerSettings, layout: Layout) -> tuple[int, int, int]:
    """Return the bytes of weights that a worker holds, has gathered, and that are on their way.

    ZeRO 3 cuts every parameter into W pieces and keeps small ones whole too. What is gathered is
    kept as long as it is needed again within `stage3_max_reuse_distance` numbers, and fetching
    ahead goes on up to `stage3_max_live_parameters`. What is fetched ahead comes in one buffer and
    is copied out of it. Where all weights may be live, they are so at the end of the decoder, and
    nothing comes any more; else something comes all the time. One worker has nothing to gather.
    """
    number = settings.number_bytes
    if layout == "fsdp":
        return _sharded_weights(sizes, number)
    if settings.quantized is not None:
        held = number * (sum(sizes.resident) - settings.quantized.numel)
        return held + settings.quantized.held_bytes, number * settings.quantized.largest, 0
    if layout != "ZeRO 3" or sizes.num_workers == 1:
        return number * sum(sizes.resident), 0, 0
    threshold = settings.zero_size("stage3_param_persistence_threshold")
    whole = sum(size for size in sizes.resident if size <= threshold)
    pieces = sum(sizes.piece(size) for size in sizes.resident)
    gathered = sum(size for size in sizes.used if size > threshold)
    most = settings.zero_size("stage3_max_live_parameters")
    coming = min(gathered, settings.zero_size("stage3_prefetch_bucket_size"))
    if gathered > most:
        return number * (pieces + whole), number * (most + coming), 0
    return number * (pieces + whole), number * gathered, number * coming


def _sharded_weights(sizes: Sizes, number: int) -> tuple[int, int, int]:
    """Return the same for fsdp, where trained weights are float32 and nothing else comes.

    Whole are the weights outside of layers, the layer in use, and the next one, twice: what comes
    is copied out of one buffer.
    """
    trained = sizes.shared_out
    pieces = sum(sizes.piece(size) for size in sizes.resident)
    held = number * (pieces - trained) + FLOAT_BYTES * trained
    return held, number * (sizes.outside.whole + 3 * sizes.layer.whole), 0
