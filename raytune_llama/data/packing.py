"""Fixed-length training sequences as views of a split's flat token stream.

The stream is cut every T tokens. A sequence predicts the T tokens that follow its own, so that
neighbours overlap by one token and every token but the stream's first is a target exactly once.

Shapes: T = tokens of a sequence.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytune_llama.data.store import TokenSplit

IGNORED_LABEL = -100
"""The label of a position that is not trained; PyTorch's cross entropy skips it."""

PAD_ID = 0
"""The id at padded positions. Any id of the vocabulary would do: nothing attends to it."""


@dataclass(frozen=True)
class Sequence:
    """One training sequence; all arrays are int64 and T long."""

    ids_T: NDArray[np.int64]
    """Input ids, `PAD_ID` behind the end of the stream."""
    labels_T: NDArray[np.int64]
    """The id that follows each input, or `IGNORED_LABEL`."""
    positions_T: NDArray[np.int64]
    """Position ids; they restart at 0 where a segment that must not see the one before begins."""


def num_sequences(num_tokens: int, sequence_tokens: int) -> int:
    """Count the sequences of a stream; the last one may be short. A stream of one token has none.

    Args:
        num_tokens: Tokens of the stream.
        sequence_tokens: T.
    """
    return max(0, -(-(num_tokens - 1) // sequence_tokens))


def read_sequence(
    split: TokenSplit, index: int, sequence_tokens: int, *, isolate_documents: bool
) -> Sequence:
    """Cut one sequence out of the stream.

    Args:
        split: Where the tokens are.
        index: Which sequence, from 0 to `num_sequences(...) - 1`.
        sequence_tokens: T.
        isolate_documents: True restarts the positions at each document and ignores a label that
            is the first token of the next document. False is plain concatenation.

    Raises:
        IndexError: There is no such sequence.
    """
    start = index * sequence_tokens
    if not 0 <= start < split.num_tokens - 1:
        last = num_sequences(split.num_tokens, sequence_tokens) - 1
        raise IndexError(f"sequence {index} of a split with sequences 0 to {last}")
    stop = min(start + sequence_tokens + 1, split.num_tokens)
    tokens = split.tokens(start, stop)
    num_real = len(tokens) - 1

    ids_T = np.full(sequence_tokens, PAD_ID, dtype=np.int64)
    labels_T = np.full(sequence_tokens, IGNORED_LABEL, dtype=np.int64)
    ids_T[:num_real] = tokens[:-1]
    labels_T[:num_real] = tokens[1:]

    segment_starts = [num_real]  # the padding, when there is any, is a segment of its own
    if isolate_documents:
        starts = split.document_starts(start, stop) - start
        labels_T[starts[starts > 0] - 1] = IGNORED_LABEL
        segment_starts = [*starts[starts < num_real].tolist(), num_real]
    return Sequence(ids_T, labels_T, _restarting_positions(sequence_tokens, segment_starts))


def _restarting_positions(length: int, segment_starts: list[int]) -> NDArray[np.int64]:
    """Count up from 0, and from 0 again at each start below `length`."""
    positions = np.arange(length, dtype=np.int64)
    origin = np.zeros(length, dtype=np.int64)
    starts = np.array([start for start in segment_starts if start < length], dtype=np.int64)
    origin[starts] = starts
    return positions - np.maximum.accumulate(origin)
