"""Data mixture of a run: source names, configured weights, and the resulting shares.

    problems = check_mixture(config.data.sources, total_positions=8000)
    sources = cut_sources(config.data.sources, split, "isolated", 512, fingerprint=..., seed=1)
    log_mixture(sources, plan.order.shares, plan.total_positions)

`order.py` turns the weights into an order of sequences.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.best_fit import cut_sequences
from raytune_llama.data.batches.config import (
    MixedSource,
    SequenceForm,
    source_names,
)
from raytune_llama.data.batches.packing import SourceSequences, find_source_spans
from raytune_llama.data.store.token_store import TokenSplit

logger = logging.getLogger(__name__)

WARN_EPOCHS = 4.0
"""Number of epochs beyond which repeated text is worth much less than new text: Muennighoff et al.
2023, "Scaling Data-Constrained Language Models", arXiv:2305.16264."""


@dataclass(frozen=True)
class TrainingSource:
    """A source that has at least one training sequence."""

    name: str
    """Name in metrics and manifests."""
    weight: float | None
    """Configured weight."""
    sequences: SourceSequences
    """Training sequences of the source."""


def cut_sources(
    configs: Sequence[MixedSource],
    split: TokenSplit,
    form: SequenceForm,
    sequence_tokens: int,
    *,
    fingerprint: str,
    seed: int,
) -> tuple[TrainingSource, ...]:
    """Cut each source of a split into sequences; sources without any are omitted.

    Raises:
        ConfigError: No source has a sequence, or a source with a weight has none.
    """
    names, spans = source_names(configs), find_source_spans(split)
    assert len(configs) > max(spans, default=-1), "the store has sources that the config lacks"
    found: list[TrainingSource] = []
    problems: list[str] = []
    for number, (name, config) in enumerate(zip(names, configs, strict=True)):
        span = spans.get(number)
        sequences = span and cut_sequences(
            span, form, sequence_tokens, fingerprint=fingerprint, seed=seed
        )
        if sequences and sequences.num_sequences:
            found.append(TrainingSource(name, config.weight, sequences))
        elif config.weight is not None:
            tokens = len(span.tokens) if span else 0
            problems.append(
                f"data.sources.{number}.weight: got {config.weight}, but {name} has {tokens} "
                "training tokens, too few for a sequence; drop the source, or add text to it"
            )
    if not found and not problems:
        problems.append(
            f"data.sources: got {split.num_tokens} training tokens, wanted at least 2 from one "
            "source; add text"
        )
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def log_mixture(
    sources: Sequence[TrainingSource], shares: Sequence[float], total_positions: int
) -> None:
    """Log each source's share and epochs; warn if a source is repeated too often.

    Args:
        sources: All sources with sequences.
        shares: Share of the run's sequences per source.
        total_positions: Number of sequences in the run.
    """
    asked = sum(source.weight or 0.0 for source in sources)
    for source, share in zip(sources, shares, strict=True):
        sequences, num_read = source.sequences, source.sequences.num_read_tokens
        epochs = share * total_positions / sequences.num_sequences
        wanted = "" if source.weight is None else f" (configured: {source.weight / asked:.4%})"
        logger.info(
            "source %s: %.4f%% of the run's sequences%s, %.4g epochs; %d sequences per epoch "
            "with %d of %d tokens, %d unused",
            source.name,
            100 * share,
            wanted,
            epochs,
            sequences.num_sequences,
            num_read,
            sequences.num_tokens,
            sequences.num_tokens - num_read,
        )
        # Crops differ between epochs, so that an epoch may read only a part of the tokens.
        readings = epochs * num_read / sequences.num_tokens
        if readings > WARN_EPOCHS:
            logger.warning(
                "source %s: the run reads each of its tokens %.1f times on average; beyond %g "
                "times, repeated text is worth much less than new text (Muennighoff et al. 2023, "
                "arXiv:2305.16264): lower its weight, train for fewer steps, or add text",
                source.name,
                readings,
                WARN_EPOCHS,
            )


def mixture_record(
    sources: Sequence[TrainingSource], num_sequences: Sequence[int], num_targets: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return the sequences, targets and epochs trained so far, by source name, as JSON data.

    Args:
        sources: All sources with sequences.
        num_sequences: Number of sequences trained on, per source.
        num_targets: Number of target tokens trained on, per source.
    """
    all_sequences, all_targets = max(sum(num_sequences), 1), max(sum(num_targets), 1)
    return {
        source.name: {
            "weight": source.weight,
            "sequences": sequences,
            "sequence_share": sequences / all_sequences,
            "target_tokens": targets,
            "target_share": targets / all_targets,
            "epochs": sequences / source.sequences.num_sequences,
        }
        for source, sequences, targets in zip(sources, num_sequences, num_targets, strict=True)
    }
