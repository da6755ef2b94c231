"""A base in 8 or 4 bits per weight: which layers are quantized, their size, and what rules it out.

The layers themselves are in `quantized_layers.py`, which needs bitsandbytes; this does not.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llama.model.config import Quantization

NF4_BLOCK_SIZE = 64
"""Weights per nf4 scale; the scales are themselves 8-bit."""

NF4_SCALE_BLOCK_SIZE = 256
"""nf4 scales per float32 scale."""

_TABLE_BYTES = 4 * (16 + 256 + 1)
"""Bytes of an nf4 layer's code values, of its scales' code values, and of their offset."""


def quantized_linears(
    model: PreTrainedModel, keep: Sequence[str]
) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the names and modules of the linear layers to quantize.

    The output projection is not one: the loss reads its full weight, and it may be the embedding.

    Args:
        model: the model, with or without its weights.
        keep: name suffixes of fully trained modules, which stay unquantized.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_kept = any(f".{name}.".endswith(f".{ending}.") for ending in keep)
        if isinstance(module, nn.Linear) and module is not head and not is_kept:
            yield name, module


def check_quantization(
    model: PreTrainedModel, quantization: Quantization, keep: Sequence[str]
) -> list[str]:
    """Return why a model cannot be quantized here; empty if it can."""
    if find_spec("bitsandbytes") is None:
        return [
            f"model.quantization: got {quantization}, but bitsandbytes is not installed; "
            "pip install '.[quantized]', or set model.quantization=null"
        ]
    if not any(quantized_linears(model, keep)):
        return [
            f"model.quantization: got {quantization}, but {type(model).__name__} has no linear "
            "layer except its output projection and lora.modules_to_save; set it to null"
        ]
    return []


def quantized_bytes(quantization: Quantization, shape: torch.Size) -> int:
    """Return the bytes of a linear layer's weight of this shape (outputs, inputs)."""
    numel = shape.numel()
    if quantization == "int8":
        return numel + 4 * shape[0]
    num_blocks = -(-numel // NF4_BLOCK_SIZE)
    return -(-numel // 2) + num_blocks + 4 * -(-num_blocks // NF4_SCALE_BLOCK_SIZE) + _TABLE_BYTES


def unquantized_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight in the model, however it is stored.

    ZeRO 3 and nf4 keep the shape in an attribute; an nf4 weight is stored as a column of bytes.
    """
    state = getattr(weight, "quant_state", None)
    shape = weight.shape if state is None else state.shape
    return torch.Size(getattr(weight, "ds_shape", shape))
