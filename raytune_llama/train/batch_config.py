"""What one optimizer step sees: how many sequences, and how text becomes them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import PLACEMENT, ConfigError, settings
from raytune_llama.data.batches.packing import EvaluationForm, SequenceForm


@settings
class BatchConfig:
    """What one optimizer step sees."""

    sequence_tokens: Annotated[int, Field(ge=2)] = 512
    """Tokens of a sequence."""

    sequences_per_step: Annotated[int, Field(ge=1)] = 8
    """Sequences of one optimizer step over all workers, whatever their number."""

    micro_batch_sequences: Annotated[int, Field(ge=1), PLACEMENT] = 1
    """Sequences of one forward pass of one worker; has to divide `sequences_per_step`."""

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
    """Steps of pre-training."""

    packing: Literal["packed", "crops", "seed_blocks"] = "packed"
    """How a source becomes sequences. `packed`: cut every `sequence_tokens`, nothing is lost.
    `crops`: of each document one window an epoch, at a new random place; a shorter document is
    padded. `seed_blocks`: as the Chinese-LLaMA scripts, 1,000 documents of a file joined and cut,
    the remainder dropped. Evaluation is always packed."""

    isolate_documents: bool | None = None
    """Whether documents in one sequence don't see each other, and none predicts the next one's
    first token. False: plain concatenation. Null: true, but false with `seed_blocks`, which is
    plain concatenation."""

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
        """How validation text is cut; its documents see each other where those trained on do."""
        joined = self.isolate_documents is False or self.packing == "seed_blocks"
        return "joined" if joined else "isolated"

    @property
    def form(self) -> SequenceForm:
        """How the text trained on is cut."""
        return self.evaluation_form if self.packing == "packed" else self.packing

    @property
    def isolates_documents(self) -> bool:
        """Whether documents of one sequence must not see each other."""
        return self.evaluation_form == "isolated"


@settings
class ChatBatchConfig(BatchConfig):
    """Steps of instruction tuning."""

    packing: Literal["packed", "padded"] = "packed"
    """How conversations become sequences. `packed`: as many as fit, by best fit, and none sees
    another. `padded`: one each, a step's about as long, padded to the longest of a micro-batch.
    Evaluation is always packed."""

    @property
    def evaluation_form(self) -> EvaluationForm:
        """How validation conversations are put together."""
        return "fitted"

    @property
    def form(self) -> SequenceForm:
        """How those trained on are."""
        return "fitted" if self.packing == "packed" else "padded"

    @property
    def isolates_documents(self) -> bool:
        """Whether documents of one sequence must not see each other."""
        return True
