"""Settings of a step's batch: its size, and how text is packed into sequences."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import PLACEMENT, ConfigError, settings
from raytune_llama.data.batches.config import EvaluationForm, SequenceForm


@settings
class BatchConfig:
    """Batch of one optimizer step."""

    sequence_tokens: Annotated[int, Field(ge=2)] = 512
    """Tokens per sequence. A text must not have more tokens than the model has positions, scaled by
    its own RoPE settings or by `model.rope_scaling`."""

    sequences_per_step: Annotated[int, Field(ge=1)] = 8
    """Sequences per optimizer step, over all workers (global batch size)."""

    micro_batch_sequences: Annotated[int, Field(ge=1), PLACEMENT] = 1
    """Sequences per forward pass of one worker; must divide `sequences_per_step`."""

    @model_validator(mode="after")
    def _check(self) -> "BatchConfig":
        problems = self._check_packing()
        if self.sequences_per_step % self.micro_batch_sequences:
            divisors = [
                n for n in range(1, self.sequences_per_step + 1) if not self.sequences_per_step % n
            ]
            problems.append(
                f"micro_batch_sequences: {self.micro_batch_sequences} does not divide "
                f"sequences_per_step, {self.sequences_per_step}; choose one of "
                f"{', '.join(map(str, divisors[:12]))}"
            )
        if problems:
            raise ConfigError(problems)
        return self

    def _check_packing(self) -> list[str]:
        return []


@settings
class TextBatchConfig(BatchConfig):
    """Batches of pre-training."""

    packing: Literal["packed", "crops", "seed_blocks"] = "packed"
    """How documents become sequences. `packed`: concatenated and cut every `sequence_tokens`,
    without loss. `crops`: one window per document and epoch, at a random offset; a shorter document
    is padded. `seed_blocks`: as the Chinese-LLaMA scripts do, 1,000 documents of a file are joined
    and cut, and the remainder is dropped. Evaluation is always packed."""

    isolate_documents: bool | None = None
    """Whether attention stays within each document of a sequence, and no document predicts the
    first token of the next. False: plain concatenation. Null: true, except with `seed_blocks`,
    which is plain concatenation."""

    def _check_packing(self) -> list[str]:
        problems: list[str] = []
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
        return problems

    @property
    def evaluation_form(self) -> EvaluationForm:
        """How validation text is cut; isolates documents exactly if training does."""
        joined = self.isolate_documents is False or self.packing == "seed_blocks"
        return "joined" if joined else "isolated"

    @property
    def form(self) -> SequenceForm:
        """How the training text is cut."""
        return self.evaluation_form if self.packing == "packed" else self.packing

    @property
    def isolates_documents(self) -> bool:
        """Whether attention must not cross the documents of a sequence."""
        return self.evaluation_form == "isolated"


@settings
class ChatBatchConfig(BatchConfig):
    """Batches of instruction tuning."""

    packing: Literal["packed", "padded"] = "packed"
    """How conversations become sequences. `packed`: best-fit packing, with attention isolated per
    conversation. `padded`: one conversation per sequence, of similar length within a step, padded
    to the longest of the micro-batch. Evaluation is always packed."""

    @property
    def evaluation_form(self) -> EvaluationForm:
        """How validation conversations are packed."""
        return "fitted"

    @property
    def form(self) -> SequenceForm:
        """How training conversations are packed or padded."""
        return "fitted" if self.packing == "packed" else "padded"

    @property
    def isolates_documents(self) -> bool:
        """Whether attention must not cross the documents of a sequence."""
        return True
