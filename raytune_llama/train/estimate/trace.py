"""What one micro-batch holds in memory, found without that memory.

    trace = trace_micro_batch(module, micro_batch_sequences=2, sequence_tokens=512, ...)

The module's own forward and backward pass run on PyTorch's meta device, where tensors have shapes
and no data, and each storage is followed from its first sight to its end. So every architecture,
adapter and setting is counted by the code that trains it. Two things are put in the place of what
the meta device cannot do: fused attention, and answers that depend on data.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # as everywhere
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_llama.model.llama import SummedLoss, causal_lm, last_hidden_state_module
from raytune_llama.train.engines.protocol import trained_parameters

META_DEVICE = torch.device("meta")


@dataclass(frozen=True)
class GradientEvent:
    """The moment at which the backward pass has made the gradient of one parameter."""

    numel: int
    """Numbers of the gradient."""

    peak_bytes: int
    """Most that was live since the gradient before; earlier gradients are not in it."""

    live_bytes: int
    """Live at this moment, this gradient included and earlier ones not."""


@dataclass(frozen=True)
class MicroBatchTrace:
    """What is live beside weights and optimizer while one micro-batch goes through a model.

    Gradients of parameters count only until they are made: what becomes of them is the engine's.
    """

    activation_bytes: int
    """Kept by the decoder for its backward pass."""

    loss_bytes: int
    """Most that the loss adds: logits of one chunk, and the gradients that it takes at once."""

    decoder_peak_bytes: int
    """Most that is live in the decoder's forward pass."""

    gradients: tuple[GradientEvent, ...]
    """Of the trained parameters, in the order of the backward pass."""

    rest_peak_bytes: int
    """Most that is live behind the last gradient."""


def trace_micro_batch(
    module: SummedLoss,
    *,
    micro_batch_sequences: int,
    sequence_tokens: int,
    isolate_documents: bool,
    gradient_checkpointing: bool,
    on_gpu: bool,
) -> MicroBatchTrace:
    """Follow one forward and backward pass.

    Args:
        module: on the meta device, in the precision that is trained in.
        micro_batch_sequences: rows of the micro-batch.
        sequence_tokens: tokens of a row, all of them targets.
        isolate_documents: whether rows hold several documents, so that attention gets a mask.
        gradient_checkpointing: whether layers are computed again in the backward pass.
        on_gpu: whether dropout keeps a byte a number, as on GPUs, or a number, as on CPUs.
    """
    substitutes = _Substitutes(positions_follow=not isolate_documents, on_gpu=on_gpu)
    lm = causal_lm(module.model)
    if gradient_checkpointing:
        # Inside `backward`, a function of torch, the mode is off: layers enter it again.
        lm.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), substitutes)}
        )
    else:
        lm.activation_checkpointing_disable()
    shape = (micro_batch_sequences, sequence_tokens)
    ids_BT, positions_BT, labels_BT = (
        torch.zeros(shape, dtype=torch.long, device=META_DEVICE) for _ in range(3)
    )
    live = _LiveBytes([*module.parameters(), *module.buffers(), ids_BT, positions_BT, labels_BT])
    in_decoder: list[tuple[int, int]] = []
    events: list[GradientEvent] = []

    def on_decoder(*_: object) -> None:
        in_decoder.append((live.now, live.take_peak()))

    def on_gradient(parameter: Tensor) -> None:
        now, peak = live.now, live.take_peak()
        parameter.grad = None
        live.take_peak()
        events.append(GradientEvent(parameter.numel(), peak, now))

    with _hooks(module, on_decoder, on_gradient), substitutes, live:
        loss = module(ids_BT, positions_BT, labels_BT)
        loss_peak = live.take_peak()
        loss.backward()
    ((kept, decoder_peak),) = in_decoder
    return MicroBatchTrace(
        activation_bytes=kept,
        loss_bytes=loss_peak - kept,
        decoder_peak_bytes=decoder_peak,
        gradients=tuple(events),
        rest_peak_bytes=live.take_peak(),
    )


@contextlib.contextmanager
def _hooks(
    module: SummedLoss,
    on_decoder: Callable[..., None],
    on_gradient: Callable[[Tensor], None],
) -> Iterator[None]:
    last = last_hidden_state_module(causal_lm(module.model))
    handles = [last.register_forward_hook(on_decoder)]
    handles += [
        parameter.register_post_accumulate_grad_hook(on_gradient)
        for _, parameter in trained_parameters(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their first sight until they are freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._sizes = {id(tensor.untyped_storage()): 0 for tensor in known}
        # An id is unique only as long as its storage is there.
        self._known = [tensor.untyped_storage() for tensor in known]
        self.now = 0
        self._peak = 0

    def take_peak(self) -> int:
        """Return the most bytes since the last call that were live at a time."""
        peak, self._peak = self._peak, self.now
        return peak

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  # an operation
        types: Any,  # noqa: ANN401  # torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # what the operation returns
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self._peak = max(self._peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Substitutes(TorchFunctionMode):
    """Stands in for what has no result on the meta device.

    Attention there would run as plain arithmetic with all its scores in memory, which the fused
    kernels of CPUs and GPUs never hold. Questions about data get the answer of the worst case.
    """

    def __init__(self, *, positions_follow: bool, on_gpu: bool) -> None:
        super().__init__()
        self._positions_follow = positions_follow
        self._on_gpu = on_gpu

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401  # a function of torch
        types: Any,  # noqa: ANN401  # torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # what the function returns
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not kwargs.get("dropout_p"):
            return _FusedAttention.apply(*args[:3], kwargs.get("attn_mask"))
        if func is F.dropout and self._on_gpu and kwargs["training"]:
            return _FusedDropout.apply(args[0])
        if func is Tensor.nonzero:
            # Asked of the labels: every position is a target.
            return torch.arange(args[0].numel(), device=META_DEVICE).unsqueeze(1)
        if func is Tensor.__bool__:
            # Asked of the positions: does each follow the one before, so that no mask is needed?
            return self._positions_follow
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """What fused attention keeps: its inputs, the mask as numbers, its output and a norm a row."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # torch adds what forward stores
        query_BHTE: Tensor,
        key_BHTE: Tensor,
        value_BHTE: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        batch, heads, tokens, _ = query_BHTE.shape
        # The kernels lay their output out as the next layer reads it.
        output = query_BHTE.new_empty(batch, tokens, heads, value_BHTE.shape[-1]).transpose(1, 2)
        norm_BHT = query_BHTE.new_empty(query_BHTE.shape[:-1], dtype=torch.float32)
        added = mask if mask is None else mask.to(query_BHTE.dtype)
        ctx.save_for_backward(query_BHTE, key_BHTE, value_BHTE, added, output, norm_BHT)
        return output

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401  # torch adds what forward stored
        *grad_outputs: Tensor,  # noqa: ARG004  # torch's signature
    ) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _FusedDropout(torch.autograd.Function):
    """What dropout keeps on a GPU: one byte a number."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor) -> Tensor:  # noqa: ANN401  # torch's context
        ctx.save_for_backward(torch.empty_like(input_, dtype=torch.bool))
        return torch.empty_like(input_)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401, ARG004  # torch's context
        *grad_outputs: Tensor,
    ) -> Tensor:
        return torch.empty_like(grad_outputs[0])
