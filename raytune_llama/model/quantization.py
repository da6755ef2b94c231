"""A base in 8 or 4 bits a weight: what is quantised, what that takes, and what forbids it.

The layers themselves are in `quantized_layers.py`, which needs bitsandbytes; this needs nothing.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Quantization = Literal["int8", "nf4"]

NF4_BLOCK_SIZE = 64
"""Weights of nf4 that have a scale together; the scales are in 8 bits themselves."""

NF4_SCALE_BLOCK_SIZE = 256
"""Scales of nf4 that have a float32 scale together."""

_TABLE_BYTES = 4 * (16 + 256 + 1)
"""Of a layer in nf4: the values of its codes and of its scales' codes, and their offset."""


def quantized_linears(
    model: PreTrainedModel, keep: Sequence[str]
) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers whose weights are quantised, by name.

    The output projection is not: the loss reads its weight whole, and it may be the embedding.

    Args:
        model: with or without its weights.
        keep: name endings of modules that are trained whole, which stay as they are.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_kept = any(f".{name}.".endswith(f".{ending}.") for ending in keep)
        if isinstance(module, nn.Linear) and module is not head and not is_kept:
            yield name, module


def check_quantization(
    model: PreTrainedModel, quantization: Quantization, keep: Sequence[str]
) -> list[str]:
    """Return why a model cannot be quantised here; empty where it can."""
    if find_spec("bitsandbytes") is None:
        return [
            f"model.quantization: got {quantization}, but bitsandbytes is not installed; "
            "pip install '.[quantized]', or set model.quantization=null"
        ]
    if not any(quantized_linears(model, keep)):
        return [
            f"model.quantization: got {quantization}, but {type(model).__name__} has no linear "
            "layer beside its output projection and lora.modules_to_save; set it to null"
        ]
    return []


def quantized_bytes(quantization: Quantization, shape: torch.Size) -> int:
    """Return what the weight of a layer of this shape (outputs, inputs) takes."""
    numel = shape.numel()
    if quantization == "int8":
        return numel + 4 * shape[0]
    num_blocks = -(-numel // NF4_BLOCK_SIZE)
    return -(-numel // 2) + num_blocks + 4 * -(-num_blocks // NF4_SCALE_BLOCK_SIZE) + _TABLE_BYTES


def unquantized_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight in the model, however it is kept.

    ZeRO 3 and nf4 leave the shape in an attribute; a weight in nf4 is a column of bytes.
    """
    state = getattr(weight, "quant_state", None)
    shape = weight.shape if state is None else state.shape
    return torch.Size(getattr(weight, "ds_shape", shape))
