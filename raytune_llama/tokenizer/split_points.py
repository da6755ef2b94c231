"""Where a text may be cut so that its ids are those of the parts, one after another.

Byte-pair merging works on a whole text at once, so that a document of 200 MB costs gigabytes. But
a merge makes a piece of the vocabulary: between two characters that stand side by side in no
piece, none ever happens, and since merges on one side don't look at the other, both sides get the
ids that they have in the whole (`PairSplitPoints`). Byte-level tokenizers split a text by a pattern
before they merge; after a letter that no letter follows, all patterns known here end a word,
whatever comes before and after (`LetterSplitPoints`).

A part behind a cut is encoded behind an anchor, whose ids are then dropped: a tokenizer that puts
a space before a text puts it before the anchor.
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
"""Longer texts are cut into stretches of at most this size, if there is a place."""

MAX_CHUNK_CHARACTERS = 1 << 22
"""A stretch that can be cut nowhere may be this long: it takes 0.2 to 0.7 GB of memory."""

SPACE = "\u2581"
"""What SentencePiece writes for a space; written in a text it is a space to it."""

_GROUP_CHARACTERS = 1 << 19

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class UnsplittableTextError(UserError):
    """A text is too long to be encoded whole, and no place to cut it is certain."""


class SplitPoints(Protocol):
    """Tells where a text may be cut."""

    @property
    def anchor(self) -> str:
        """What is put before a part that is not the first."""
        ...

    def is_safe_split(self, text: str, at: int) -> bool:
        """Whether the ids of `text` are those of `text[:at]` and then those of `text[at:]`."""
        ...


@dataclass(frozen=True)
class PairSplitPoints:
    """Cuts between characters that no piece holds side by side."""

    joined: frozenset[str]
    """All pairs of characters that a piece holds, with plain spaces."""
    anchor: str
    """A character that no longer piece holds."""

    def is_safe_split(self, text: str, at: int) -> bool:
        """See `SplitPoints.is_safe_split`."""
        return text[at - 1 : at + 1].replace(SPACE, " ") not in self.joined


@dataclass(frozen=True)
class LetterSplitPoints:
    """Cuts behind a letter that is followed by a space or a sign."""

    joined: frozenset[str]
    """Pairs of characters inside of tokens that are found before a text is split."""
    anchor: str = ""
    """Nothing: no space is put before a text."""

    def is_safe_split(self, text: str, at: int) -> bool:
        """See `SplitPoints.is_safe_split`."""
        before, behind = text[at - 1], text[at]
        return (
            unicodedata.category(before)[0] == "L"
            # Signs and spaces start a new character for Unicode's normal forms, too.
            and (behind in " \t\r\n" or unicodedata.category(behind)[0] in "PSZ")
            and before + behind not in self.joined
        )


def adjacent_character_pairs(pieces: Sequence[str]) -> frozenset[str]:
    """Return the pairs of characters that stand side by side in some piece."""
    return frozenset(a + b for piece in pieces for a, b in pairwise(piece))


def build_pair_split_points(pieces: Sequence[str]) -> PairSplitPoints | None:
    """Return the cuts of a vocabulary that merges characters; None if it offers no anchor."""
    joined = adjacent_character_pairs([piece.replace(SPACE, " ") for piece in pieces])
    inside = {character for pair in joined for character in pair}
    anchors = (character for character in "\n\t\r\x01\x02\x03" if character not in inside)
    anchor = next(anchors, None)
    return None if anchor is None else PairSplitPoints(joined, anchor)


def build_engine_split_points(engine: dict[str, Any]) -> SplitPoints | None:
    """Return the cuts of a `tokenizers` engine, given its JSON; None if it is of no known kind."""
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
    # Behind a token that is found in the text a space is put before what follows.
    if is_whole_text_bpe(engine) and not texts:
        return build_pair_split_points(list(model["vocab"]))
    return None


def is_whole_text_bpe(engine: dict[str, Any]) -> bool:
    """Whether an engine merges the characters of a whole text, as LLaMA's first tokenizers do."""
    model, normalizer, splitter = engine["model"], engine["normalizer"], engine["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    spaces = (
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    )
    whole = splitter is None or (
        splitter["type"] == "Metaspace"
        and splitter["replacement"] == SPACE
        and splitter["split"] is False
    )
    return bool(
        model["type"] == "BPE"
        and model["byte_fallback"]
        and not model.get("ignore_merges")
        and whole
        and all(step in spaces for step in steps)
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    )


def find_split_pattern(engine: dict[str, Any]) -> str | None:
    """Name the pattern by which a byte-level engine splits a text; None for one not known here.

    Returns:
        `gpt2`, `gpt2-digits` (each digit alone), `words-1` or `words-3` (Qwen's and LLaMA 3's,
        with at most so many digits in a row).
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


def split_text(text: str, cuts: SplitPoints | None) -> Iterator[str]:
    """Cut a text into stretches of `CHUNK_CHARACTERS`, or longer where no place is certain.

    Raises:
        UncuttableTextError: A stretch would be longer than `MAX_CHUNK_CHARACTERS`.
    """
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        end = _next_split_point(text, start, cuts)
        if end - start > MAX_CHUNK_CHARACTERS:
            raise UnsplittableTextError(
                f"there is no place in {end - start} characters where the text could be cut "
                f"without a change of ids, and whole they need too much memory; at most "
                f"{MAX_CHUNK_CHARACTERS} can be encoded: {text[start : start + 40]!r} ..."
            )
        if end - start > 2 * CHUNK_CHARACTERS:
            logger.warning(
                "a text could not be cut within %d characters, which are encoded whole: %r ...",
                end - start,
                text[start : start + 40],
            )
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _next_split_point(text: str, start: int, cuts: SplitPoints | None) -> int:
    """Return the last certain place within a stretch, or the first behind it, or the end."""
    if cuts is None:
        return len(text)
    wanted = start + CHUNK_CHARACTERS
    farthest = min(len(text), start + MAX_CHUNK_CHARACTERS + 1)
    places = chain(range(wanted, start, -1), range(wanted + 1, farthest))
    return next((at for at in places if cuts.is_safe_split(text, at)), len(text))


EncodeFunction = Callable[[Sequence[str], int], list[np.ndarray]]
"""Encodes texts whole; the number is the first one's place among all texts."""


def encode_in_chunks(
    texts: Sequence[str], cuts: SplitPoints | None, encode: EncodeFunction
) -> list[np.ndarray]:
    """Encode texts of any length with `encode`, of which memory depends on what it gets at once."""
    if sum(map(len, texts)) <= CHUNK_CHARACTERS:
        return encode(texts, 0)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    ends = np.cumsum(lengths)
    long = [*np.flatnonzero(lengths > CHUNK_CHARACTERS).tolist(), len(texts)]
    results: list[np.ndarray] = []
    start = 0
    while start < len(texts):
        if start == long[0]:
            results.append(_encode_long(texts[start], long.pop(0), cuts, encode))
            start += 1
            continue
        before = ends[start] - lengths[start]
        full = int(np.searchsorted(ends, before + _GROUP_CHARACTERS)) + 1
        stop = min(full, long[0])
        results += encode(texts[start:stop], start)
        start = stop
    return results


def _encode_long(
    text: str, index: int, cuts: SplitPoints | None, encode: EncodeFunction
) -> np.ndarray:
    anchor = "" if cuts is None else cuts.anchor
    [anchor_ids] = encode([anchor], index)
    parts: list[np.ndarray] = []
    for stretch in split_text(text, cuts):
        [ids] = encode([anchor + stretch if parts else stretch], index)
        parts.append(ids[len(anchor_ids) :] if parts else ids)
    return np.concatenate(parts)
