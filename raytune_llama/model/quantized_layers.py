"""Linear layers in 8 or 4 bits; the one module that imports bitsandbytes.

Weights are frozen and dequantized for each matmul, in the precision of the run; activations are
never quantized. A token's result therefore depends on nothing else in its batch, in training and in
evaluation, unlike with `LLM.int8()` (arXiv:2208.07339) and its per-batch outliers.

Shapes: B, T: sequences and tokens; I, O: inputs and outputs of a layer.
"""

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

from raytune_llama.model.config import Quantization
from raytune_llama.model.quantization import quantized_linears

logger = logging.getLogger(__name__)

INT8_MAX = 127

# Parameter subclasses with extra arguments, which PyTorch's stubs do not know.
_int8_params: Any = Int8Params
_params_4bit: Any = Params4bit


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # torch adds what forward stores
        input_BTI: Tensor,
        codes_OI: Tensor,
        scales_O: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(codes_OI, scales_O)
        return linear(input_BTI, _dequantize(codes_OI, scales_O, input_BTI.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one output, one gradient
        ctx: Any,  # noqa: ANN401  # torch adds what forward stored
        grad_BTO: Tensor,
    ) -> tuple[Tensor, None, None]:
        # Dequantized again, so that no full weight is kept for the backward pass.
        codes_OI, scales_O = ctx.saved_tensors
        return grad_BTO @ _dequantize(codes_OI, scales_O, grad_BTO.dtype), None, None


def _dequantize(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    weight_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    # Computed in float32 and written in the wanted precision, without an intermediate copy.
    return torch.mul(codes_OI, scales_O.unsqueeze(1) / INT8_MAX, out=weight_OI)


class Int8Linear(Linear8bitLt):
    """A linear layer with 1 byte per weight and one scale per row, quantized by bitsandbytes.

    Its own matmul replaces that of bitsandbytes, which also quantizes activations, on CPUs only in
    evaluation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (B, T, O), in the precision of the inputs."""
        weight: Any = self.weight
        output_BTO = cast("Tensor", _Int8Product.apply(x, weight.data, weight.SCB))
        return output_BTO if self.bias is None else output_BTO + self.bias


def quantize_base(
    model: PreTrainedModel,
    quantization: Quantization,
    keep: Sequence[str],
    device: torch.device,
) -> None:
    """Replace a base's linear layers by quantized ones, one at a time.

    Args:
        model: the base on the CPU, in the precision of the run, its embeddings already grown.
        quantization: int8, or nf4 with double quantization (arXiv:2305.14314).
        keep: name suffixes of fully trained modules; see `quantized_linears`.
        device: the device on which the run computes and weights are quantized.
    """
    make = _int8_of if quantization == "int8" else _nf4_of
    layers = dict(quantized_linears(model, keep))
    # From here on only names are held, so each layer's weights are freed as it is replaced.
    for name in list(layers):
        model.set_submodule(name, make(layers.pop(name), device))
    model.requires_grad_(False)
    # PEFT selects its adapter layers by this attribute.
    setattr(model, "is_loaded_in_8bit" if quantization == "int8" else "is_loaded_in_4bit", True)
    logger.info("quantized the base's linear layers to %s on %s", quantization, device)


def _int8_of(layer: nn.Linear, device: torch.device) -> nn.Module:
    made = Int8Linear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        device="meta",
    )
    weight = _int8_params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.weight = weight.to(device)
    made.bias = layer.bias
    return made


def _nf4_of(layer: nn.Linear, device: torch.device) -> nn.Module:
    made = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = _params_4bit(
        layer.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=made,
    )
    made.weight = weight.to(device)
    made.bias = layer.bias
    # On CPUs with bfloat16 it would repack the weights at the first evaluation, but training reads
    # them in the original packing.
    made.support_avx512bf16_for_cpu = False
    return made
