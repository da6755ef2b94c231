"""The settings of a training run, composed from the modules that use them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import (
    FINGERPRINTED,
    PLACEMENT,
    ConfigError,
    override,
    settings,
)
from raytune_llama.data.batches.config import MixedSource, check_mixture
from raytune_llama.data.config import ChatDataConfig, DataConfig
from raytune_llama.model.config import EmbeddingsConfig, LoraConfig, ModelConfig
from raytune_llama.train.batch_config import BatchConfig, ChatBatchConfig, TextBatchConfig
from raytune_llama.train.checkpoint.config import CheckpointConfig
from raytune_llama.train.engines.config import EngineConfig, OptimConfig, strategies_with
from raytune_llama.train.eval_config import EvalConfig
from raytune_llama.train.monitoring.config import LoggingConfig
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.schedule import ScheduleConfig

if TYPE_CHECKING:
    from raytune_llama.storage.place import Place

DORA_PARTITIONED = (
    "engine.zero_stage: got 3, which shards the weights whose norms DoRA computes in each forward "
    "pass; use 1 or 2, engine.strategy=ddp, or an adapter without DoRA"
)
"""Error for DoRA under ZeRO 3, where PEFT would read weights that are not gathered."""


@settings
class TrainConfig:
    """Settings of every training run; the subclasses add `data`, `batch` and `train`."""

    run_dir: Annotated[str, Field(min_length=1), PLACEMENT]
    """Directory of the run: on storage that every node mounts, or `s3://...`, `gs://...`. The same
    command with the same directory resumes the run. On object storage, metrics are uploaded with
    each evaluation and checkpoint, and each node's temporary folder (TMPDIR) needs 2 GiB per worker
    for saving, and room for one checkpoint for resuming."""

    lora: LoraConfig | None = None
    """Settings of a new adapter; null: `adapter` is trained further, or no adapter is trained."""

    adapter: Annotated[str | None, PLACEMENT] = None
    """Directory of an adapter in PEFT's format to continue training, with its own settings: local,
    `s3://...` or `gs://...`, or on the hub, `hf://org/name[@revision]`; null: start a new one."""

    model: ModelConfig
    """Base model and tokenizer."""

    optim: OptimConfig = OptimConfig()
    """Optimizer settings."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate schedule."""

    max_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of optimizer steps; null: given by `num_epochs`. 0: evaluate the model or `adapter` on
    the validation text, train nothing and write no result; the same run may be continued later with
    more steps."""

    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training split; the last step may be smaller; null: given by `max_steps`.
    Sources with weights have epochs of their own, and need `max_steps`."""

    stop_step: Annotated[int, Field(ge=1)] | None = None
    """Step after which the run ends, with the learning rate schedule of the full run; null: run to
    the end. It may change while the run has not ended: an interrupted run that is resumed with the
    step after its newest checkpoint ends there and has its result. A sweep's `best.yaml` sets it if
    the winning trial was stopped early."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Random seed of the adapter's initialization, the order of the sequences and dropout."""

    engine: EngineConfig = EngineConfig()
    """Precision, parallelism strategy and memory savings."""

    scale: Annotated[ScaleConfig, PLACEMENT] = ScaleConfig()
    """Workers and their resources."""

    checkpoint: Annotated[CheckpointConfig, PLACEMENT] = CheckpointConfig()
    """Checkpoint settings."""

    eval: Annotated[EvalConfig, PLACEMENT] = EvalConfig()
    """Evaluation settings."""

    logging: Annotated[LoggingConfig, PLACEMENT] = LoggingConfig()
    """Progress logging and trackers."""

    plan: Annotated[bool, PLACEMENT] = False
    """Print the run's parameters, memory per strategy, steps and disk space, and start nothing; the
    model's weights are not needed."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        problems: list[str] = []
        if (self.max_steps is None) == (self.num_epochs is None):
            problems.append("max_steps: set either max_steps or num_epochs, and the other to null")
        end = math.inf if self.max_steps is None else self.max_steps
        if self.stop_step is not None and self.stop_step >= end:
            problems.append(
                f"stop_step: got {self.stop_step}, wanted less than max_steps, {self.max_steps}; "
                "set it to null"
            )
        problems += self._check_kind()
        if self.optim.lora_plus_ratio is not None and self.lora is None and self.adapter is None:
            problems.append(
                f"optim.lora_plus_ratio: got {self.optim.lora_plus_ratio}, but the run has no "
                "adapter whose factors could differ; set it to null, or train=lora"
            )
        kind = self.model.quantization
        if kind is not None and not self.engine.traits.takes_quantized:
            others = strategies_with(lambda traits: traits.takes_quantized)
            problems.append(
                f"model.quantization: got {kind}, but engine.strategy is {self.engine.strategy}, "
                f"which cannot shard packed weights; set engine.strategy={others}, or "
                "model.quantization=null"
            )
        if kind is not None and self.lora is not None and self.lora.init == "pissa":
            problems.append(
                "lora.init: got pissa, which needs the SVD of unquantized weights, but "
                f"model.quantization is {kind}; use default, or model.quantization=null"
            )
        is_fp16_on_cpus = self.engine.precision == "fp16" and not self.scale.use_gpu
        if is_fp16_on_cpus and not self.engine.traits.has_fp16_on_cpus:
            others = strategies_with(lambda traits: traits.has_fp16_on_cpus)
            problems.append(
                f"engine.precision: got fp16, which {self.engine.strategy} does not support on "
                "CPUs; "
                f"use bf16 or fp32, or engine.strategy={others}"
            )
        if self.lora is not None and self.lora.dora and self.engine.layout == "ZeRO 3":
            problems.append(DORA_PARTITIONED)
        if problems:
            raise ConfigError(problems)
        return self

    def _check_kind(self) -> list[str]:
        return []

    def _check_trained(self, train: str, trained: str) -> list[str]:
        problems: list[str] = []
        if train != "lora" and self.model.quantization is not None:
            problems.append(
                f"model.quantization: got {self.model.quantization}, but train is {train}, and "
                "quantized weights are frozen; set train=lora, or model.quantization=null"
            )
        if train != "lora" and (self.lora is not None or self.adapter is not None):
            problems.append(
                f"train: {train} trains {trained}; set lora and adapter to null, or use lora"
            )
        if train == "lora" and (self.lora is None) == (self.adapter is None):
            problems.append(
                "lora: set either lora (a new adapter) or adapter (continue training one, with its "
                "own settings), and the other to null"
            )
        return problems

    def _check_steps(self, batch: BatchConfig, sources: Sequence[MixedSource]) -> list[str]:
        total = self.max_steps and self.max_steps * batch.sequences_per_step
        problems = check_mixture(sources, total)
        if self.num_epochs is not None and any(source.weight for source in sources):
            problems.append(
                f"num_epochs: got {self.num_epochs}, but sources with weights have epochs of their "
                "own; set max_steps, or drop the weights"
            )
        if self.scale.max_workers * batch.micro_batch_sequences > batch.sequences_per_step:
            problems.append(self._describe_too_many_workers(batch))
        return problems

    def _describe_too_many_workers(self, batch: BatchConfig) -> str:
        """Return that a step has fewer micro-batches than there are workers, and what to set."""
        num_workers, per_step = self.scale.max_workers, batch.sequences_per_step
        micro_batch = batch.micro_batch_sequences
        field = "scale.num_workers.max" if self.scale.elastic_range else "scale.num_workers"
        remedies = [f"{field} to {per_step // micro_batch} at most"]
        smaller = [n for n in range(1, per_step // num_workers + 1) if per_step % n == 0]
        if smaller:
            remedies.append(f"batch.micro_batch_sequences={smaller[-1]}")
        remedies.append(
            f"batch.sequences_per_step={num_workers * micro_batch}, which changes what is learned"
        )
        return (
            f"{field}: {num_workers} workers with micro-batches of {micro_batch} exceed "
            f"batch.sequences_per_step, {per_step}; set {', or '.join(remedies)}"
        )

    @property
    def run_place(self) -> "Place":
        """The parsed `run_dir`."""
        from raytune_llama.storage.place import Place

        return Place.parse(self.run_dir, "run_dir")


@settings
class PretrainConfig(TrainConfig):
    """Continued pre-training of a causal LM on plain text."""

    train: Literal["lora", "full", "embeddings"] = "lora"
    """Trained parameters: an adapter (and `lora.modules_to_save`), every weight, or only the
    embedding tables (`embeddings`), the first stage after the vocabulary was extended."""

    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    """Embedding tables that `train: embeddings` trains."""

    data: Annotated[DataConfig, PLACEMENT, FINGERPRINTED]
    """Text and token store. A resumed run needs the same store fingerprint and source weights."""

    batch: TextBatchConfig = TextBatchConfig()
    """Sequence length, batch sizes and packing."""

    def _check_kind(self) -> list[str]:
        trained = "every weight" if self.train == "full" else "embedding tables alone"
        problems = self._check_trained(self.train, trained)
        if self.train != "embeddings" and self.embeddings != EmbeddingsConfig():
            problems.append(
                f"embeddings: train is {self.train}, which ignores these fields; remove them, or "
                "set train=embeddings"
            )
        problems += [
            f"eval.tasks.{number}.chat_template: got true, but a pre-training run has no chat "
            "template; set it to false"
            for number, task in enumerate(self.eval.tasks)
            if task.chat_template
        ]
        return problems + self._check_steps(self.batch, self.data.sources)

    @property
    def result_name(self) -> str:
        """Name of the output directory in `run_dir`."""
        return "pt_lora_model" if self.train == "lora" else "pt_model"

    @property
    def encoded_data(self) -> DataConfig:
        """Settings that the token store is built from."""
        return self.data


@settings
class SftConfig(TrainConfig):
    """Instruction tuning of a causal LM on conversations."""

    train: Literal["lora", "full"] = "lora"
    """Trained parameters: an adapter (and `lora.modules_to_save`), or every weight."""

    data: Annotated[ChatDataConfig, PLACEMENT, FINGERPRINTED]
    """Conversations and token store. A resumed run needs the same store fingerprint and source
    weights."""

    batch: ChatBatchConfig = ChatBatchConfig()
    """Sequence length, batch sizes and packing."""

    allow_other_template: Annotated[bool, PLACEMENT] = False
    """Allow a chat template other than the one that the model or adapter was tuned with."""

    def _check_kind(self) -> list[str]:
        problems = self._check_trained(self.train, "every weight")
        longest = self.data.chat.max_tokens
        if longest is not None and longest > self.batch.sequence_tokens:
            problems.append(
                f"data.chat.max_tokens: got {longest}, more than batch.sequence_tokens, "
                f"{self.batch.sequence_tokens}; set it to null to truncate there, or raise "
                "batch.sequence_tokens"
            )
        if self.batch.packing == "padded" and any(s.weight for s in self.data.sources):
            problems.append(
                "batch.packing: padded groups conversations of similar length into a step, which "
                "source weights would undo; drop the sources' weights, or use packed"
            )
        return problems + self._check_steps(self.batch, self.data.sources)

    @property
    def result_name(self) -> str:
        """Name of the output directory in `run_dir`."""
        return "sft_lora_model" if self.train == "lora" else "sft_model"

    @property
    def encoded_data(self) -> ChatDataConfig:
        """Settings that the token store is built from; caps conversations at `sequence_tokens`."""
        if self.data.chat.max_tokens is not None:
            return self.data
        return override(self.data, {"chat.max_tokens": self.batch.sequence_tokens})


AnyTrainConfig = PretrainConfig | SftConfig
"""Config of any training run."""
