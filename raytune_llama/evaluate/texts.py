"""Bits per byte and perplexity of plain text: the same computation as in training's evaluation.

Texts are encoded into a token store per tokenizer, and evaluated in blocks of sequences, which
workers share and a resumed evaluation skips.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.config import EvaluationForm
from raytune_llama.data.batches.evaluation import (
    EvaluationSource,
    read_evaluation_batches,
    select_evaluation_sources,
)
from raytune_llama.data.config import DataConfig
from raytune_llama.data.store.token_store import open_store
from raytune_llama.evaluate.config import TextsConfig
from raytune_llama.evaluate.models import InProcessModel
from raytune_llama.evaluate.results import TextScore
from raytune_llama.model.llama import check_document_isolation
from raytune_llama.model.loss import IGNORE_INDEX

BLOCK_SEQUENCES: Final = 64
"""Sequences per unit of work."""

SEQUENCE_TOKENS: Final = 1024
"""Default of `TextsConfig.sequence_tokens`, if the model has so many positions."""

_BATCH_TOKENS = 4096
"""Tokens per forward pass, padding included, if a sequence is not longer."""


@dataclass(frozen=True)
class TextBlock:
    """Some sequences of one source; picklable."""

    data: DataConfig
    """Token store with the texts."""

    fingerprint: str
    """Fingerprint of the store."""

    source: str
    """Name of the source."""

    sequence_tokens: int
    """Tokens per sequence."""

    isolate_documents: bool
    """Whether documents do not attend to each other."""

    index: int
    """Index of the block in the source."""

    num_blocks: int
    """Number of blocks of the source, which has the sequences of this index modulo this number."""

    @property
    def name(self) -> str:
        """Name in log lines."""
        return f"text {self.source}, part {self.index + 1} of {self.num_blocks}"

    def sources(self) -> dict[str, tuple[EvaluationSource, float]]:
        """Return the sequences and the number of text bytes of each source of the store."""
        form = "isolated" if self.isolate_documents else "joined"
        return _open_sources(self.data, self.fingerprint, self.sequence_tokens, form)

    def identity(self) -> dict[str, Any]:
        """Return what decides the result, besides the model."""
        return {
            "text": self.source,
            "store": self.fingerprint,
            "sequence_tokens": self.sequence_tokens,
            "isolate_documents": self.isolate_documents,
            "block": [self.index, self.num_blocks],
        }


def text_store_config(config: TextsConfig, folder: Path) -> DataConfig:
    """Return the token store of texts, in a folder; documents begin and end as in training."""
    return DataConfig(store_dir=str(folder), sources=config.sources)


def plan_text_blocks(config: TextsConfig, data: DataConfig, max_context: int) -> list[TextBlock]:
    """Return the units of work for one model, from an existing token store.

    Args:
        config: settings of the texts.
        data: their token store.
        max_context: the model's number of positions.

    Raises:
        ConfigError: `sequence_tokens` exceeds it.
    """
    wanted = config.sequence_tokens or min(SEQUENCE_TOKENS, max_context)
    if wanted > max_context:
        raise ConfigError(
            [f"texts.sequence_tokens: got {wanted}, but a model has {max_context} positions"]
        )
    fingerprint = open_store(data).fingerprint
    first = TextBlock(data, fingerprint, "", wanted, config.isolate_documents, 0, 1)
    blocks: list[TextBlock] = []
    for name, (source, _) in first.sources().items():
        count = math.ceil(source.num_evaluated / BLOCK_SEQUENCES)
        blocks += [replace(first, source=name, index=n, num_blocks=count) for n in range(count)]
    return blocks


@functools.lru_cache(maxsize=1)
def _open_sources(
    data: DataConfig,
    fingerprint: str,
    sequence_tokens: int,
    form: EvaluationForm,
) -> dict[str, tuple[EvaluationSource, float]]:
    """Return the sequences and text bytes of each source, cut once for all blocks of a process."""
    store = open_store(data)
    assert store.fingerprint == fingerprint, "published stores do not change"
    found = select_evaluation_sources(
        data.sources, store.split("train"), form, sequence_tokens, max_sequences=None
    )
    return {source.name: (source, source.num_bytes or 0.0) for source in found}


def evaluate_block(model: InProcessModel, block: TextBlock) -> dict[str, Any]:
    """Return the summed loss of a block in nats and its number of target tokens, as JSON data.

    Raises:
        ConfigError: the model can't isolate documents, which is asked for.
    """
    if block.isolate_documents:
        problems = check_document_isolation(model.served.model)
        if problems:
            raise ConfigError([f"texts.isolate_documents: {problem}" for problem in problems])
    source, num_bytes = block.sources()[block.source]
    losses: list[float] = []
    num_targets = 0
    for batch in read_evaluation_batches(
        source,
        micro_batch_sequences=max(1, _BATCH_TOKENS // block.sequence_tokens),
        rank=block.index,
        world_size=block.num_blocks,
    ):
        losses.append(model.loss_sum(batch))
        num_targets += int((batch.labels_BT != IGNORE_INDEX).sum())
    return {
        "source": block.source,
        "loss_sum": math.fsum(losses),
        "num_targets": num_targets,
        "num_bytes": num_bytes,
        "store": block.fingerprint,
    }


def combine_blocks(blocks: Sequence[Mapping[str, Any]]) -> tuple[TextScore, ...]:
    """Return the score of each source from the results of all its blocks."""
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for block in blocks:
        by_source.setdefault(block["source"], []).append(block)
    return tuple(_combine(name, parts) for name, parts in by_source.items())


def _combine(name: str, parts: Sequence[Mapping[str, Any]]) -> TextScore:
    loss_sum = math.fsum(part["loss_sum"] for part in parts)
    num_targets = sum(part["num_targets"] for part in parts)
    num_bytes = round(parts[0]["num_bytes"])
    return TextScore(
        name,
        bits_per_byte=loss_sum / math.log(2) / num_bytes,
        perplexity=math.exp(min(loss_sum / num_targets, 700.0)),
        num_tokens=num_targets,
        num_bytes=num_bytes,
        hash=parts[0]["store"],
    )
