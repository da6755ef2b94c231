"""AdamW, and which parameters it treats apart: decay, and multiples of the learning rate.

A group's learning rate in a step is its factor times the scheduled one, so that a schedule stays
one number, and engines need not know why a group has another rate.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from raytune_llama.config.settings import ConfigError, settings
from raytune_llama.model.llama import causal_lm

BadStepAction = Literal["stop", "skip", "rollback"]
"""What is done about a step whose numbers are not finite."""

DEFAULT_MAX_BAD_STEPS = 10

_RATE_FACTOR = "rate_factor"
_FACTOR_B = (".lora_B.", ".lora_embedding_B.")


@settings
class OptimConfig:
    """AdamW (arXiv:1711.05101); matrices decay, vectors (norms, biases, magnitudes) do not."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""

    lora_plus_ratio: Annotated[float, Field(ge=1)] | None = None
    """The factors B of an adapter learn at this many times the rate of its factors A (LoRA+,
    arXiv:2402.12354); null or 1: at the same rate."""

    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the tables embed_tokens and lm_head, or of their new rows, where they
    are trained; null: `learning_rate`."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of matrices, per step relative to their own learning rate."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean of gradients."""

    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the mean of squared gradients."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean of squared gradients."""

    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """While training, uniform noise within alpha / sqrt(L D) is added to the input embeddings of a
    document of L tokens, D being the hidden size (NEFTune, arXiv:2310.05914); null: none."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global L2 norm; null: never."""

    on_bad_step: BadStepAction = "stop"
    """What follows a step whose loss or gradient is not finite; it moves no weight in any case.
    `stop`: the run ends at its newest checkpoint. `skip`: it goes on with the next step.
    `rollback`: it goes on with the next step from the weights and moments of the newest checkpoint
    (but for those of a stop), which takes back the steps since; what they read is not read again.
    Each such step is a line of `nonfinite.jsonl` in the run directory, with the samples it read."""

    max_bad_steps: Annotated[int, Field(ge=1)] = DEFAULT_MAX_BAD_STEPS
    """More such steps than this in a row end a run that skips or rolls back."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.on_bad_step == "stop" and self.max_bad_steps != DEFAULT_MAX_BAD_STEPS:
            raise ConfigError(
                [
                    f"max_bad_steps: got {self.max_bad_steps}, but on_bad_step is stop, which "
                    "allows none; remove it, or set on_bad_step=skip or rollback"
                ]
            )
        return self


def parameter_groups(
    model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], optim: OptimConfig
) -> list[dict[str, Any]]:
    """Split parameters by their weight decay and their multiple of the learning rate.

    Args:
        model: what the names are of; it tells which of them are embedding tables.
        named: the trained parameters, or their masters, by name in `model`.
        optim: rates and decay.
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
    """Set the rate of a step: each group has its factor of the scheduled one.

    Args:
        groups: an optimizer's, as `parameter_groups` made them.
        learning_rate: scheduled.
    """
    for group in groups:
        group["lr"] = learning_rate * group[_RATE_FACTOR]


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """Build PyTorch's fused AdamW, on the CPU or the GPU wherever its parameters are."""
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=True,
    )
