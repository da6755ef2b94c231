"""Choose the encoder of a corpus: the reference, or a fast engine verified to give the same ids.

    choice = select_encoder(load_tokenizer(path), sample, "auto")     # once, on the driver
    ids = choice.encoder.encode(["some text", "another"])             # there, or in a worker

The fingerprint of a token store depends on the reference alone (`fingerprint_tokenizer`).
"""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerFast

from raytune_llama.config.errors import UserError
from raytune_llama.logs import waiting
from raytune_llama.tokenizer.config import EncoderKind
from raytune_llama.tokenizer.encoder import CheckedEncoder, SelectedEncoder, excerpt
from raytune_llama.tokenizer.hard_texts import hard_texts
from raytune_llama.tokenizer.loader import (
    build_reference_encoder,
    control_token_strings,
    token_texts,
)
from raytune_llama.tokenizer.reference import ReferenceEncoder

if TYPE_CHECKING:
    from raytune_llama.tokenizer.compiled.encoder import CompiledEncoder

logger = logging.getLogger(__name__)

_BATCH_TEXTS = 1024


def select_encoder(
    tokenizer: PreTrainedTokenizerFast, sample: Sequence[str], engine: EncoderKind = "auto"
) -> SelectedEncoder:
    """Choose and log the encoder of a corpus.

    Args:
        tokenizer: Tokenizer from `load_tokenizer`.
        sample: Documents of the corpus itself, a few MB, from all of its sources.
        engine: Requested encoder.

    Raises:
        ValueError: `compiled` is requested but can't be used.
    """
    reference = build_reference_encoder(tokenizer)
    texts, fast, reason = [], None, "engine=reference"
    if engine != "reference":
        texts = [*hard_texts(control_token_strings(tokenizer), token_texts(tokenizer)), *sample]
        fast, reason = _find_fast(reference, texts)
    if fast is not None:
        choice = SelectedEncoder(
            encoder=CheckedEncoder(fast, reference),
            num_texts=len(texts),
            num_bytes=sum(len(text.encode()) for text in texts),
            reason=None,
        )
        logger.info(
            "encoding with %s %s: ids match %s %s on %d texts (%.1f MB)",
            *(fast.name, fast.version, reference.name, reference.version),
            *(choice.num_texts, choice.num_bytes / 1e6),
        )
        return choice
    if engine == "compiled":
        raise UserError(
            f"engine: compiled can't be used with {tokenizer.name_or_path}: {reason}; "
            "set it to auto"
        )
    logger.info("encoding with %s %s: %s", reference.name, reference.version, reason)
    return SelectedEncoder(encoder=reference, num_texts=0, num_bytes=0, reason=reason)


def _find_fast(
    reference: ReferenceEncoder, texts: list[str]
) -> "tuple[CompiledEncoder | None, str]":
    """Return the fast engine if its ids match the reference's, else None and the reason."""
    if find_spec("numba") is None:
        return None, "the fast engine needs numba: pip install 'raytune_llama[fast]'"
    from raytune_llama.tokenizer.compiled.encoder import CompiledEncoder

    what = "compiling the tokenizer's tables and comparing ids with the reference's"
    with waiting(logger, what, usually="10 to 40 s"):
        try:
            fast = CompiledEncoder(reference)
        except ValueError as error:
            return None, f"the fast engine can't be used: {error}"
        problem = _find_difference(fast, reference, texts)
    return (None, problem) if problem else (fast, "")


def _find_difference(
    fast: "CompiledEncoder", reference: ReferenceEncoder, texts: list[str]
) -> str | None:
    """Return how the fast engine's ids differ from the reference's; None if they do not."""
    for start in range(0, len(texts), _BATCH_TEXTS):
        batch = texts[start : start + _BATCH_TEXTS]
        pairs = zip(fast.encode(batch), reference.encode(batch), strict=True)
        differing = [
            text for text, ids in zip(batch, pairs, strict=True) if not np.array_equal(*ids)
        ]
        if differing:
            return (
                f"the fast engine's ids differ from the reference's for {len(differing)} of "
                f"{len(batch)} texts, the first is {excerpt(differing[0])}"
            )
    return None
