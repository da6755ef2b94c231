"""PiSSA (arXiv:2404.02948): a LoRA adapter initialized to the principal part of its weights.

    factors = principal_factors(attached)       # A0 and B0 by layer; stored with the run
    apply_principal_factors(attached, factors)

The paper trains A and B from A0 and B0 on the residual W - s B0 A0. Here W stays as it is, and a
second, frozen adapter subtracts s B0 A0: the same sum, without a modified base that would depend on
rounding, partitioning or the machine's SVD. Each step therefore computes two adapters.

Shapes: O outputs, I inputs and r rank of a layer.
"""

from collections.abc import Mapping
from typing import cast

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from raytune_llama.config.errors import UserError

INITIAL_ADAPTER = "initial"
"""Name of the frozen adapter in PEFT."""

_OVERSAMPLING = 16
_NUM_ITERATIONS = 16
"""Iterations of the randomized SVD (arXiv:0909.4061). They reduce a singular value 10 % below the
smallest wanted one to 3 % of its share, and one 30 % below to 1 / 100,000."""


def principal_factors(attached: PeftModel) -> dict[str, Tensor]:
    """Compute A0 (r, I) and B0 (O, r) of each adapted layer, with s B0 A0 the principal part.

    Args:
        attached: base and adapter, unpartitioned, on the CPU.

    Returns:
        Float32 tensors named `<layer>.A` and `<layer>.B`; their bits can differ between machines.

    Raises:
        ValueError: a weight of the base is quantized.
    """
    factors: dict[str, Tensor] = {}
    for name, layer in _layers(attached).items():
        weight_OI = cast("Tensor", layer.get_base_layer().weight)
        if not weight_OI.is_floating_point():
            raise UserError(
                f"lora.init: pissa needs the singular values of {name}, which is quantized "
                f"({weight_OI.dtype}); use lora.init=default, or an unquantized base"
            )
        factor_A, factor_B = _principal(weight_OI.detach().float(), layer.r["default"])
        root = layer.scaling["default"] ** 0.5
        factors |= {f"{name}.A": factor_A / root, f"{name}.B": factor_B / root}
    return factors


def _principal(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return square-root factors of the principal part, (r, I) and (O, r), of equal norms."""
    width = min(rank + _OVERSAMPLING, *weight_OI.shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        left_Ow, values_w, right_Iw = torch.svd_lowrank(weight_OI, width, _NUM_ITERATIONS)
    root_r = values_w[:rank].sqrt()
    factor_A = root_r[:, None] * right_Iw[:, :rank].T
    return factor_A.contiguous(), (left_Ow[:, :rank] * root_r).contiguous()


@torch.no_grad()
def apply_principal_factors(attached: PeftModel, factors: Mapping[str, Tensor]) -> None:
    """Set A and B to the result of `principal_factors`, and subtract it in a frozen adapter."""
    add_initial_adapter(attached)
    for name, layer in _layers(attached).items():
        factor_A, factor_B = factors[f"{name}.A"], factors[f"{name}.B"]
        for adapter, sign in (("default", 1), (INITIAL_ADAPTER, -1)):
            _weight(layer.lora_A, adapter).copy_(factor_A)
            _weight(layer.lora_B, adapter).copy_(sign * factor_B)


def add_initial_adapter(attached: PeftModel) -> None:
    """Add the frozen adapter, with its values unset."""
    trained = cast("peft.LoraConfig", attached.peft_config["default"])
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=trained.r,
        lora_alpha=trained.lora_alpha,
        target_modules=trained.target_modules,
        use_rslora=trained.use_rslora,
    )
    attached.add_adapter(INITIAL_ADAPTER, settings)
    for layer in _layers(attached).values():
        layer.set_adapter(["default", INITIAL_ADAPTER])
        for factor in (layer.lora_A, layer.lora_B):
            _weight(factor, INITIAL_ADAPTER).requires_grad_(False)


def plain_lora_settings(settings: peft.LoraConfig) -> dict[str, int | float | bool]:
    """Return the settings to override for a plain adapter that equals the trained one minus B0 A0.

    It has twice the trained rank and the same scale.
    """
    divisor = settings.r**0.5 if settings.use_rslora else settings.r
    rank = 2 * settings.r
    return {"r": rank, "lora_alpha": settings.lora_alpha / divisor * rank, "use_rslora": False}


def to_plain_lora(keyed: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a plain adapter on the base: B A - B0 A0 as one product.

    Args:
        keyed: trained tensors by PEFT's keys.
        factors: A0 and B0, from which training started.
    """
    plain = dict(keyed)
    for name, factor in factors.items():
        layer, _, which = name.rpartition(".")
        key = f"{layer}.lora_{which}.weight"
        if which == "A":
            plain[key] = torch.cat([keyed[key], factor])
        else:
            plain[key] = torch.cat([keyed[key], -factor], dim=1)
    return plain


def _layers(attached: PeftModel) -> dict[str, LoraLayer]:
    return {n: layer for n, layer in attached.named_modules() if isinstance(layer, LoraLayer)}


def _weight(factors: nn.ModuleDict, adapter: str) -> nn.Parameter:
    return cast("nn.Parameter", factors[adapter].weight)
