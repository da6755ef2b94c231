"""Choose what encodes a corpus: the reference, or a fast engine whose ids were shown to be equal.

    choice = choose_encoder(path, sample, "auto")     # once, on the driver
    encoder = build_encoder(path, choice)             # in each worker
    ids = encoder.encode(["some text", "another"])

What a token store is made with is decided by the reference alone (`fingerprint_tokenizer`).
"""

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from raytune_llama.model.cuts import encode_in_stretches
from raytune_llama.model.hard_texts import hard_texts
from raytune_llama.model.reference import Reference, TextEncoder
from raytune_llama.model.tokenizer import (
    build_reference,
    control_strings,
    fingerprint_loaded,
    load_tokenizer,
    token_texts,
)

if TYPE_CHECKING:
    from raytune_llama.model.compiled import CompiledEncoder

logger = logging.getLogger(__name__)

Engine = Literal["auto", "reference", "compiled"]
"""What may be asked for: `auto` is the fast engine where its ids were shown to be the reference's,
and `compiled` the same or an error."""

CHECKED_SHARE = 1000
"""Of so many texts a worker checks one against the reference."""

_BATCH_TEXTS = 1024


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """What encodes a corpus, and why; picklable, and JSON by `dataclasses.asdict`."""

    engine: str
    """What makes the ids: `sentencepiece`, `tokenizers` or `compiled`."""
    version: str
    """Its version; a worker with another one refuses to start."""
    reference: dict[str, str]
    """`fingerprint_tokenizer` of the directory; a worker that reads another refuses to start."""
    verified: bool
    """Whether the ids of a fast engine were compared with the reference's, and equal."""
    num_texts: int
    """How many texts were compared: the sample and the hard ones."""
    num_bytes: int
    """How many bytes of UTF-8 they have."""
    reason: str | None
    """Why the reference is used; None for a fast engine."""


class IdsDifferError(Exception):
    """A fast engine gave other ids than the reference, in spite of all that was compared before."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(index, message)
        self.index = index
        """The text's place among those given to `encode`."""

    def __str__(self) -> str:
        return f"text {self.index} of a batch: {self.args[1]}"


def choose_encoder(path: Path, sample: Sequence[str], engine: Engine = "auto") -> EncoderChoice:
    """Choose what encodes a corpus with the tokenizer of directory `path`, and log it.

    Args:
        path: Directory of the tokenizer.
        sample: Documents of the very corpus, some MB, from all of its sources.
        engine: What is asked for.

    Raises:
        ValueError: as `load_tokenizer`; or `compiled` is asked for and can't be used.
    """
    tokenizer = load_tokenizer(path)
    reference = build_reference(tokenizer)
    texts, fast, reason = [], None, "it was asked for"
    if engine != "reference":
        texts = [*hard_texts(control_strings(tokenizer), token_texts(tokenizer)), *sample]
        fast, reason = _find_fast(reference, texts)
    if engine == "compiled" and fast is None:
        raise ValueError(f"engine: compiled can't be used with {path}: {reason}; set it to auto")
    chosen = reference if fast is None else fast
    choice = EncoderChoice(
        engine=chosen.name,
        version=chosen.version,
        reference=fingerprint_loaded(tokenizer),
        verified=fast is not None,
        num_texts=len(texts) if fast else 0,
        num_bytes=sum(len(text.encode()) for text in texts) if fast else 0,
        reason=None if fast else reason,
    )
    if fast is None:
        logger.info("ids are made by %s %s, since %s", choice.engine, choice.version, reason)
    else:
        logger.info(
            "ids are made by %s %s: equal to those of %s %s on %d texts (%.1f MB)",
            *(choice.engine, choice.version, reference.name, reference.version),
            *(choice.num_texts, choice.num_bytes / 1e6),
        )
    return choice


def _find_fast(reference: Reference, texts: list[str]) -> "tuple[CompiledEncoder | None, str]":
    """Return the fast engine if it gives the reference's ids, and why not otherwise."""
    if find_spec("numba") is None:
        return None, "the fast engine needs numba: pip install 'raytune_llama[fast]'"
    from raytune_llama.model.compiled import CompiledEncoder

    try:
        fast = CompiledEncoder(reference)
    except ValueError as error:
        return None, f"the fast engine can't read the tokenizer: {error}"
    for start in range(0, len(texts), _BATCH_TEXTS):
        batch = texts[start : start + _BATCH_TEXTS]
        pairs = zip(fast.encode(batch), reference.encode(batch), strict=True)
        differing = [text for text, ids in zip(batch, pairs, strict=True) if _differ(*ids)]
        if differing:
            return None, (
                f"the fast engine gives other ids for {len(differing)} of {len(batch)} texts, "
                f"the first is {_excerpt(differing[0])}"
            )
    return fast, ""


def _differ(ids: np.ndarray, wanted: np.ndarray) -> bool:
    return not np.array_equal(ids, wanted)


def _excerpt(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r} ... ({len(text)} characters)"


def build_encoder(path: Path, choice: EncoderChoice) -> TextEncoder:
    """Load what `choose_encoder` chose, in a worker. It runs on the calling thread.

    Raises:
        ValueError: The directory or the engine is not the one that was looked at.
    """
    tokenizer = load_tokenizer(path)
    found = fingerprint_loaded(tokenizer)
    if found != choice.reference:
        raise ValueError(
            f"tokenizer: {path} is {found} on this node and {choice.reference} on the driver's; "
            "give all nodes the same directory and the same packages"
        )
    encoder = reference = build_reference(tokenizer)
    if choice.verified:
        from raytune_llama.model.compiled import CompiledEncoder

        encoder = CheckedEncoder(CompiledEncoder(reference), reference)
    if (encoder.name, encoder.version) != (choice.engine, choice.version):
        raise ValueError(
            f"tokenizer: ids are made by {encoder.name} {encoder.version} on this node and by "
            f"{choice.engine} {choice.version} on the driver's; give all nodes the same packages"
        )
    return encoder


class CheckedEncoder:
    """The fast engine, with the reference beside it that checks a share of its texts.

    A difference is an error, and not a reason to go on with the reference: texts that were not
    checked have been written already. A hash of what is encoded at once says which are checked, so
    that it is the same ones in each run; a stretch of a long document is a text of its own.
    """

    def __init__(self, fast: "CompiledEncoder", reference: Reference) -> None:
        self.name, self.version = fast.name, fast.version
        self._fast = fast
        self._reference = reference

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`.

        Raises:
            IdsDifferError: A text that was checked has other ids.
        """
        return encode_in_stretches(texts, self._fast.cuts, self._encode)

    def _encode(self, texts: Sequence[str], first: int) -> list[np.ndarray]:
        encoded = self._fast.encode_whole(texts)
        offset = zlib.crc32("".join(texts).encode()) % CHECKED_SHARE
        checked = range(offset, len(texts), CHECKED_SHARE)
        wanted = self._reference.encode_whole([texts[place] for place in checked])
        for place, ids in zip(checked, wanted, strict=True):
            if _differ(encoded[place], ids):
                raise IdsDifferError(first + place, self._report(texts[place], encoded[place], ids))
        return encoded

    def _report(self, text: str, ids: np.ndarray, wanted: np.ndarray) -> str:
        return (
            f"{self.name} {self.version} gives {len(ids)} ids, and {self._reference.name} "
            f"{self._reference.version}, the reference, {len(wanted)}, which are others: "
            f"{_excerpt(text)}; build the store with engine=reference, and report the text"
        )
