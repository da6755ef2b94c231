"""The settings of a training run, composed from the modules that use them."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import PLACEMENT, ConfigError, override, settings
from raytune_llama.data.batches.mixture import MixedSource, check_mixture
from raytune_llama.data.config import ChatDataConfig, DataConfig
from raytune_llama.model.embeddings import EmbeddingsConfig
from raytune_llama.model.llama import ModelConfig
from raytune_llama.model.lora import LoraConfig
from raytune_llama.storage.place import Place
from raytune_llama.train.batch_config import BatchConfig, ChatBatchConfig, TextBatchConfig
from raytune_llama.train.checkpoint.layout import CheckpointConfig
from raytune_llama.train.engines.config import EngineConfig, strategies_with
from raytune_llama.train.engines.optimizer import OptimConfig
from raytune_llama.train.eval_config import EvalConfig
from raytune_llama.train.monitoring.config import LoggingConfig
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.schedule import ScheduleConfig

DORA_PARTITIONED = (
    "engine.zero_stage: got 3, which cuts up the weights whose lengths DoRA takes in each pass; "
    "use 1 or 2, engine.strategy=ddp, or an adapter without DoRA"
)
"""Problem of a run with DoRA under ZeRO 3: PEFT reads weights that are not gathered."""


@settings
class TrainConfig:
    """What every kind of training run has; its `data`, `batch` and `train` are the kind's own."""

    run_dir: Annotated[str, Field(min_length=1), PLACEMENT]
    """Directory of the run: on storage that every node mounts, or `s3://...`, `gs://...`. The same
    command with the same directory goes on where the run was. Object storage shows metrics as of
    the newest evaluation or checkpoint, and in the temporary folder (TMPDIR) of the nodes saving
    needs room for 2 GiB a worker, and resuming for one checkpoint."""

    lora: LoraConfig | None = None
    """A new adapter; null with `adapter`, or where none is trained."""

    adapter: Annotated[str | None, PLACEMENT] = None
    """Directory of an adapter in PEFT's format to go on from, with its own settings; null: a new
    one."""

    model: ModelConfig
    """Base model and tokenizer."""

    optim: OptimConfig = OptimConfig()
    """Optimizer."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps of the run; null: given by `num_epochs`."""

    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training split, the last step may be smaller; null: given by `max_steps`.
    Sources with weights have epochs of their own, and need `max_steps`."""

    stop_step: Annotated[int, Field(ge=1)] | None = None
    """The run ends after this step, on the learning rates of a run that goes on; null: none. A
    sweep's `best.yaml` has it where the winner was stopped."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Decides the adapter's start, the order of the sequences and dropout."""

    engine: EngineConfig = EngineConfig()
    """Precision, strategy, memory."""

    scale: Annotated[ScaleConfig, PLACEMENT] = ScaleConfig()
    """Workers and resources."""

    checkpoint: Annotated[CheckpointConfig, PLACEMENT] = CheckpointConfig()
    """Saving."""

    eval: Annotated[EvalConfig, PLACEMENT] = EvalConfig()
    """Evaluation."""

    logging: Annotated[LoggingConfig, PLACEMENT] = LoggingConfig()
    """Progress."""

    plan: Annotated[bool, PLACEMENT] = False
    """Print parameters, memory by strategy, steps and disk of the run, and start nothing; the
    model's weights need not be there."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        problems: list[str] = []
        if (self.max_steps is None) == (self.num_epochs is None):
            problems.append("max_steps: set either max_steps or num_epochs, and the other to null")
        if self.stop_step is not None and self.stop_step >= (self.max_steps or math.inf):
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
                f"which would cut packed weights to pieces; set engine.strategy={others}, or "
                "model.quantization=null"
            )
        if kind is not None and self.lora is not None and self.lora.init == "pissa":
            problems.append(
                "lora.init: got pissa, which takes the singular values of whole weights, but "
                f"model.quantization is {kind}; use default, or model.quantization=null"
            )
        is_fp16_on_cpus = self.engine.precision == "fp16" and not self.scale.use_gpu
        if is_fp16_on_cpus and not self.engine.traits.has_fp16_on_cpus:
            others = strategies_with(lambda traits: traits.has_fp16_on_cpus)
            problems.append(
                f"engine.precision: got fp16, which {self.engine.strategy} does not have on CPUs; "
                f"use bf16 or fp32, or engine.strategy={others}"
            )
        if self.lora is not None and self.lora.dora and self.engine.layout == "ZeRO 3":
            problems.append(DORA_PARTITIONED)
        if problems:
            raise ConfigError(problems)
        return self

    def _check_kind(self) -> list[str]:
        return []

    def _check_trained(self, train: str, whole: str) -> list[str]:
        problems: list[str] = []
        if train != "lora" and self.model.quantization is not None:
            problems.append(
                f"model.quantization: got {self.model.quantization}, but train is {train}, and "
                "quantised weights are frozen; set train=lora, or model.quantization=null"
            )
        if train != "lora" and (self.lora is not None or self.adapter is not None):
            problems.append(
                f"train: {train} trains {whole}; set lora and adapter to null, or use lora"
            )
        if train == "lora" and (self.lora is None) == (self.adapter is None):
            problems.append(
                "lora: set lora for a new adapter, or adapter to go on from one with its own "
                "settings, and the other to null"
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
        num_workers, micro_batch = self.scale.max_workers, batch.micro_batch_sequences
        if num_workers * micro_batch > batch.sequences_per_step:
            field = "scale.num_workers.max" if self.scale.elastic_range else "scale.num_workers"
            problems.append(
                f"{field}: {num_workers} workers with micro-batches of {micro_batch} "
                f"exceed batch.sequences_per_step, {batch.sequences_per_step}; use fewer "
                "workers, smaller micro-batches or a larger step"
            )
        return problems

    @property
    def run_place(self) -> Place:
        """Where `run_dir` is."""
        return Place.parse(self.run_dir, "run_dir")


@settings
class PretrainConfig(TrainConfig):
    """Continued pre-training of a causal LM on plain text."""

    train: Literal["lora", "full", "embeddings"] = "lora"
    """What is trained: an adapter (and `lora.modules_to_save`), every weight, or the embedding
    tables alone (`embeddings`), which comes first where the vocabulary has grown."""

    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    """The tables that `train: embeddings` trains."""

    data: Annotated[DataConfig, PLACEMENT]
    """Text and token store; compared by the store's fingerprint and the sources' weights."""

    batch: TextBatchConfig = TextBatchConfig()
    """Sequences and steps."""

    def _check_kind(self) -> list[str]:
        whole = "every weight" if self.train == "full" else "embedding tables alone"
        problems = self._check_trained(self.train, whole)
        if self.train != "embeddings" and self.embeddings != EmbeddingsConfig():
            problems.append(
                f"embeddings: train is {self.train}, which ignores these fields; remove them, or "
                "set train=embeddings"
            )
        return problems + self._check_steps(self.batch, self.data.sources)

    @property
    def result_name(self) -> str:
        """Name of the output directory in `run_dir`."""
        return "pt_lora_model" if self.train == "lora" else "pt_model"

    @property
    def encoded_data(self) -> DataConfig:
        """What the token store is made from."""
        return self.data


@settings
class SftConfig(TrainConfig):
    """Instruction tuning of a causal LM on conversations."""

    train: Literal["lora", "full"] = "lora"
    """What is trained: an adapter (and `lora.modules_to_save`), or every weight."""

    data: Annotated[ChatDataConfig, PLACEMENT]
    """Conversations and token store; compared by the store's fingerprint and the sources'
    weights."""

    batch: ChatBatchConfig = ChatBatchConfig()
    """Sequences and steps."""

    allow_other_template: Annotated[bool, PLACEMENT] = False
    """Tune with another template than the model or the adapter was tuned with before."""

    def _check_kind(self) -> list[str]:
        problems = self._check_trained(self.train, "every weight")
        longest = self.data.chat.max_tokens
        if longest is not None and longest > self.batch.sequence_tokens:
            problems.append(
                f"data.chat.max_tokens: got {longest}, more than batch.sequence_tokens, "
                f"{self.batch.sequence_tokens}; set it to null to cut there, or raise the other"
            )
        if self.batch.packing == "padded" and any(s.weight for s in self.data.sources):
            problems.append(
                "batch.packing: padded puts conversations of one length into a step, which shares "
                "by weight would undo; drop the sources' weights, or use packed"
            )
        return problems + self._check_steps(self.batch, self.data.sources)

    @property
    def result_name(self) -> str:
        """Name of the output directory in `run_dir`."""
        return "sft_lora_model" if self.train == "lora" else "sft_model"

    @property
    def encoded_data(self) -> ChatDataConfig:
        """What the token store is made from; no conversation is longer than a sequence."""
        if self.data.chat.max_tokens is not None:
            return self.data
        return override(self.data, {"chat.max_tokens": self.batch.sequence_tokens})


AnyTrainConfig = PretrainConfig | SftConfig
"""Of any training run."""
