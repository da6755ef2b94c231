"""Quality filters: which documents of a corpus are worth training on, by rules on their text.

    cleaner = Cleaner(CleaningConfig(normalization="NFC", min_characters=20))
    for document, cleaned in zip(batch, cleaner.clean_all(batch), strict=True):
        if cleaned.reason: counts[cleaned.reason] += 1

Each rule is off by default. A dropped document has one reason: the first rule that it breaks, in
the order of `Cleaner.reasons`. The repetition rules are those of MassiveText (arXiv:2112.11446,
table A1), adapted where their units fit only English: words are those of `words.py`, where a
Chinese character is one; shares are of the characters that are counted, so that none exceeds 1.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raytune_llama.data.filters.config import CleaningConfig
from raytune_llama.data.filters.words import (
    BATCH_CHARACTERS,
    CJK_FLAG,
    LETTER_FLAG,
    SPACE_FLAG,
    SYMBOL_FLAG,
    WordArrays,
    batch_texts,
    find_words,
)

_LINE_END = re.compile(r"\n")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_POSITION_MASK = np.uint64(BATCH_CHARACTERS - 1)


class CleanedText(NamedTuple):
    """The result of cleaning a document."""

    text: str
    """Text of the document, normalized if that is on."""
    reason: str | None
    """Why the document is dropped, one of `Cleaner.reasons`; None: it is kept."""


class Cleaner:
    """Applies the rules of a config; the same text gives the same result on any machine."""

    def __init__(self, config: CleaningConfig) -> None:
        self._config = config
        self.reasons: tuple[str, ...] = tuple(
            reason for check in _CHECKS for reason, _ in check([], config)
        )
        """Reasons of the rules that are on, in the order in which they are applied."""

    @property
    def is_enabled(self) -> bool:
        """Whether cleaning can change or drop a text."""
        return bool(self.reasons) or self._config.normalization is not None

    def clean(self, text: str) -> CleanedText:
        """Clean one document; `clean_all` is faster for many."""
        return self.clean_all([text])[0]

    def clean_all(self, texts: Sequence[str]) -> list[CleanedText]:
        """Clean documents, each independently of the others.

        Args:
            texts: Texts of the documents. Uses about 100 bytes of extra memory per character of the
                longest text, for up to `BATCH_CHARACTERS` characters.

        Returns:
            One result per document, in order.
        """
        if self._config.normalization is not None:
            texts = _normalized(texts, self._config.normalization)
        reasons: list[str | None] = [None] * len(texts)
        left = range(len(texts))
        for check in _CHECKS:
            for reason, is_broken in check([texts[index] for index in left], self._config):
                for place in np.flatnonzero(is_broken).tolist():
                    reasons[left[place]] = reasons[left[place]] or reason
            left = [index for index in left if reasons[index] is None]
        return list(map(CleanedText, texts, reasons))


def _normalized(texts: Sequence[str], form: Literal["NFC", "NFKC"]) -> list[str]:
    if form == "NFKC":
        texts = _mapped(texts)
    # Text that is normalized already, as nearly all is, is only checked. Nothing composes with a
    # line end, so that a character that has to change costs no more than its line.
    return [
        "\n".join([unicodedata.normalize(form, line) for line in text.split("\n")])
        for text in texts
    ]


def _mapped(texts: Sequence[str]) -> list[str]:
    """Replace each character by its own normalization if that is a single character.

    The normalization of the text stays the same, and Python's, which is slow if anything changes
    (18 MB/s on Chinese text with full-width punctuation), has nothing left to do.
    """
    table = _compatible_codes()
    mapped = [""] * len(texts)
    changeable = ["" if text.isascii() else text.replace("\u2026", "...") for text in texts]
    for batch in batch_texts(changeable):
        data = table.take(batch.codes).astype("<u4", copy=False).tobytes()
        joined = data.decode("utf-32-le", "surrogatepass")
        starts = batch.starts.tolist()
        for index, start, stop in zip(batch.text.tolist(), starts, starts[1:], strict=False):
            mapped[index] += joined[start:stop]
    return [new or text for new, text in zip(mapped, texts, strict=True)]


@functools.cache
def _compatible_codes() -> NDArray[np.uint32]:
    codes = np.arange(0x110000, dtype=np.uint32)
    for code in range(len(codes)):
        normal = unicodedata.normalize("NFKC", chr(code))
        if len(normal) == 1:
            codes[code] = ord(normal)
    return codes


_Broken = Iterator[tuple[str, NDArray[np.bool_]]]
"""Reasons of the rules that are on, each with an array of whether a text breaks the rule."""


def _check_lengths(texts: Sequence[str], config: CleaningConfig) -> _Broken:
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    if config.min_characters is not None:
        yield "too_short", lengths < config.min_characters
    if config.max_characters is not None:
        yield "too_long", lengths > config.max_characters


def _check_characters(texts: Sequence[str], config: CleaningConfig) -> _Broken:
    cjk_bounds = (config.min_cjk_share, config.max_cjk_share)
    flags = () if config.max_symbol_share is None else (SPACE_FLAG, SYMBOL_FLAG)
    flags += () if cjk_bounds == (None, None) else (LETTER_FLAG, CJK_FLAG)
    if not flags:
        return
    counts = {flag: np.zeros(len(texts), dtype=np.int64) for flag in flags}
    for batch in batch_texts(texts):
        for flag, count in counts.items():
            count[batch.text] += batch.count(flag)
    if config.max_symbol_share is not None:
        visible = np.array([len(text) for text in texts], dtype=np.int64) - counts[SPACE_FLAG]
        yield "symbols", _shares(counts[SYMBOL_FLAG], visible) > config.max_symbol_share
    if config.min_cjk_share is not None:
        yield (
            "too_little_cjk",
            _shares(counts[CJK_FLAG], counts[LETTER_FLAG]) < config.min_cjk_share,
        )
    if config.max_cjk_share is not None:
        yield "too_much_cjk", _shares(counts[CJK_FLAG], counts[LETTER_FLAG]) > config.max_cjk_share


def _check_lines(texts: Sequence[str], config: CleaningConfig) -> _Broken:
    line_bounds = (config.max_repeated_line_share, config.max_repeated_line_characters)
    paragraph_bounds = (
        config.max_repeated_paragraph_share,
        config.max_repeated_paragraph_characters,
    )
    for name, end, bounds in (
        ("line", _LINE_END, line_bounds),
        ("paragraph", _PARAGRAPH_END, paragraph_bounds),
    ):
        if bounds == (None, None):
            continue
        shares = np.zeros((len(texts), 2))
        for place, text in enumerate(texts):
            if "\n" in text:
                shares[place] = _repeated_shares(text, end)
        for reason, values, bound in zip(
            (f"repeated_{name}s", f"repeated_{name}_characters"), shares.T, bounds, strict=True
        ):
            if bound is not None:
                yield reason, values > bound


def _repeated_shares(text: str, end: re.Pattern[str]) -> tuple[float, float]:
    """Return the share of repeated parts in a text, by count and by characters."""
    parts = [part for part in map(str.strip, end.split(text)) if part]
    first = set(parts)
    num_characters = sum(map(len, parts))
    return (
        (len(parts) - len(first)) / max(len(parts), 1),
        (num_characters - sum(map(len, first))) / max(num_characters, 1),
    )


def _check_ngrams(texts: Sequence[str], config: CleaningConfig) -> _Broken:
    top = {rule.words: rule.max_share for rule in config.top_ngrams}
    repeated = {rule.words: rule.max_share for rule in config.repeated_ngrams}
    if not top and not repeated:
        return
    totals = np.zeros(len(texts))
    tops = {n: np.zeros(len(texts)) for n in top}
    repeats = {n: np.zeros(len(texts)) for n in repeated}
    for batch in batch_texts(texts):
        words = find_words(batch)
        num_texts = len(batch.text)
        batch_totals = _sums_by_text(words, np.arange(len(words.text)), num_texts)
        totals[batch.text] += batch_totals
        candidates = np.arange(len(words.text))
        for n in sorted({*top, *repeated}):
            # A repeated n-gram begins with a repeated shorter one, so that few candidates are left.
            candidates, is_first = _recurring(words, n, candidates)
            if n in tops:
                most = _top_characters(words, n, candidates, is_first, num_texts)
                tops[n][batch.text] += np.minimum(most, batch_totals)
            if n in repeats:
                covered = _covered(words, n, candidates[~is_first])
                repeats[n][batch.text] += _sums_by_text(words, covered, num_texts)
    for n, bound in top.items():
        yield f"top_{n}_gram", _shares(tops[n], totals) > bound
    for n, bound in repeated.items():
        yield f"repeated_{n}_grams", _shares(repeats[n], totals) > bound


def _recurring(
    words: WordArrays, n: int, candidates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Find the n-grams that occur more than once in their text.

    Args:
        words: The words of a batch.
        n: Number of words per n-gram.
        candidates: First words of the n-grams to check.

    Returns:
        First words of the repeated n-grams, equal n-grams together and ascending, and whether each
        is the first of its kind.
    """
    starts = candidates[candidates + n <= len(words.text)]
    starts = starts[words.text[starts] == words.text[starts + n - 1]]
    # Sorting values is ten times as fast as sorting indices, so hash and index share 64 bits: two
    # different n-grams of a text agree in the 44 bits of the hash about once in 2**44 pairs.
    keys = words.hash_ngrams(starts, starts + n)
    keys &= ~_POSITION_MASK
    keys |= starts.astype(np.uint64)
    keys.sort()
    starts = (keys & _POSITION_MASK).astype(np.int64)
    hashes, texts = keys & ~_POSITION_MASK, words.text[starts]
    is_same = (hashes[1:] == hashes[:-1]) & (texts[1:] == texts[:-1])
    has_earlier = np.concatenate([_NO, is_same])[: len(starts)]
    has_later = np.concatenate([is_same, _NO])[: len(starts)]
    recurs = has_earlier | has_later
    return starts[recurs], ~has_earlier[recurs]


def _top_characters(
    words: WordArrays,
    n: int,
    starts: NDArray[np.int64],
    is_first: NDArray[np.bool_],
    num_texts: int,
) -> NDArray[np.float64]:
    """Return the number of characters of the n-gram that covers the most of each text."""
    firsts = np.flatnonzero(is_first)
    counts = np.diff(firsts, append=len(starts))
    sums = np.concatenate([[0], np.cumsum(words.num_characters)])
    lengths = sums[starts[firsts] + n] - sums[starts[firsts]]
    most = np.zeros(num_texts)
    np.maximum.at(most, words.text[starts[firsts]], (counts * lengths).astype(np.float64))
    return most


def _covered(words: WordArrays, n: int, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the words that belong to any of the n-grams that begin at `starts`."""
    size = len(words.text) + 1
    depth = np.cumsum(np.bincount(starts, minlength=size) - np.bincount(starts + n, minlength=size))
    return np.flatnonzero(depth[:-1])


def _sums_by_text(
    words: WordArrays, places: NDArray[np.int64], num_texts: int
) -> NDArray[np.float64]:
    """Sum the characters of some words per text."""
    sums = np.bincount(
        words.text[places], weights=words.num_characters[places], minlength=num_texts
    )
    return sums.astype(np.float64, copy=False)


def _shares(parts: NDArray[Any], totals: NDArray[Any]) -> NDArray[np.float64]:
    """Divide; a share of nothing is 0."""
    return parts / np.maximum(totals, 1)


_NO = np.zeros(1, dtype=np.bool_)

_CHECKS: tuple[Callable[[Sequence[str], CleaningConfig], _Broken], ...] = (
    _check_lengths,
    _check_characters,
    _check_lines,
    _check_ngrams,
)
