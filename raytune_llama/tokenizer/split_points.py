"""Safe split points: where a text can be split without changing its ids.

Byte-pair merging works on a full text at once, so a document of 200 MB takes gigabytes of memory.
But every merge produces a piece of the vocabulary: no merge crosses the boundary between two
characters that are adjacent in no piece, and merges on one side don't depend on the other, so both
sides get the same ids as in the full text (`PairSplitPoints`). Byte-level tokenizers split a text
by a pattern before merging; after a letter that is followed by no letter, all patterns known here
end a word, whatever comes before and after (`LetterSplitPoints`).

Each chunk but the first is encoded with an anchor before it, whose ids are then dropped: a
tokenizer that prepends a space to a text prepends it to the anchor.
"""

import logging
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np

from raytune_llama.config.errors import UserError

logger = logging.getLogger(__name__)

CHUNK_CHARACTERS = 1 << 18
"""Longer texts are split into chunks of at most this size, if safe split points allow it."""

MAX_CHUNK_CHARACTERS = 1 << 22
"""Size limit of a chunk without a safe split point; this size takes 0.2 to 0.7 GB of memory."""

SPACE = "\u2581"
"""SentencePiece's character for a space; it treats this character in a text as a space."""

_GROUP_CHARACTERS = 1 << 19

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class UnsplittableTextError(UserError):
    """A text is too long to encode in one go and has no safe split point."""


class SplitPoints(Protocol):
    """Decides where a text can be split."""

    @property
    def anchor(self) -> str:
        """Text prepended to each chunk but the first."""
        ...

    def is_safe_split(self, text: str, at: int) -> bool:
        """Whether the ids of `text` are those of `text[:at]` and then those of `text[at:]`."""
        ...


@dataclass(frozen=True)
class PairSplitPoints:
    """Splits between characters that are adjacent in no piece."""

    joined: frozenset[str]
    """All pairs of adjacent characters in pieces, with plain spaces."""
    anchor: str
    """A character that no piece of several characters contains."""

    def is_safe_split(self, text: str, at: int) -> bool:
        """See `SplitPoints.is_safe_split`."""
        return text[at - 1 : at + 1].replace(SPACE, " ") not in self.joined


@dataclass(frozen=True)
class LetterSplitPoints:
    """Splits after a letter that is followed by a space, a punctuation mark or a symbol."""

    joined: frozenset[str]
    """Pairs of adjacent characters in added tokens, which are matched before a text is split."""
    anchor: str = ""
    """Empty: these tokenizers prepend no space to a text."""

    def is_safe_split(self, text: str, at: int) -> bool:
        """See `SplitPoints.is_safe_split`."""
        before, after = text[at - 1], text[at]
        return (
            unicodedata.category(before)[0] == "L"
            # Spaces and signs start a new character in Unicode's normal forms, too.
            and (after in " \t\r\n" or unicodedata.category(after)[0] in "PSZ")
            and before + after not in self.joined
        )


def adjacent_character_pairs(pieces: Sequence[str]) -> frozenset[str]:
    """Return the pairs of characters that are adjacent in some piece."""
    return frozenset(a + b for piece in pieces for a, b in pairwise(piece))


def build_pair_split_points(pieces: Sequence[str]) -> PairSplitPoints | None:
    """Return the split points of a vocabulary that merges characters; None if it has no anchor."""
    joined = adjacent_character_pairs([piece.replace(SPACE, " ") for piece in pieces])
    inside = {character for pair in joined for character in pair}
    anchors = (character for character in "\n\t\r\x01\x02\x03" if character not in inside)
    anchor = next(anchors, None)
    return None if anchor is None else PairSplitPoints(joined, anchor)


def build_engine_split_points(engine: dict[str, Any]) -> SplitPoints | None:
    """Return the split points for a tokenizer.json; None if its kind is not supported."""
    model = engine["model"]
    if model["type"] != "BPE" or any(
        model[name] for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return None
    texts = [token for token in engine["added_tokens"] if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in texts):
        return None
    if find_split_pattern(engine) is not None:
        return LetterSplitPoints(adjacent_character_pairs([token["content"] for token in texts]))
    # With added tokens, a space is prepended to the text after each match.
    if is_whole_text_bpe(engine) and not texts:
        return build_pair_split_points(list(model["vocab"]))
    return None


def is_whole_text_bpe(engine: dict[str, Any]) -> bool:
    """Whether an engine merges across the full text, as the first LLaMA tokenizers do."""
    model, normalizer, splitter = engine["model"], engine["normalizer"], engine["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    spaces = (
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    )
    is_unsplit = splitter is None or (
        splitter["type"] == "Metaspace"
        and splitter["replacement"] == SPACE
        and splitter["split"] is False
    )
    return bool(
        model["type"] == "BPE"
        and model["byte_fallback"]
        and not model.get("ignore_merges")
        and is_unsplit
        and all(step in spaces for step in steps)
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    )


def find_split_pattern(engine: dict[str, Any]) -> str | None:
    """Return the name of the pattern that a byte-level engine splits a text by; None if unknown.

    Returns:
        `gpt2`, `gpt2-digits` (each digit alone), `words-1` or `words-3` (Qwen's and LLaMA 3's,
        with runs of at most 1 or 3 digits).
    """
    splitter = engine["pre_tokenizer"]
    if engine["normalizer"] not in (None, {"type": "NFC"}) or splitter is None:
        return None
    steps = splitter.get("pretokenizers", [splitter])
    steps = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    kinds = {
        "gpt2": [_GPT2],
        "gpt2-digits": [{"type": "Digits", "individual_digits": True}, _GPT2],
        "words-1": [split | {"pattern": {"Regex": _WORDS % ""}}, _PLAIN],
        "words-3": [split | {"pattern": {"Regex": _WORDS % "{1,3}"}}, _PLAIN],
    }
    return next((name for name, wanted in kinds.items() if steps == wanted), None)


def split_text(text: str, split_points: SplitPoints | None) -> Iterator[str]:
    """Yield chunks of at most `CHUNK_CHARACTERS`, longer ones if there is no safe split point.

    Raises:
        UnsplittableTextError: A chunk would be longer than `MAX_CHUNK_CHARACTERS`.
    """
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        end = _next_split_point(text, start, split_points)
        if end - start > MAX_CHUNK_CHARACTERS:
            raise UnsplittableTextError(
                f"text too long to encode: no safe split point in {end - start} characters, "
                f"at most {MAX_CHUNK_CHARACTERS} can be encoded at once: "
                f"{text[start : start + 40]!r} ..."
            )
        if end - start > 2 * CHUNK_CHARACTERS:
            logger.warning(
                "no safe split point within %d characters, encoding them as one chunk: %r ...",
                end - start,
                text[start : start + 40],
            )
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _next_split_point(text: str, start: int, split_points: SplitPoints | None) -> int:
    """Return the last safe split point within a chunk, else the first after it, else the end."""
    if split_points is None:
        return len(text)
    wanted = start + CHUNK_CHARACTERS
    farthest = min(len(text), start + MAX_CHUNK_CHARACTERS + 1)
    places = chain(range(wanted, start, -1), range(wanted + 1, farthest))
    return next((at for at in places if split_points.is_safe_split(text, at)), len(text))


EncodeFunction = Callable[[Sequence[str], int], list[np.ndarray]]
"""Encodes texts without splitting them; the int is the index of the first among all texts."""


def encode_in_chunks(
    texts: Sequence[str], split_points: SplitPoints | None, encode: EncodeFunction
) -> list[np.ndarray]:
    """Encode texts of any length, calling `encode` on batches and chunks of bounded size."""
    if sum(map(len, texts)) <= CHUNK_CHARACTERS:
        return encode(texts, 0)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    ends = np.cumsum(lengths)
    long = [*np.flatnonzero(lengths > CHUNK_CHARACTERS).tolist(), len(texts)]
    results: list[np.ndarray] = []
    start = 0
    while start < len(texts):
        if start == long[0]:
            results.append(_encode_long(texts[start], long.pop(0), split_points, encode))
            start += 1
            continue
        before = ends[start] - lengths[start]
        full = int(np.searchsorted(ends, before + _GROUP_CHARACTERS)) + 1
        stop = min(full, long[0])
        results += encode(texts[start:stop], start)
        start = stop
    return results


def _encode_long(
    text: str, index: int, split_points: SplitPoints | None, encode: EncodeFunction
) -> np.ndarray:
    anchor = "" if split_points is None else split_points.anchor
    [anchor_ids] = encode([anchor], index)
    parts: list[np.ndarray] = []
    for chunk in split_text(text, split_points):
        [ids] = encode([anchor + chunk if parts else chunk], index)
        parts.append(ids[len(anchor_ids) :] if parts else ids)
    return np.concatenate(parts)
