"""Promise: a base in 8 or 4 bits is what bitsandbytes makes of it, and computes for each token."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.model.config import Precision, Quantization
from raytune_llama.model.llama import DTYPES
from raytune_llama.model.quantization import (
    check_quantization,
    quantized_bytes,
    quantized_linears,
    unquantized_shape,
)
from raytune_llama.model.quantized_layers import quantize_base

CPU = torch.device("cpu")
KINDS: tuple[Quantization, ...] = ("int8", "nf4")

# Of the range of a block: half the widest step between neighbouring codes, and rounding.
LARGEST_ERROR = {"int8": 0.5 / 127 + 1e-3, "nf4": 0.5 * 0.31 + 2e-2}


def make_model(precision: Precision = "fp32") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(DTYPES[precision])


def weights_of(layer: nn.Module) -> torch.Tensor:
    """Read a layer's weights off what it makes of unit vectors."""
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_base_weights_are_near_and_frozen(kind: Quantization) -> None:
    model = make_model()
    wanted = {name: layer.weight.detach().clone() for name, layer in quantized_linears(model, ())}
    quantize_base(model, kind, (), CPU)
    assert len(wanted) == 14
    for name, weight in wanted.items():
        layer = model.get_submodule(name)
        error = (weights_of(layer) - weight).abs().max() / weight.abs().max()
        assert 1e-4 < error < LARGEST_ERROR[kind]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_base_leaves_tables_norms_and_kept_modules(kind: Quantization) -> None:
    model, untouched = make_model(), make_model()
    quantize_base(model, kind, ("o_proj", "layers.1.mlp.up_proj"), CPU)
    kept = ("embed_tokens", "lm_head", "norm", "o_proj", "layers.1.mlp.up_proj")
    wanted = dict(untouched.named_parameters())
    for name, parameter in model.named_parameters():
        if any(ending in name for ending in kept):
            assert torch.equal(parameter, wanted[name])
        else:
            assert parameter.dtype in {torch.int8, torch.uint8}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layer_gradient_is_that_of_its_weights(kind: Quantization) -> None:
    model = make_model()
    quantize_base(model, kind, (), CPU)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    inputs = torch.randn(3, 5, 64, requires_grad=True)
    output = layer(inputs)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    weight = weights_of(layer)
    torch.testing.assert_close(output, inputs @ weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs.grad, upstream @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layer_token_does_not_depend_on_its_batch_or_mode(kind: Quantization) -> None:
    model = make_model()
    quantize_base(model, kind, (), CPU)
    layer = model.get_submodule("model.layers.0.mlp.up_proj").train()
    # An outlier beside it, of the size for which LLM.int8() computes a column apart.
    token, outlier = torch.randn(1, 8, 64), 60 * torch.randn(1, 8, 64)
    with torch.no_grad():
        alone, beside = layer(token)[0], layer(torch.cat([token, outlier]))[0]
        evaluated = layer.eval()(token)[0]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone, evaluated)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_base_in_half_precision_computes_in_it(
    kind: Quantization, precision: Precision
) -> None:
    model = make_model(precision)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        wanted = model(ids).logits.float()
        quantize_base(model, kind, (), CPU)
        logits = model(ids).logits
    assert logits.dtype == DTYPES[precision]
    difference = (logits.float() - wanted).norm() / wanted.norm()
    assert 1e-4 < difference < {"int8": 0.05, "nf4": 0.5}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_bytes_and_shape_are_those_of_the_layer(kind: Quantization) -> None:
    model = make_model()
    shapes = {name: layer.weight.shape for name, layer in quantized_linears(model, ())}
    quantize_base(model, kind, (), CPU)
    for name, shape in shapes.items():
        weight: Any = model.get_parameter(f"{name}.weight")
        assert unquantized_shape(weight) == shape
        held = [weight]
        if kind == "int8":
            held.append(weight.SCB)
        else:
            state = weight.quant_state
            inner = state.state2
            held += [state.absmax, state.code, state.offset, inner.absmax, inner.code]
        assert quantized_bytes(kind, shape) == sum(
            tensor.numel() * tensor.element_size() for tensor in held
        )


def test_check_quantization_without_a_layer_to_quantise_is_refused() -> None:
    endings = [name.rpartition(".")[2] for name, _ in quantized_linears(make_model(), ())]
    (problem,) = check_quantization(make_model(), "nf4", endings)
    assert problem.startswith("model.quantization: got nf4")
    assert "set it to null" in problem
