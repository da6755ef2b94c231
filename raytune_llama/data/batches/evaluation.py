"""Which validation sequences are evaluated, and the bytes of text that they account for.

Every source is evaluated apart, so that each has a loss of its own, and always in packed form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.best_fit import cut_evaluation_sequences
from raytune_llama.data.batches.mixture import MixedSource, source_names
from raytune_llama.data.batches.order import SampleIndex, apportion
from raytune_llama.data.batches.packing import (
    EvaluationForm,
    JoinedSequences,
    SourceSequences,
    find_source_spans,
)
from raytune_llama.data.batches.step_batches import MicroBatch, num_micro_batches, stack_sequences
from raytune_llama.data.store.token_store import TokenSplit


@dataclass(frozen=True)
class EvaluationSource:
    """The part of a source's validation text that is evaluated: sequences at even distances."""

    name: str
    """Of the source."""
    sequences: SourceSequences
    """All of the source's."""
    num_evaluated: int
    """How many of them are evaluated; from 1 to all."""

    def sequence_index(self, number: int) -> int:
        """Return which of the source's sequences is evaluated as number `number`."""
        return number * self.sequences.num_sequences // self.num_evaluated

    @property
    def num_bytes(self) -> float | None:
        """Bytes of text that the evaluated sequences account for; of a cut document its share.

        All sequences of a source account for all of its text. None for conversations, of which
        not every token is a target.
        """
        if not isinstance(self.sequences, JoinedSequences):
            return None
        split = self.sequences.source_span.split
        total, known = 0.0, range(0)
        for number in range(self.num_evaluated):
            span = self.sequences.covered_range(self.sequence_index(number))
            if span.start == known.stop:
                known = range(known.start, span.stop)
                continue
            total += split.bytes_between(known.start, known.stop)
            known = span
        return total + split.bytes_between(known.start, known.stop)


def select_evaluation_sources(
    configs: Sequence[MixedSource],
    split: TokenSplit,
    form: EvaluationForm,
    sequence_tokens: int,
    max_sequences: int | None,
) -> tuple[EvaluationSource, ...]:
    """Choose what is evaluated: of each source its share of the sequences, at least one.

    Args:
        configs: The sources.
        split: The validation split.
        form: Whether documents see each other.
        sequence_tokens: T.
        max_sequences: Evaluated sequences over all sources; None: all.

    Returns:
        The sources that have a sequence; empty where none has.

    Raises:
        ConfigError: There are more such sources than sequences to evaluate.
    """
    names = source_names(configs)
    cut = {
        source: cut_evaluation_sequences(stretch, form, sequence_tokens)
        for source, stretch in find_source_spans(split).items()
    }
    found = {source: sequences for source, sequences in cut.items() if sequences.num_sequences}
    if not found:
        return ()
    counts = [sequences.num_sequences for sequences in found.values()]
    if max_sequences is not None and max_sequences < len(counts):
        raise ConfigError(
            [
                f"eval.max_sequences: got {max_sequences}, but {len(counts)} sources have "
                f"validation text; evaluate at least {len(counts)} sequences"
            ]
        )
    if max_sequences is None or max_sequences >= sum(counts):
        evaluated = counts
    else:
        # One each, and the rest by what is left of each: no source gets more than it has.
        rest = apportion([count - 1 for count in counts], max_sequences - len(counts))
        evaluated = [1 + extra for extra in rest]
    return tuple(
        EvaluationSource(names[source], sequences, count)
        for (source, sequences), count in zip(found.items(), evaluated, strict=True)
    )


def read_evaluation_batches(
    source: EvaluationSource, *, micro_batch_sequences: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """Stream one worker's share of what is evaluated of a source.

    Every worker gets the same number of micro-batches, with filler where sequences are missing:
    a forward pass of a partitioned model is collective.
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
