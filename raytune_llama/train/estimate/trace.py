"""Traces the memory of one micro-batch without allocating it.

The module's own forward and backward pass run on PyTorch's meta device, where tensors have shapes
but no data, and every storage is counted from its creation until it is freed. Only fused kernels,
and operations whose result depends on data, are replaced.
"""

import contextlib
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the usual name
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_llama.model.llama import SummedLoss, causal_lm, last_hidden_state_module
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.engines.protocol import trained_parameters

META_DEVICE = torch.device("meta")


class MicroBatchTrace(NamedTuple):
    """Bytes that one micro-batch needs in addition to weights and optimizer state.

    The decoder keeps the activations for its backward pass; the loss adds the logits of a chunk and
    the gradients taken of it. `peak_bytes` is the peak if the gradient of a parameter is freed once
    it exists, `kept_peak_bytes` if all are kept in the precision of the run.
    """

    activation_bytes: int
    loss_bytes: int
    peak_bytes: int
    kept_peak_bytes: int


def trace_micro_batch(module: SummedLoss, config: AnyTrainConfig) -> MicroBatchTrace:
    """Trace a forward and backward pass of a module on the meta device; all tokens are targets."""
    replaced = _ReplacedFunctions(config)
    lm = causal_lm(module.model)
    lm.activation_checkpointing_disable()
    if config.engine.gradient_checkpointing:
        # `backward` disables the mode, so the layers that it recomputes must enable it again.
        lm.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), replaced)}
        )
    shape = (config.batch.micro_batch_sequences, config.batch.sequence_tokens)
    inputs = [torch.zeros(shape, dtype=torch.long, device=META_DEVICE) for _ in range(3)]
    live = _LiveBytes([*module.parameters(), *module.buffers(), *inputs])
    decoded: list[tuple[int, int]] = []

    def on_decoder_output(*_: object) -> None:
        decoded.append((live.now, live.peak))
        live.peak = live.now

    handles = [last_hidden_state_module(lm).register_forward_hook(on_decoder_output)]
    for _, parameter in trained_parameters(module):
        handles.append(parameter.register_post_accumulate_grad_hook(live.drop_gradient))
    with replaced, live:
        loss = module(*inputs)
        loss_peak = live.peak
        loss.backward()
    for handle in handles:
        handle.remove()
    ((kept, decoder_peak),) = decoded
    return MicroBatchTrace(kept, loss_peak - kept, max(decoder_peak, live.peak), live.kept_peak)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, until they are freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        # They are kept alive, since the id of a freed storage may be used again.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._sizes = {id(storage): 0 for storage in self._known}
        self.now = self.peak = self.kept_peak = self._dropped = 0

    def drop_gradient(self, parameter: Tensor) -> None:
        """Free the gradient of a parameter; `kept_peak` still counts it."""
        self._dropped += parameter.nbytes
        parameter.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401  # torch's signature
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._sizes:
                storage = leaf.untyped_storage()
                self._sizes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                self.kept_peak = max(self.kept_peak, self.now + self._dropped)
                weakref.finalize(storage, self._free, id(storage))
        return result

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _ReplacedFunctions(TorchFunctionMode):
    """Replaces what the meta device computes otherwise than GPUs and CPUs, or cannot compute."""

    def __init__(self, config: AnyTrainConfig) -> None:
        super().__init__()
        self._config = config

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401  # torch's signature
        kwargs = kwargs or {}
        is_attention = func is F.scaled_dot_product_attention and not kwargs.get("dropout_p")
        if is_attention and args[0].shape[-1] == args[2].shape[-1]:
            # The meta device would hold all attention scores, which no fused kernel does.
            mask = kwargs.get("attn_mask")
            added = mask if mask is None else mask.to(args[0].dtype)
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(*args[:3], attn_mask=added)[0]
        if func is F.dropout and self._config.scale.use_gpu and kwargs["training"]:
            # On a GPU dropout keeps a byte per element.
            return args[0] * torch.empty_like(args[0], dtype=torch.bool)
        if func is Tensor.nonzero:
            # The loss asks which labels are targets; in the worst case all are.
            return torch.arange(args[0].numel(), device=META_DEVICE).unsqueeze(1)
        if func is Tensor.__bool__:
            # The model asks whether positions never restart, so that it needs no mask.
            return not self._config.batch.isolates_documents
        return func(*args, **kwargs)
