"""The sources of a run: what they are called, the shares asked for, and what they come to.

    problems = check_mixture(config.data.sources, total_positions=8000)
    sources = cut_sources(config.data.sources, split, "isolated", 512, fingerprint=..., seed=1)
    log_mixture(sources, plan.order.shares, plan.total_positions)

How weights become an order is in `order.py`.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.best_fit import cut_sequences
from raytune_llama.data.batches.order import block_quotas, block_sequences
from raytune_llama.data.batches.packing import SequenceForm, SourceSequences, find_source_spans
from raytune_llama.data.store.token_store import TokenSplit
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

WARN_EPOCHS = 4.0
"""Text that is read more often than this is worth much less than new text: Muennighoff et al.
2023, "Scaling Data-Constrained Language Models", arXiv:2305.16264."""

_COMPRESSED = (".gz", ".zst", ".bz2")


class MixedSource(Protocol):
    """What a configured source says of its share."""

    @property
    def path(self) -> str:
        """Where its files are."""
        ...

    @property
    def weight(self) -> float | None:
        """Its share of the sequences, relative to the others'."""
        ...

    @property
    def name(self) -> str | None:
        """What it is called; None: as its path."""
        ...


@dataclass(frozen=True)
class TrainingSource:
    """A source that has sequences."""

    name: str
    """In metrics and manifests."""
    weight: float | None
    """As configured."""
    sequences: SourceSequences
    """What it gives."""


def source_names(sources: Sequence[MixedSource]) -> tuple[str, ...]:
    """Return what the sources are called, as configured or by their paths."""
    return tuple(source.name or _name_of(source.path, n) for n, source in enumerate(sources))


def check_mixture(sources: Sequence[MixedSource], total_positions: int | None) -> list[str]:
    """List what is wrong with the sources' names and weights, with field paths.

    Args:
        sources: As configured.
        total_positions: Sequences of the run where weights decide them; None where not known.
    """
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, name in enumerate(source_names(sources)):
        other = first.setdefault(name, number)
        if other != number:
            problems.append(
                f"data.sources.{number}.name: {name!r} is also the name of data.sources.{other} "
                f"({sources[number].path} and {sources[other].path}); give one of them another name"
            )
    weights = [source.weight for source in sources]
    given = {number: weight for number, weight in enumerate(weights) if weight is not None}
    if given and len(given) < len(weights):
        problems.extend(
            f"data.sources.{number}.weight: got null, but data.sources.{min(given)} has "
            f"{given[min(given)]}; give every source a weight, or none"
            for number, weight in enumerate(weights)
            if weight is None
        )
    elif given and total_positions:
        problems.extend(_check_quotas(list(given.values()), total_positions))
    return problems


def cut_sources(
    configs: Sequence[MixedSource],
    split: TokenSplit,
    form: SequenceForm,
    sequence_tokens: int,
    *,
    fingerprint: str,
    seed: int,
) -> tuple[TrainingSource, ...]:
    """Cut each source of a split into sequences; a source without any is left out.

    Raises:
        ConfigError: No source has a sequence, or one with a weight has none.
    """
    names, stretches = source_names(configs), find_source_spans(split)
    assert len(configs) > max(stretches, default=-1), "the store has sources that the config lacks"
    found: list[TrainingSource] = []
    problems: list[str] = []
    for number, (name, config) in enumerate(zip(names, configs, strict=True)):
        stretch = stretches.get(number)
        sequences = stretch and cut_sequences(
            stretch, form, sequence_tokens, fingerprint=fingerprint, seed=seed
        )
        if sequences and sequences.num_sequences:
            found.append(TrainingSource(name, config.weight, sequences))
        elif config.weight is not None:
            tokens = len(stretch.tokens) if stretch else 0
            problems.append(
                f"data.sources.{number}.weight: got {config.weight}, but {name} has {tokens} "
                "tokens to train on, which give no sequence; drop the source, or add text to it"
            )
    if not found and not problems:
        problems.append(
            f"data.sources: there are {split.num_tokens} tokens to train on, wanted at least 2 of "
            "one source; add text"
        )
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def log_mixture(
    sources: Sequence[TrainingSource], shares: Sequence[float], total_positions: int
) -> None:
    """Log what a run will see of each source; warn of text that is read too often.

    Args:
        sources: All sources with sequences.
        shares: Share of the run's sequences that each has.
        total_positions: Sequences of the run.
    """
    asked = sum(source.weight or 0.0 for source in sources)
    for source, share in zip(sources, shares, strict=True):
        sequences, num_read = source.sequences, source.sequences.num_read_tokens
        epochs = share * total_positions / sequences.num_sequences
        wanted = "" if source.weight is None else f" (asked: {source.weight / asked:.4%})"
        logger.info(
            "source %s: %.4f%% of the run's sequences%s, %.4g epochs; an epoch is %d sequences "
            "with %d of its %d tokens, %d are in none",
            source.name,
            100 * share,
            wanted,
            epochs,
            sequences.num_sequences,
            num_read,
            sequences.num_tokens,
            sequences.num_tokens - num_read,
        )
        # Windows of long documents differ from epoch to epoch: not each epoch reads all again.
        readings = epochs * num_read / sequences.num_tokens
        if readings > WARN_EPOCHS:
            logger.warning(
                "source %s: the run reads each of its tokens %.1f times on average; beyond %g "
                "times, repeated text is worth much less than new text (Muennighoff et al. 2023, "
                "arXiv:2305.16264): lower its weight, train for less, or add text",
                source.name,
                readings,
                WARN_EPOCHS,
            )


def mixture_record(
    sources: Sequence[TrainingSource], num_sequences: Sequence[int], num_targets: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return what a run has seen of each source, by name, as JSON data.

    Args:
        sources: All sources with sequences.
        num_sequences: Sequences of each that the run has trained on.
        num_targets: Target tokens of each that the run has trained on.
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


def _check_quotas(weights: list[float], total_positions: int) -> list[str]:
    quotas = block_quotas(weights, total_positions)
    return [
        f"data.sources.{number}.weight: {weights[number]} of {sum(weights):g} is less than one of "
        f"{block_sequences(total_positions)} sequences, in which the shares are met; raise it, "
        "leave the source out, or train for longer"
        for number, quota in enumerate(quotas)
        if quota == 0
    ]


def _name_of(path: str, number: int) -> str:
    """Return the last part of a path, without suffix, of which wildcards leave anything."""
    try:
        key = Place.parse(path, "path").key
    except ValueError:  # whoever reads the source says what is wrong with its path
        key = path
    parts = reversed(PurePosixPath(key).parts)
    return next((name for part in parts if (name := _clean(part))), f"source{number}")


def _clean(part: str) -> str:
    """Drop the suffix of a part of a path, and what may not stand in a metric's name."""
    for suffix in _COMPRESSED:
        part = part.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "_", PurePosixPath(part).stem).strip("_.-")
