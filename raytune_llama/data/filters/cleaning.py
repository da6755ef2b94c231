"""Which documents of a corpus are worth training on, by rules on their text alone.

    cleaner = Cleaner(CleaningConfig(normalization="NFC", min_characters=20))
    for document, cleaned in zip(batch, cleaner.clean_all(batch), strict=True):
        if cleaned.reason: counts[cleaned.reason] += 1

Each rule is off by default. A dropped document has one reason: the first rule that it breaks, in
the order of `Cleaner.reasons`. The rules of repetition are those of MassiveText (arXiv:2112.11446,
table A1), with other units where theirs fit English alone: their words are ours (`words.py`), of
which a Chinese character is one; shares are of the characters that count, so that none exceeds 1.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings, to_dict
from raytune_llama.data.filters.words import (
    BATCH_CHARACTERS,
    CJK_FLAG,
    LETTER_FLAG,
    SPACE_FLAG,
    SYMBOL_FLAG,
    UNICODE_VERSION,
    WordArrays,
    batch_texts,
    find_words,
)

CLEANING_VERSION = 1
"""Version of what the rules mean; part of the fingerprint."""

Share = Annotated[float, Field(ge=0, le=1)]

_LINE_END = re.compile(r"\n")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_POSITION_MASK = np.uint64(BATCH_CHARACTERS - 1)


@settings
class NgramRule:
    """A bound on what n words in a row may make up of a document."""

    words: Annotated[int, Field(ge=1, le=100)]
    """n: words in a row. A Chinese character, a kana or a Thai letter is a word by itself."""
    max_share: Share
    """Share of the characters of all words; a document with more is dropped."""


@settings
class CleaningConfig:
    """Rules that drop documents, and the normalization before them. Null or empty: off."""

    normalization: Literal["NFC", "NFKC"] | None = None
    """Unicode normalization of every text. NFC changes how a character is written, not what is
    seen. NFKC also turns full-width letters, digits and punctuation into ASCII's, circled numbers
    into numbers and the like: in Chinese text, the commas too."""
    min_characters: Annotated[int, Field(ge=1)] | None = None
    """Shorter documents are dropped: code points, white space included."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Longer documents are dropped: code points, white space included."""
    max_symbol_share: Share | None = None
    """Symbols among the characters that are not white space. A symbol is what is neither letter,
    mark nor number: punctuation, emoji, control characters, U+FFFD."""
    min_cjk_share: Share | None = None
    """Chinese, Japanese and Korean characters among the letters; without a letter the share is
    0. Punctuation and digits are not letters."""
    max_cjk_share: Share | None = None
    """The same, from above."""
    max_repeated_line_share: Share | None = None
    """Lines that stood in the document before, among its lines that are not blank. White space at
    their ends doesn't count."""
    max_repeated_line_characters: Share | None = None
    """Characters in such lines, among those of all lines."""
    max_repeated_paragraph_share: Share | None = None
    """Paragraphs that stood in the document before, among its paragraphs. They are separated by
    blank lines."""
    max_repeated_paragraph_characters: Share | None = None
    """Characters in such paragraphs, among those of all paragraphs."""
    top_ngrams: tuple[NgramRule, ...] = ()
    """For each n, the characters in all occurrences of the n words in a row that make up the most,
    if they occur twice: MassiveText has 2: 0.2, 3: 0.18, 4: 0.16."""
    repeated_ngrams: tuple[NgramRule, ...] = ()
    """For each n, the characters that belong to n words in a row that stood in the document before:
    MassiveText has 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1."""

    @model_validator(mode="after")
    def _check(self) -> "CleaningConfig":
        problems = [
            f"min_{name}: {least} is more than max_{name}, {most}; every document would be dropped"
            for name, least, most in (
                ("characters", self.min_characters, self.max_characters),
                ("cjk_share", self.min_cjk_share, self.max_cjk_share),
            )
            if least is not None and most is not None and least > most
        ]
        for name, rules in (("top", self.top_ngrams), ("repeated", self.repeated_ngrams)):
            lengths = [rule.words for rule in rules]
            if lengths != sorted(set(lengths)):
                problems.append(
                    f"{name}_ngrams: the numbers of words are {lengths}; list each once, ascending"
                )
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def fingerprint_inputs(self) -> dict[str, Any]:
        """What decides the result, as plain JSON data; empty when nothing is on."""
        rules = {name: value for name, value in to_dict(self).items() if value not in (None, [])}
        return {"version": CLEANING_VERSION, "unicode": UNICODE_VERSION, **rules} if rules else {}


class CleanedText(NamedTuple):
    """What became of a document."""

    text: str
    """Its text, normalized if that is on."""
    reason: str | None
    """Why it is dropped, one of `Cleaner.reasons`; None: it is kept."""


class Cleaner:
    """Applies the rules of a config; the same text gives the same result on any machine."""

    def __init__(self, config: CleaningConfig) -> None:
        self._config = config
        self.reasons: tuple[str, ...] = tuple(
            reason for check in _CHECKS for reason, _ in check([], config)
        )
        """The reasons of the rules that are on, in the order in which they are tried."""

    @property
    def is_enabled(self) -> bool:
        """Whether it can change a text, or leave one out."""
        return bool(self.reasons) or self._config.normalization is not None

    def clean(self, text: str) -> CleanedText:
        """Clean one document; `clean_all` is faster for many."""
        return self.clean_all([text])[0]

    def clean_all(self, texts: Sequence[str]) -> list[CleanedText]:
        """Clean documents; none of them has an influence on another.

        Args:
            texts: Their texts. Beside them, about 100 bytes of memory are used for each character
                of the longest text, up to `BATCH_CHARACTERS` of them.

        Returns:
            A result for each, in their order.
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
    # What is normalized already, and that is nearly all, is only looked at. Nothing composes with
    # the end of a line, so that a character which has to be changed costs no more than its line.
    return [
        "\n".join([unicodedata.normalize(form, line) for line in text.split("\n")])
        for text in texts
    ]


def _mapped(texts: Sequence[str]) -> list[str]:
    """Replace characters by their own normalization where it is one character.

    The normalization of the whole stays the same, and Python's, which is slow where anything
    changes (18 MB/s on Chinese text with full-width punctuation), finds nothing left to do.
    """
    table = _compatible_codes()
    mapped = [""] * len(texts)
    changeable = ["" if text.isascii() else text.replace("\u2026", "...") for text in texts]
    for piece in batch_texts(changeable):
        data = table.take(piece.codes).astype("<u4", copy=False).tobytes()
        whole = data.decode("utf-32-le", "surrogatepass")
        starts = piece.starts.tolist()
        for index, start, stop in zip(piece.text.tolist(), starts, starts[1:], strict=False):
            mapped[index] += whole[start:stop]
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
"""A reason, and for each text whether it breaks that rule; only for rules that are on."""


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
    for piece in batch_texts(texts):
        for flag, count in counts.items():
            count[piece.text] += piece.count(flag)
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
    """Return the share of the parts of a text that stood there before, by number and by length."""
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
    for piece in batch_texts(texts):
        words = find_words(piece)
        num_texts = len(piece.text)
        piece_totals = _sums_by_text(words, np.arange(len(words.text)), num_texts)
        totals[piece.text] += piece_totals
        candidates = np.arange(len(words.text))
        for n in sorted({*top, *repeated}):
            # n words that come again begin with fewer words that come again: few are left.
            candidates, is_first = _recurring(words, n, candidates)
            if n in tops:
                most = _top_characters(words, n, candidates, is_first, num_texts)
                tops[n][piece.text] += np.minimum(most, piece_totals)
            if n in repeats:
                covered = _covered(words, n, candidates[~is_first])
                repeats[n][piece.text] += _sums_by_text(words, covered, num_texts)
    for n, bound in top.items():
        yield f"top_{n}_gram", _shares(tops[n], totals) > bound
    for n, bound in repeated.items():
        yield f"repeated_{n}_grams", _shares(repeats[n], totals) > bound


def _recurring(
    words: WordArrays, n: int, candidates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Find the n words in a row that occur more than once in their text.

    Args:
        words: The words of a piece.
        n: How many in a row.
        candidates: Where those may begin that are looked at.

    Returns:
        Where they begin, equal ones together and ascending, and which are the first of their kind.
    """
    starts = candidates[candidates + n <= len(words.text)]
    starts = starts[words.text[starts] == words.text[starts + n - 1]]
    # Sorting values is ten times as fast as sorting indices, so that both share 64 bits: two
    # different rows of a text agree in the 44 bits of the hash about once in 2**44 pairs.
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
    """Return the characters of the n words in a row that make up the most of each text."""
    firsts = np.flatnonzero(is_first)
    counts = np.diff(firsts, append=len(starts))
    sums = np.concatenate([[0], np.cumsum(words.num_characters)])
    lengths = sums[starts[firsts] + n] - sums[starts[firsts]]
    most = np.zeros(num_texts)
    np.maximum.at(most, words.text[starts[firsts]], (counts * lengths).astype(np.float64))
    return most


def _covered(words: WordArrays, n: int, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the words that belong to some of the n words in a row that begin at `starts`."""
    size = len(words.text) + 1
    depth = np.cumsum(np.bincount(starts, minlength=size) - np.bincount(starts + n, minlength=size))
    return np.flatnonzero(depth[:-1])


def _sums_by_text(
    words: WordArrays, places: NDArray[np.int64], num_texts: int
) -> NDArray[np.float64]:
    """Add up the characters of some words for each text."""
    sums = np.bincount(
        words.text[places], weights=words.num_characters[places], minlength=num_texts
    )
    return sums.astype(np.float64, copy=False)


def _shares(parts: NDArray[Any], wholes: NDArray[Any]) -> NDArray[np.float64]:
    """Divide; a part of nothing is 0."""
    return parts / np.maximum(wholes, 1)


_NO = np.zeros(1, dtype=np.bool_)

_CHECKS: tuple[Callable[[Sequence[str], CleaningConfig], _Broken], ...] = (
    _check_lengths,
    _check_characters,
    _check_lines,
    _check_ngrams,
)
