"""Cut encoded conversations that are too long, so that what is left can still be learned from."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Truncation = Literal["keep_eos", "drop", "cut_left"]
"""What becomes of a conversation that is too long. `keep_eos`: its beginning stays; an answer that
is cut ends with its EOS, a question that is cut goes. `drop`: nothing stays. `cut_left`: its end
stays, behind BOS where it began with it."""

TokenIds = NDArray[np.uint32]
TargetMask = NDArray[np.bool_]


def truncate(
    ids: TokenIds,
    targets: TargetMask,
    max_tokens: int,
    truncation: Truncation,
    *,
    bos_id: int | None,
) -> tuple[TokenIds, TargetMask]:
    """Cut an encoded conversation to at most `max_tokens` tokens.

    Args:
        ids: Token ids, shape (T,), more than `max_tokens`.
        targets: Which are answers and what ends them, shape (T,).
        max_tokens: Tokens to keep, at least 2.
        truncation: What is kept.
        bos_id: Id that begins a text; None where it begins with nothing.

    Returns:
        What is left of both; empty where no token of an answer would be left.
    """
    if truncation == "drop":
        return ids[:0], targets[:0]
    if truncation == "cut_left":
        return _cut_left(ids, targets, max_tokens, bos_id)
    return _keep_eos(ids, targets, max_tokens)


def _cut_left(
    ids: TokenIds, targets: TargetMask, max_tokens: int, bos_id: int | None
) -> tuple[TokenIds, TargetMask]:
    begins = int(bos_id is not None and ids[0] == bos_id)
    start = len(ids) - max_tokens + begins
    kept = np.concatenate([ids[:begins], ids[start:]])
    mask = np.concatenate([targets[:begins], targets[start:]])
    # An answer of which only the end token is left teaches nothing but to end.
    return (kept, mask) if mask.sum() > 1 else (ids[:0], targets[:0])


def _keep_eos(ids: TokenIds, targets: TargetMask, max_tokens: int) -> tuple[TokenIds, TargetMask]:
    edges = np.flatnonzero(np.diff(targets.astype(np.int8), prepend=0, append=0))
    answers = edges.reshape(-1, 2)
    length = 0
    for start, stop in answers.tolist():
        if stop <= max_tokens:
            length = stop
        elif max_tokens - 1 > start:  # at least one token of the answer before its end token
            kept = np.append(ids[: max_tokens - 1], ids[stop - 1])
            return kept, np.append(targets[: max_tokens - 1], [True])
    return ids[:length], targets[:length]
