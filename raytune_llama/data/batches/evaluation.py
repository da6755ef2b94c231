"""Select the validation sequences to evaluate, and count the text bytes that they cover.

Each source is evaluated separately, so that it gets its own loss, and always in a packed form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.best_fit import cut_evaluation_sequences
from raytune_llama.data.batches.config import EvaluationForm, MixedSource, apportion, source_names
from raytune_llama.data.batches.order import SampleIndex
from raytune_llama.data.batches.packing import JoinedSequences, SourceSequences, find_source_spans
from raytune_llama.data.batches.step_batches import MicroBatch, num_micro_batches, stack_sequences
from raytune_llama.data.store.token_store import TokenSplit


@dataclass(frozen=True)
class EvaluationSource:
    """Evaluated subset of a source's validation sequences, evenly spaced."""

    name: str
    """Name of the source."""
    sequences: SourceSequences
    """All validation sequences of the source."""
    num_evaluated: int
    """Number of sequences to evaluate, from 1 to all."""

    def sequence_index(self, number: int) -> int:
        """Return the index in `sequences` of the `number`-th evaluated sequence, from 0."""
        return number * self.sequences.num_sequences // self.num_evaluated

    @property
    def num_bytes(self) -> float | None:
        """Text bytes covered by the evaluated sequences; a cut document counts by its share.

        All sequences together cover all text of the source. None for conversations, in which not
        every token is a target.
        """
        if not isinstance(self.sequences, JoinedSequences):
            return None
        split = self.sequences.source_span.split
        total, merged = 0.0, range(0)
        for number in range(self.num_evaluated):
            span = self.sequences.covered_range(self.sequence_index(number))
            if span.start == merged.stop:
                merged = range(merged.start, span.stop)
                continue
            total += split.bytes_between(merged.start, merged.stop)
            merged = span
        return total + split.bytes_between(merged.start, merged.stop)


def select_evaluation_sources(
    configs: Sequence[MixedSource],
    split: TokenSplit,
    form: EvaluationForm,
    sequence_tokens: int,
    max_sequences: int | None,
) -> tuple[EvaluationSource, ...]:
    """Divide the evaluated sequences among the sources in proportion, at least one per source.

    Args:
        configs: Configured sources.
        split: Validation split.
        form: Sequence form, which decides whether documents attend to each other.
        sequence_tokens: Sequence length T in tokens.
        max_sequences: Maximum number of evaluated sequences over all sources; None: all.

    Returns:
        The sources with at least one validation sequence; may be empty.

    Raises:
        ConfigError: `max_sequences` is less than the number of such sources.
    """
    names = source_names(configs)
    cut = {
        source: cut_evaluation_sequences(span, form, sequence_tokens)
        for source, span in find_source_spans(split).items()
    }
    found = {source: sequences for source, sequences in cut.items() if sequences.num_sequences}
    if not found:
        return ()
    counts = [sequences.num_sequences for sequences in found.values()]
    if max_sequences is not None and max_sequences < len(counts):
        raise ConfigError(
            [
                f"eval.max_sequences: got {max_sequences}, but {len(counts)} sources have "
                f"text to evaluate; set it to at least {len(counts)}, or to null for all sequences"
            ]
        )
    if max_sequences is None or max_sequences >= sum(counts):
        evaluated = counts
    else:
        # One per source, the rest in proportion to the remainders: none gets more than it has.
        rest = apportion([count - 1 for count in counts], max_sequences - len(counts))
        evaluated = [1 + extra for extra in rest]
    return tuple(
        EvaluationSource(names[source], sequences, count)
        for (source, sequences), count in zip(found.items(), evaluated, strict=True)
    )


def read_evaluation_batches(
    source: EvaluationSource, *, micro_batch_sequences: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """Stream one worker's micro-batches of a source's evaluated sequences.

    Every worker gets the same number of micro-batches, padded with filler sequences, because the
    forward pass of a sharded model is collective.
    """
    mine = range(rank, source.num_evaluated, world_size)
    count = num_micro_batches(source.num_evaluated, micro_batch_sequences, world_size)
    for first in range(0, count * micro_batch_sequences, micro_batch_sequences):
        rows = [
            source.sequences.read(
                SampleIndex(source=0, index=source.sequence_index(number), epoch=0)
            )
            for number in mine[first : first + micro_batch_sequences]
        ]
        yield stack_sequences(rows, micro_batch_sequences, source.sequences.sequence_tokens)
