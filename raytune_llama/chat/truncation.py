"""Truncate encoded conversations that are too long, so that the rest is still trainable."""

import numpy as np
from numpy.typing import NDArray

from raytune_llama.chat.config import Truncation

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
    """Truncate an encoded conversation to at most `max_tokens` tokens.

    Args:
        ids: Token ids, shape (T,), more than `max_tokens`.
        targets: Mask of answer tokens and the tokens that end answers, shape (T,).
        max_tokens: Tokens to keep, at least 2.
        truncation: Which part is kept.
        bos_id: Id of BOS; None if the tokenizer has none.

    Returns:
        Both arrays truncated; empty if no token of an answer would be left.
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
    # An answer with only its end token left would teach the model nothing but to stop.
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
