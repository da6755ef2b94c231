"""Compares the ids that SentencePiece and `tokenizers` give with the same tokenizer.

A tokenizer.model defines the ids; most programs that load a model use its conversion to a
tokenizer.json. If the two agree, either can be used.
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
    """Result of comparing the ids of the two libraries."""

    num_texts: int
    """Number of texts compared."""
    num_bytes: int
    """Number of UTF-8 bytes of these texts."""
    differing: tuple[str, ...]
    """Texts whose ids differ."""
    ids: frozenset[int]
    """Ids of both libraries at the first difference in each such text."""


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
