"""Settings of the training engine (precision, strategy, sharding) and of the optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import PLACEMENT, ConfigError, settings
from raytune_llama.model.config import Precision

Strategy = Literal["deepspeed", "fsdp", "ddp"]

ShardingLayout = Literal["ddp", "ZeRO 1", "ZeRO 2", "ZeRO 3", "fsdp"]
"""How weights, gradients and optimizer state are laid out in the workers' memory."""

DEFAULT_ZERO_STAGE = 2


@dataclass(frozen=True)
class StrategyTraits:
    """Capabilities of a strategy; the rest of the package checks these, not the strategy's name."""

    layouts: tuple[ShardingLayout, ...]
    """Sharding layouts that the strategy supports."""

    takes_quantized: bool = False
    """Whether the frozen base may be quantized to 4 or 8 bits; packed weights cannot be sharded."""

    has_fp16_on_cpus: bool = True
    """Whether the strategy supports fp16 on CPUs."""

    shards_by_layer: bool = False
    """Whether the strategy needs the decoder layers as a list of modules."""


STRATEGIES: Mapping[Strategy, StrategyTraits] = {
    "deepspeed": StrategyTraits(("ZeRO 1", "ZeRO 2", "ZeRO 3"), has_fp16_on_cpus=False),
    "fsdp": StrategyTraits(("fsdp",), shards_by_layer=True),
    "ddp": StrategyTraits(("ddp",), takes_quantized=True),
}
"""Traits of every strategy. A new one goes here, in `build_engine` and in the memory estimate."""


def strategies_with(trait: Callable[[StrategyTraits], bool]) -> str:
    """Return the strategies with a trait, formatted for a message: `ddp or fsdp`."""
    return " or ".join(sorted(name for name, traits in STRATEGIES.items() if trait(traits)))


@settings
class EngineConfig:
    """How a training step is computed and distributed over the workers."""

    precision: Precision = "bf16"
    """Precision of frozen weights and of compute. Trained weights always have float32 masters."""

    strategy: Annotated[Strategy, PLACEMENT] = "deepspeed"
    """How training is distributed: `deepspeed`, ZeRO with `zero_stage`; `fsdp`, PyTorch's FSDP2,
    which shards every weight over the workers; `ddp`, a full replica per worker, gradients
    all-reduced once per step. Losses and checkpoints are the same."""

    zero_stage: Annotated[Literal[1, 2, 3] | None, PLACEMENT] = None
    """What DeepSpeed ZeRO partitions: 1 optimizer state, 2 also gradients, 3 also weights. Null: 2
    with `deepspeed`, none with another strategy; `strategy: ddp` is also known as stage 0."""

    offload_optimizer: Annotated[bool, PLACEMENT] = False
    """Keep the optimizer state in host memory (`deepspeed`)."""

    offload_parameters: Annotated[bool, PLACEMENT] = False
    """Keep partitioned weights in host memory: `deepspeed` with ZeRO 3, or `fsdp`, which then
    offloads gradients and optimizer state too."""

    gradient_checkpointing: Annotated[bool, PLACEMENT] = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more
    compute."""

    deepspeed: Annotated[dict[str, Any], PLACEMENT] = Field(default_factory=dict)
    """Additional keys of DeepSpeed's JSON config; one that contradicts a field here is an error."""

    @property
    def traits(self) -> StrategyTraits:
        """Capabilities of the strategy."""
        return STRATEGIES[self.strategy]

    @property
    def resolved_zero_stage(self) -> int:
        """ZeRO stage in effect with `deepspeed`."""
        return self.zero_stage or DEFAULT_ZERO_STAGE

    @property
    def layout(self) -> ShardingLayout:
        """Sharding layout of the strategy."""
        zero: dict[int, ShardingLayout] = {1: "ZeRO 1", 2: "ZeRO 2", 3: "ZeRO 3"}
        return zero[self.resolved_zero_stage] if self.strategy == "deepspeed" else self.strategy

    @model_validator(mode="after")
    def _check(self) -> "EngineConfig":
        problems: list[str] = []
        if self.strategy != "deepspeed":
            problems += [
                f"{field}: got {value!r}, which only DeepSpeed uses, but strategy is "
                f"{self.strategy}; remove it, or set strategy=deepspeed"
                for field, value in (("zero_stage", self.zero_stage), ("deepspeed", self.deepspeed))
                if value
            ]
        if self.offload_optimizer and self.strategy == "fsdp":
            problems.append(
                "offload_optimizer: got true, but fsdp offloads optimizer state only together with "
                "the weights; set offload_parameters=true instead"
            )
        if self.offload_optimizer and self.strategy == "ddp":
            problems.append(
                "offload_optimizer: got true, but strategy ddp keeps the full optimizer state on "
                "the device; set it to false, or set strategy=deepspeed"
            )
        partitions = self.strategy == "fsdp" or (
            self.strategy == "deepspeed" and self.resolved_zero_stage == 3
        )
        if self.offload_parameters and not partitions:
            how = (
                f"zero_stage {self.resolved_zero_stage}"
                if self.strategy == "deepspeed"
                else "strategy ddp"
            )
            problems.append(
                f"offload_parameters: got true, but {how} does not partition weights; set "
                "strategy=fsdp, or strategy=deepspeed with zero_stage=3"
            )
        if problems:
            raise ConfigError(problems)
        return self


BadStepAction = Literal["stop", "skip", "rollback"]
"""What to do about a step with a non-finite loss or gradient."""


DEFAULT_MAX_BAD_STEPS = 10


@settings
class OptimConfig:
    """AdamW (arXiv:1711.05101); weight decay on matrices, not on norms, biases and magnitudes."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""

    lora_plus_ratio: Annotated[float, Field(ge=1)] | None = None
    """Learning rate of an adapter's B factors as a multiple of that of its A factors (LoRA+,
    arXiv:2402.12354). Null or 1: the same rate."""

    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of embed_tokens and lm_head, or of their new rows, if they are trained.
    Null: `learning_rate`."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of matrices; each step multiplies it by the group's learning rate."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the running mean of gradients."""

    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of the running mean of squared gradients."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Term added to the denominator of the update, for numerical stability."""

    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise scale alpha of NEFTune (arXiv:2310.05914): in training, uniform noise within
    alpha / sqrt(L D) is added to the input embeddings of a document of L tokens, D being the
    hidden size. Null: no noise."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global L2 norm to which gradients are clipped. Null: no clipping."""

    on_bad_step: BadStepAction = "stop"
    """What to do after a bad step, one with a non-finite loss or gradient, which updates no weight.
    `stop`: the run ends at its newest checkpoint. `skip`: it continues with the next step.
    `rollback`: it restores the weights and moments of the newest checkpoint (other than one saved
    at a stop), which undoes the steps since, and continues with the next step; no sample is read
    again. Each bad step is a line of `bad_steps.jsonl` in the run directory, with its samples."""

    max_bad_steps: Annotated[int, Field(ge=1)] = DEFAULT_MAX_BAD_STEPS
    """Consecutive bad steps allowed with `skip` or `rollback`; one more ends the run. A run that
    ends without a step that updated the weights fails, however few its steps are."""

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
