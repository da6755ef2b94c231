"""AdamW and its parameter groups, which differ in weight decay and learning rate.

A group's learning rate in a step is its factor times the scheduled rate, so that the schedule is
one number and engines need not know why groups differ.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from raytune_llama.model.llama import causal_lm
from raytune_llama.train.engines.config import OptimConfig

_RATE_FACTOR = "rate_factor"
_FACTOR_B = (".lora_B.", ".lora_embedding_B.")


def parameter_groups(
    model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], optim: OptimConfig
) -> list[dict[str, Any]]:
    """Return optimizer parameter groups, split by weight decay and learning rate factor.

    Args:
        model: the model with these names; identifies the embedding tables.
        named: the trained parameters, or their masters, by name in `model`.
        optim: learning rates and weight decay.
    """
    tables = embedding_parameter_names(model)
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = optim.weight_decay if parameter.ndim >= 2 else 0.0
        factor = _rate_factor(name, optim, is_table=name in tables)
        members.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, _RATE_FACTOR: factor}
        for (decay, factor), parameters in members.items()
    ]


def _rate_factor(name: str, optim: OptimConfig, *, is_table: bool) -> float:
    if any(part in name for part in _FACTOR_B):
        return optim.lora_plus_ratio or 1.0
    if is_table and ".lora_" not in name and optim.embedding_learning_rate is not None:
        return optim.embedding_learning_rate / optim.learning_rate
    return 1.0


def embedding_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters of the input embedding and the output projection."""
    lm = causal_lm(model)
    layers = (lm.get_input_embeddings(), lm.get_output_embeddings())
    held = {parameter for layer in layers if layer is not None for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if parameter in held}


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Set each group's learning rate to its factor times the scheduled rate.

    Args:
        groups: an optimizer's groups, made by `parameter_groups`.
        learning_rate: scheduled rate of the step.
    """
    for group in groups:
        group["lr"] = learning_rate * group[_RATE_FACTOR]


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """Build PyTorch's fused AdamW, on the device of its parameters."""
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=True,
    )
