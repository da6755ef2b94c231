"""Do SentencePiece and `tokenizers` give the same ids for one tokenizer, on given texts?

A tokenizer.model defines its own ids; most programs that load a model use its conversion to a
tokenizer.json. Where the two agree, it is no matter which one is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytune_llama.tokenizer.loader import build_reference_encoder, load_tokenizer
from raytune_llama.tokenizer.reference import TokenizersReference

_BATCH_TEXTS = 1024


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How the ids of two libraries compare."""

    num_texts: int
    """Texts that were compared."""
    num_bytes: int
    """Their bytes of UTF-8."""
    differing: tuple[str, ...]
    """Texts with other ids."""
    ids: frozenset[int]
    """Ids at the first place where a text's differ, of both."""


def compare_libraries(directory: Path, texts: Sequence[str]) -> ParityReport:
    """Compare SentencePiece's ids with those of `tokenizers` for a tokenizer's directory."""
    tokenizer = load_tokenizer(directory)
    reference = build_reference_encoder(tokenizer)
    converted = TokenizersReference(tokenizer.backend_tokenizer.to_str())
    differing: list[str] = []
    involved: set[int] = set()
    for start in range(0, len(texts), _BATCH_TEXTS):
        batch = texts[start : start + _BATCH_TEXTS]
        pairs = zip(batch, reference.encode(batch), converted.encode(batch), strict=True)
        for text, wanted, found in pairs:
            if np.array_equal(wanted, found):
                continue
            differing.append(text)
            length = min(len(wanted), len(found))
            place = int(np.argmin(wanted[:length] == found[:length]))
            involved |= {int(wanted[place]), int(found[place])}
    return ParityReport(
        num_texts=len(texts),
        num_bytes=sum(len(text.encode()) for text in texts),
        differing=tuple(differing),
        ids=frozenset(involved),
    )
