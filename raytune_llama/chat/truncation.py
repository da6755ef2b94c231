"""Truncate encoded conversations that are too long, so that the rest is still trainable."""

import numpy as np
from numpy.typing import NDArray

from raytune_llama.chat.config import Truncation

TargetMask = NDArray[np.bool_]
Places = NDArray[np.intp]


def truncate(
    targets: TargetMask, max_tokens: int, truncation: Truncation, *, begins_with_bos: bool
) -> Places:
    """Choose which tokens of an encoded conversation to keep, at most `max_tokens`.

    Args:
        targets: Mask of answer tokens and the tokens that end answers, shape (T,); T is above
            `max_tokens`.
        max_tokens: Tokens to keep, at least 2.
        truncation: Which part is kept.
        begins_with_bos: Whether the first token is BOS, which is kept.

    Returns:
        Indices of the kept tokens, ascending; empty if no token of an answer would be left.
    """
    if truncation == "drop":
        return np.arange(0)
    if truncation == "cut_left":
        return _cut_left(targets, max_tokens, int(begins_with_bos))
    return _keep_eos(targets, max_tokens)


def _cut_left(targets: TargetMask, max_tokens: int, num_bos: int) -> Places:
    start = len(targets) - max_tokens + num_bos
    kept = np.concatenate([np.arange(num_bos), np.arange(start, len(targets))])
    # An answer with only its end token left would teach the model nothing but to stop.
    return kept if targets[kept].sum() > 1 else kept[:0]


def _keep_eos(targets: TargetMask, max_tokens: int) -> Places:
    edges = np.flatnonzero(np.diff(targets.astype(np.int8), prepend=0, append=0))
    length = 0
    for start, stop in edges.reshape(-1, 2).tolist():
        if stop <= max_tokens:
            length = stop
        elif max_tokens - 1 > start:  # at least one token of the answer before its end token
            return np.append(np.arange(max_tokens - 1), stop - 1)
    return np.arange(length)
