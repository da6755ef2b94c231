"""Choose what encodes a corpus: the reference, or a fast engine whose ids were shown to be equal.

    choice = choose_encoder(path, sample, "auto")     # once, on the driver
    encoder = build_encoder(path, choice)             # in each worker
    ids = encoder.encode(["some text", "another"])

What a token store is made with is decided by the reference alone (`fingerprint_tokenizer`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raytune_llama.model.reference import TextEncoder
from raytune_llama.model.tokenizer import fingerprint_tokenizer, load_reference

logger = logging.getLogger(__name__)

Engine = Literal["auto", "reference"]
"""What may be asked for: `auto` is a fast engine where its ids were shown to be the reference's."""


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """What encodes a corpus, and why; picklable, and JSON by `dataclasses.asdict`."""

    engine: str
    """The library that makes the ids."""
    version: str
    """Its version; a worker with another one refuses to start."""
    reference: dict[str, str]
    """`fingerprint_tokenizer` of the directory; a worker that reads another refuses to start."""
    verified: bool
    """Whether the ids of a fast engine were compared with the reference's."""
    num_texts: int
    """How many texts were compared."""
    num_bytes: int
    """How many bytes of UTF-8 they have."""
    reason: str | None
    """Why the reference is used; None for a fast engine."""


def choose_encoder(
    path: Path,
    sample: Sequence[str],  # noqa: ARG001  # there is nothing yet to compare with the reference
    engine: Engine = "auto",
) -> EncoderChoice:
    """Choose what encodes a corpus with the tokenizer of directory `path`.

    Args:
        path: Directory of the tokenizer.
        sample: Documents of the very corpus, some MB, from all of its sources.
        engine: What is asked for.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    reference = load_reference(path)
    reason = "asked for" if engine == "reference" else "no fast engine is installed"
    choice = EncoderChoice(
        engine=reference.name,
        version=reference.version,
        reference=fingerprint_tokenizer(path),
        verified=False,
        num_texts=0,
        num_bytes=0,
        reason=reason,
    )
    logger.info("ids are made by %s %s, the reference: %s", choice.engine, choice.version, reason)
    return choice


def build_encoder(path: Path, choice: EncoderChoice) -> TextEncoder:
    """Load what `choose_encoder` chose, in a worker.

    Raises:
        ValueError: The directory or the engine is not the one that was looked at.
    """
    found = fingerprint_tokenizer(path)
    if found != choice.reference:
        raise ValueError(
            f"tokenizer: {path} is {found} on this node and {choice.reference} on the driver's; "
            "give all nodes the same directory and the same packages"
        )
    return load_reference(path)
