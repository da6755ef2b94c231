"""How a step is spread over the workers: the settings that choose an engine and its memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import PLACEMENT, ConfigError, settings
from raytune_llama.model.llama import Precision

Strategy = Literal["deepspeed", "fsdp", "ddp"]

ShardingLayout = Literal["ddp", "ZeRO 1", "ZeRO 2", "ZeRO 3", "fsdp"]
"""How weights, gradients and optimizer state lie in the workers' memory."""

DEFAULT_ZERO_STAGE = 2


@dataclass(frozen=True)
class StrategyTraits:
    """What a strategy can do; the rest of the package asks here instead of for its name."""

    layouts: tuple[ShardingLayout, ...]
    """What it may be set to."""

    takes_quantized: bool = False
    """Whether the frozen base may be packed in 4 or 8 bits, which cannot be cut to pieces."""

    has_fp16_on_cpus: bool = True
    """Whether it computes in fp16 on CPUs."""

    shards_by_layer: bool = False
    """Whether it needs the decoder's layers in a list."""


STRATEGIES: Mapping[Strategy, StrategyTraits] = {
    "deepspeed": StrategyTraits(("ZeRO 1", "ZeRO 2", "ZeRO 3"), has_fp16_on_cpus=False),
    "fsdp": StrategyTraits(("fsdp",), shards_by_layer=True),
    "ddp": StrategyTraits(("ddp",), takes_quantized=True),
}
"""Every strategy. A new one is an entry here, in `build_engine` and in the memory estimate."""


def strategies_with(trait: Callable[[StrategyTraits], bool]) -> str:
    """Name the strategies with a trait, as a message lists them: `ddp or fsdp`."""
    return " or ".join(sorted(name for name, traits in STRATEGIES.items() if trait(traits)))


@settings
class EngineConfig:
    """How a step is computed and spread over the workers."""

    precision: Precision = "bf16"
    """Of frozen weights and of computing. Trained weights have float32 masters in any case."""

    strategy: Annotated[Strategy, PLACEMENT] = "deepspeed"
    """What spreads the step: `deepspeed`, its ZeRO with `zero_stage`; `fsdp`, PyTorch's FSDP2,
    which cuts every weight into a part a worker; `ddp`, every worker holds everything and
    gradients are summed once a step. The losses and the checkpoints are the same."""

    zero_stage: Annotated[Literal[1, 2, 3] | None, PLACEMENT] = None
    """What DeepSpeed ZeRO partitions: 1 optimizer state, 2 and gradients, 3 and weights. Null: 2
    with `deepspeed`, none with another strategy; `strategy: ddp` is what some call stage 0."""

    offload_optimizer: Annotated[bool, PLACEMENT] = False
    """Keep the optimizer state in host memory (`deepspeed`)."""

    offload_parameters: Annotated[bool, PLACEMENT] = False
    """Keep partitioned weights in host memory: of `deepspeed` with ZeRO 3, and of `fsdp`, whose
    gradients and optimizer state go with them."""

    gradient_checkpointing: Annotated[bool, PLACEMENT] = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more
    computing."""

    deepspeed: Annotated[dict[str, Any], PLACEMENT] = Field(default_factory=dict)
    """Further keys of DeepSpeed's JSON; one that contradicts a field here is refused."""

    @property
    def traits(self) -> StrategyTraits:
        """What the strategy can do."""
        return STRATEGIES[self.strategy]

    @property
    def resolved_zero_stage(self) -> int:
        """The stage of ZeRO under `deepspeed`."""
        return self.zero_stage or DEFAULT_ZERO_STAGE

    @property
    def layout(self) -> ShardingLayout:
        """How the strategy lays out what a worker holds."""
        zero: dict[int, ShardingLayout] = {1: "ZeRO 1", 2: "ZeRO 2", 3: "ZeRO 3"}
        return zero[self.resolved_zero_stage] if self.strategy == "deepspeed" else self.strategy

    @model_validator(mode="after")
    def _check(self) -> "EngineConfig":
        problems: list[str] = []
        if self.strategy != "deepspeed":
            problems += [
                f"{field}: got {value!r}, which only DeepSpeed reads, but strategy is "
                f"{self.strategy}; remove it, or set strategy=deepspeed"
                for field, value in (("zero_stage", self.zero_stage), ("deepspeed", self.deepspeed))
                if value
            ]
        if self.offload_optimizer and self.strategy == "fsdp":
            problems.append(
                "offload_optimizer: got true, but fsdp moves optimizer state only along with the "
                "weights; set offload_parameters=true instead"
            )
        if self.offload_optimizer and self.strategy == "ddp":
            problems.append(
                "offload_optimizer: got true, but with strategy ddp every worker holds everything "
                "where it computes; set it to false, or set strategy=deepspeed"
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
