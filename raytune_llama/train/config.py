"""The settings of a training run, composed from the modules that use them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config import PLACEMENT, ConfigError, settings
from raytune_llama.data.encode import DataConfig
from raytune_llama.data.mixture import check_mixture
from raytune_llama.data.packing import PackedForm, SequenceForm
from raytune_llama.model.embeddings import EmbeddingsConfig
from raytune_llama.model.llama import ModelConfig
from raytune_llama.model.lora import LoraConfig
from raytune_llama.storage import Place
from raytune_llama.train.checkpoint import CheckpointConfig
from raytune_llama.train.engine import EngineConfig, OptimConfig
from raytune_llama.train.schedule import ScheduleConfig


@settings
class BatchConfig:
    """What one optimizer step sees."""

    sequence_tokens: Annotated[int, Field(ge=2)] = 512
    """Tokens of a sequence."""

    sequences_per_step: Annotated[int, Field(ge=1)] = 8
    """Sequences of one optimizer step over all workers, whatever their number."""

    micro_batch_sequences: Annotated[int, Field(ge=1), PLACEMENT] = 1
    """Sequences of one forward pass of one worker; has to divide `sequences_per_step`."""

    packing: Literal["packed", "crops", "seed_blocks"] = "packed"
    """How a source becomes sequences. `packed`: cut every `sequence_tokens`, nothing is lost.
    `crops`: of each document one window an epoch, at a new random place; a shorter document is
    padded. `seed_blocks`: as the Chinese-LLaMA scripts, 1,000 documents of a file joined and cut,
    the remainder dropped. Evaluation is always packed."""

    isolate_documents: bool | None = None
    """Whether documents in one sequence don't see each other, and none predicts the next one's
    first token. False: plain concatenation. Null: true, but false with `seed_blocks`, which is
    plain concatenation."""

    @model_validator(mode="after")
    def _check(self) -> "BatchConfig":
        problems: list[str] = []
        if self.sequences_per_step % self.micro_batch_sequences:
            divisors = [
                n for n in range(1, self.sequences_per_step + 1) if not self.sequences_per_step % n
            ]
            problems.append(
                f"micro_batch_sequences: {self.micro_batch_sequences} does not divide "
                f"sequences_per_step, {self.sequences_per_step}; choose one of "
                f"{', '.join(map(str, divisors[:12]))}"
            )
        if self.packing == "seed_blocks" and self.isolate_documents:
            problems.append(
                "isolate_documents: got true, but seed_blocks joins documents plainly; set it to "
                "null, or use packing=packed"
            )
        if self.packing == "crops" and self.isolate_documents is False:
            problems.append(
                "isolate_documents: got false, but a crop holds one document; set it to null, or "
                "use packing=packed"
            )
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def evaluation_form(self) -> PackedForm:
        """How validation text is cut; its documents see each other where those trained on do."""
        joined = self.isolate_documents is False or self.packing == "seed_blocks"
        return "joined" if joined else "isolated"

    @property
    def form(self) -> SequenceForm:
        """How the text trained on is cut."""
        return self.evaluation_form if self.packing == "packed" else self.packing


@settings
class EvalConfig:
    """Evaluation on the token store's validation documents, before, during and after training."""

    every_steps: Annotated[int, Field(ge=1)] | None = 100
    """Optimizer steps between evaluations; null: before the first and after the last only."""

    max_sequences: Annotated[int, Field(ge=1)] | None = 256
    """Sequences evaluated: of each source its share, at even distances; null: all."""


@settings
class ScaleConfig:
    """The workers, and what Ray is asked for."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    """Training processes, one a GPU where `use_gpu`."""

    use_gpu: bool = False
    """Train on GPUs over NCCL; false: on CPUs over gloo."""

    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved for a worker, and its number of threads."""

    wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """How long an autoscaling cluster may take to bring the nodes; 0: refuse at once what the
    cluster does not have."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of the workers from the newest checkpoint before the run gives up."""

    collective_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """A worker that waits longer for the others fails, and the workers are restarted."""

    network_interface: str | None = None
    """Interface for gloo and NCCL, such as eth0, where hostnames resolve to a loopback address;
    null: the libraries choose."""


@settings
class LoggingConfig:
    """What a run tells while it runs; every step is in metrics.jsonl in any case."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between progress lines."""

    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""


@settings
class PretrainConfig:
    """Continued pre-training of a causal LM on plain text."""

    run_dir: Annotated[str, Field(min_length=1), PLACEMENT]
    """Directory of the run: on storage that every node mounts, or `s3://...`, `gs://...`. The same
    command with the same directory goes on where the run was. Object storage shows metrics as of
    the newest evaluation or checkpoint, and saving and resuming need room for one checkpoint in
    the temporary folder (TMPDIR) of the nodes."""

    train: Literal["lora", "full", "embeddings"] = "lora"
    """What is trained: an adapter (and `lora.modules_to_save`), every weight, or the embedding
    tables alone (`embeddings`), which comes first where the vocabulary has grown."""

    lora: LoraConfig | None = None
    """A new adapter; null with `adapter`, or where none is trained."""

    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    """The tables that `train: embeddings` trains."""

    adapter: Annotated[str | None, PLACEMENT] = None
    """Directory of an adapter in PEFT's format to go on from, with its own settings; null: a new
    one."""

    model: ModelConfig
    """Base model and tokenizer."""

    data: Annotated[DataConfig, PLACEMENT]
    """Text and token store; compared by the store's fingerprint and the sources' weights."""

    batch: BatchConfig = BatchConfig()
    """Sequences and steps."""

    optim: OptimConfig = OptimConfig()
    """Optimizer."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps of the run; null: given by `num_epochs`."""

    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training split, the last step may be smaller; null: given by `max_steps`.
    Sources with weights have epochs of their own, and need `max_steps`."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Decides the adapter's start, the order of the sequences and dropout."""

    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO, memory."""

    scale: Annotated[ScaleConfig, PLACEMENT] = ScaleConfig()
    """Workers and resources."""

    checkpoint: Annotated[CheckpointConfig, PLACEMENT] = CheckpointConfig()
    """Saving."""

    eval: Annotated[EvalConfig, PLACEMENT] = EvalConfig()
    """Evaluation."""

    logging: Annotated[LoggingConfig, PLACEMENT] = LoggingConfig()
    """Progress."""

    plan: Annotated[bool, PLACEMENT] = False
    """Print parameters, memory by ZeRO stage, steps and disk of the run, and start nothing; the
    model's weights need not be there."""

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        problems: list[str] = []
        if (self.max_steps is None) == (self.num_epochs is None):
            problems.append("max_steps: set either max_steps or num_epochs, and the other to null")
        if self.train != "lora" and (self.lora is not None or self.adapter is not None):
            whole = "every weight" if self.train == "full" else "embedding tables alone"
            problems.append(
                f"train: {self.train} trains {whole}; set lora and adapter to null, or use lora"
            )
        if self.train != "embeddings" and self.embeddings != EmbeddingsConfig():
            problems.append(
                f"embeddings: train is {self.train}, which ignores these fields; remove them, or "
                "set train=embeddings"
            )
        if self.train == "lora" and (self.lora is None) == (self.adapter is None):
            problems.append(
                "lora: set lora for a new adapter, or adapter to go on from one with its own "
                "settings, and the other to null"
            )
        problems += self._check_sources()
        num_workers, micro_batch = self.scale.num_workers, self.batch.micro_batch_sequences
        if num_workers * micro_batch > self.batch.sequences_per_step:
            problems.append(
                f"scale.num_workers: {num_workers} workers with micro-batches of {micro_batch} "
                f"exceed batch.sequences_per_step, {self.batch.sequences_per_step}; use fewer "
                "workers, smaller micro-batches or a larger step"
            )
        on_cpu_with_zero = not self.scale.use_gpu and self.engine.zero_stage > 0
        if self.engine.precision == "fp16" and on_cpu_with_zero:
            problems.append(
                "engine.precision: DeepSpeed has no fp16 on CPUs; use bf16, fp32 or zero_stage=0"
            )
        if problems:
            raise ConfigError(problems)
        return self

    def _check_sources(self) -> list[str]:
        total = self.max_steps and self.max_steps * self.batch.sequences_per_step
        problems = check_mixture(self.data.sources, total)
        if self.num_epochs is not None and any(source.weight for source in self.data.sources):
            problems.append(
                f"num_epochs: got {self.num_epochs}, but sources with weights have epochs of their "
                "own; set max_steps, or drop the weights"
            )
        return problems

    @property
    def run_place(self) -> Place:
        """Where `run_dir` is."""
        return Place.parse(self.run_dir, "run_dir")

    @property
    def result_name(self) -> str:
        """Name of the output directory in `run_dir`."""
        return "pt_lora_model" if self.train == "lora" else "pt_model"
