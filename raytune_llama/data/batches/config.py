"""Forms of sequences, and the names, weights and quotas of sources: no arrays, no files."""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Literal, Protocol

SequenceForm = Literal["isolated", "joined", "crops", "seed_blocks", "fitted", "padded"]
"""How a source is cut into sequences; see the docstring of `packing.py`."""


EvaluationForm = Literal["isolated", "joined", "fitted"]
"""How validation text is cut: the forms that cover all of it exactly once."""


def block_sequences(total_positions: int) -> int:
    """Return the block length for the fewest equal blocks that cover a run."""
    num_blocks = -(-total_positions // MAX_BLOCK_SEQUENCES)
    return -(-total_positions // num_blocks)


def block_quotas(weights: Sequence[float], total_positions: int) -> tuple[int, ...]:
    """Return the number of sequences per block for each source; 0 if its weight is too small.

    Args:
        weights: Relative weight of each source, all above 0.
        total_positions: Number of sequences in the run, above 0.
    """
    return tuple(apportion(weights, block_sequences(total_positions)))


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` items by weights, exactly, with the largest-remainder method."""
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) * total for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda n: (counts[n] - shares[n], n))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


_COMPRESSED = (".gz", ".zst", ".bz2")


class MixedSource(Protocol):
    """Name, path and weight of a configured source."""

    @property
    def path(self) -> str:
        """Location of its files."""
        ...

    @property
    def weight(self) -> float | None:
        """Share of the run's sequences, relative to the other sources' weights; None: no weight."""
        ...

    @property
    def name(self) -> str | None:
        """Configured name; None: derived from the path."""
        ...


def source_names(sources: Sequence[MixedSource]) -> tuple[str, ...]:
    """Return the names of the sources, configured or derived from their paths."""
    return tuple(source.name or _name_of(source.path, n) for n, source in enumerate(sources))


def check_mixture(sources: Sequence[MixedSource], total_positions: int | None) -> list[str]:
    """List the problems of the sources' names and weights, with field paths.

    Args:
        sources: Configured sources.
        total_positions: Number of sequences in the run, to check the weights; None if unknown.
    """
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, name in enumerate(source_names(sources)):
        other = first.setdefault(name, number)
        if other != number:
            problems.append(
                f"data.sources.{number}.name: {name!r} is also the name of data.sources.{other} "
                f"({sources[number].path} and {sources[other].path}); rename one of them"
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


def _check_quotas(weights: list[float], total_positions: int) -> list[str]:
    quotas = block_quotas(weights, total_positions)
    return [
        f"data.sources.{number}.weight: {weights[number]} of {sum(weights):g} is less than one "
        f"sequence per block of {block_sequences(total_positions)}; raise it, drop the source, or "
        "train for more steps"
        for number, quota in enumerate(quotas)
        if quota == 0
    ]


def _name_of(path: str, number: int) -> str:
    """Return the last part of a path that is not empty without its suffix and wildcards."""
    try:
        from raytune_llama.storage.place import Place

        key = Place.parse(path, "path").key
    except ValueError:  # on the hub, or invalid, which the reader of the source reports
        key = re.sub(r"@[^/]*|\?.*", "", path)
    parts = reversed(PurePosixPath(key).parts)
    return next((name for part in parts if (name := _clean(part))), f"source{number}")


MAX_BLOCK_SEQUENCES = 10_000
"""Maximum number of positions per block; a shorter run is one block."""


def _clean(part: str) -> str:
    """Drop the suffix of a path component, and characters not allowed in a metric's name."""
    for suffix in _COMPRESSED:
        part = part.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "_", PurePosixPath(part).stem).strip("_.-")
