"""Characters and words of many texts at once, as arrays.

    for batch in batch_texts(texts):
        words = find_words(batch)
        pairs = words.hash_ngrams(starts, starts + 2)

A word here is a character of a script that is written without spaces (Chinese, kana, Thai, ...),
or a run of other letters, marks and digits; white space, punctuation and symbols only separate
words. So "人民 Daily 1998" has four words, and an n-gram means about as much in Chinese as in
English, without a dictionary. Case is ignored.

Results for a text depend only on that text, not on others in its batch, and on the version of the
Unicode tables (`UNICODE_VERSION`), which is that of the Python interpreter.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BATCH_CHARACTERS = 1 << 20
"""Maximum size of a batch; a longer text is split, and nothing is found across the split."""

_GROUP_CHARACTERS = 1 << 16  # per batch of short texts, so that the arrays stay in the CPU cache

SPACE_FLAG, SYMBOL_FLAG, LETTER_FLAG, CJK_FLAG, WORD_FLAG, SINGLE_WORD_FLAG = (
    1 << bit for bit in range(6)
)
"""Flags of a character: white space; neither space, letter, mark nor number; letter; Chinese,
Japanese or Korean; part of a word; a word by itself."""

# Listed by block, since unicodedata does not have scripts.
_HAN = [(0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B), (0x3400, 0x4DBF)]
_HAN += [(0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD)]
_KANA = [(0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F)]
_BOPOMOFO = [(0x3100, 0x312F), (0x31A0, 0x31BF)]
_HANGUL = [(0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)]
_HANGUL += [(0xFFA0, 0xFFDC)]
# Thai and Lao, Tibetan, Myanmar, Khmer.
_NO_SPACES = [(0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF)]
_NUM_CODES = 0x110000

# Base of the polynomial hash modulo 2**64; odd, so that it has an inverse.
_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class TextBatch:
    """Several texts, or a part of one that is longer than `BATCH_CHARACTERS`."""

    text: NDArray[np.int64]
    """[T] Index of each text among all, ascending."""
    starts: NDArray[np.int64]
    """[T + 1] First character of each text in `codes`, and the end of the last one."""
    codes: NDArray[np.uint32]
    """[C] Code points of the texts, one after the other."""
    flags: NDArray[np.uint8]
    """[C] Flags of the characters."""

    def count(self, flag: int) -> NDArray[np.int64]:
        """Count the characters with a flag in each text, [T]."""
        counts = np.zeros(len(self.text), dtype=np.int64)
        is_filled = self.starts[:-1] < self.starts[1:]
        has_flag = ((self.flags & flag) != 0).view(np.uint8)
        firsts = self.starts[:-1][is_filled]
        counts[is_filled] = np.add.reduceat(has_flag, firsts, dtype=np.int64)
        return counts


@dataclass(frozen=True)
class WordArrays:
    """The words of a batch of texts."""

    text: NDArray[np.int64]
    """[W] Index of each word's text in the batch, ascending."""
    num_characters: NDArray[np.int64]
    """[W] Length of each word."""
    prefixes: NDArray[np.uint64]
    """[W + 1] Hash of all words before each word, and of all."""

    def hash_ngrams(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64]
    ) -> NDArray[np.uint64]:
        """Hash n-grams of words, [R]: equal n-grams have equal hashes, wherever they occur.

        Args:
            starts: [R] First word of each n-gram.
            stops: [R] End of each n-gram, exclusive.
        """
        inverses = _powers()[1]
        sums = self.prefixes.take(stops) - self.prefixes.take(starts)
        return mix_bits(sums * inverses.take(starts))


def batch_texts(texts: Sequence[str]) -> Iterator[TextBatch]:
    """Group texts into batches of at most `BATCH_CHARACTERS`.

    A longer text is split at multiples of it, so that the splits depend on nothing else.
    """
    bounds = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(list(map(len, texts)), out=bounds[1:])
    first = 0
    while first < len(texts):
        text = texts[first]
        for start in range(0, len(text), BATCH_CHARACTERS) if len(text) > BATCH_CHARACTERS else ():
            part = text[start : start + BATCH_CHARACTERS]
            yield _text_batch(first, np.array([0, len(part)]), part)
        stop = int(np.searchsorted(bounds, bounds[first] + _GROUP_CHARACTERS, side="right")) - 1
        stop = max(stop, first + 1)
        if len(text) <= BATCH_CHARACTERS:
            yield _text_batch(
                first, bounds[first : stop + 1] - bounds[first], "".join(texts[first:stop])
            )
        first = stop


def find_words(batch: TextBatch) -> WordArrays:
    """Find the words of a batch of texts."""
    is_word = (batch.flags & (WORD_FLAG | SINGLE_WORD_FLAG)) != 0
    breaks = ~is_word | ((batch.flags & SINGLE_WORD_FLAG) != 0)
    begins = is_word.copy()
    begins[1:] &= breaks[1:] | breaks[:-1]
    firsts = batch.starts[:-1][batch.starts[:-1] < len(begins)]
    begins[firsts] = is_word[firsts]
    starts = np.flatnonzero(begins)
    powers, inverses = _powers()
    terms = folded_codes().take(batch.codes).astype(np.uint64)
    terms += np.uint64(1)
    terms *= powers[: len(terms)]
    terms *= is_word
    sums = np.zeros(len(terms) + 1, dtype=np.uint64)
    np.cumsum(terms, out=sums[1:])
    # The characters between a word and the next one add nothing.
    bounds = np.append(starts, len(terms))
    hashes = mix_bits(np.diff(sums.take(bounds)) * inverses.take(starts))
    hashes *= powers[: len(hashes)]
    prefixes = np.zeros(len(hashes) + 1, dtype=np.uint64)
    np.cumsum(hashes, out=prefixes[1:])
    lengths = np.zeros(len(terms) + 1, dtype=np.int64)
    np.cumsum(is_word, out=lengths[1:])
    counts = np.diff(np.searchsorted(starts, batch.starts))
    return WordArrays(
        text=np.repeat(np.arange(len(counts)), counts),
        num_characters=np.diff(lengths.take(bounds)),
        prefixes=prefixes,
    )


def mix_bits(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all others: a bijection of 64-bit integers."""
    hashes = (hashes ^ (hashes >> _SHIFT)) * _MIX
    hashes = (hashes ^ (hashes >> _SHIFT)) * _MIX
    return hashes ^ (hashes >> _SHIFT)


@functools.cache
def character_flags() -> NDArray[np.uint8]:
    """Return the flags of every code point."""
    flags = np.zeros(_NUM_CODES, dtype=np.uint8)
    by_category = {"L": LETTER_FLAG | WORD_FLAG, "M": WORD_FLAG, "N": WORD_FLAG}
    for code in range(_NUM_CODES):
        character = chr(code)
        general = unicodedata.category(character)[0]
        flags[code] = SPACE_FLAG if character.isspace() else by_category.get(general, SYMBOL_FLAG)
    for first, last in [*_HAN, *_KANA, *_BOPOMOFO, *_HANGUL]:
        block = flags[first : last + 1]
        block |= np.where(block & WORD_FLAG, CJK_FLAG | LETTER_FLAG, 0).astype(np.uint8)
    for first, last in [*_HAN, *_KANA, *_BOPOMOFO, *_NO_SPACES]:
        block = flags[first : last + 1]
        block |= np.where(block & WORD_FLAG, SINGLE_WORD_FLAG, 0).astype(np.uint8)
    return flags


@functools.cache
def folded_codes() -> NDArray[np.uint32]:
    """Return the lowercase of every code point, or itself if that is not a single one."""
    folded = np.arange(_NUM_CODES, dtype=np.uint32)
    for code in range(_NUM_CODES):
        lower = chr(code).lower()
        if len(lower) == 1:
            folded[code] = ord(lower)
    return folded


@functools.cache
def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the powers of the hash's base and of its inverse, modulo 2**64."""
    tables = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(BATCH_CHARACTERS + 1, base, dtype=np.uint64)
        factors[0] = 1
        tables.append(np.cumprod(factors, dtype=np.uint64))
    return tables[0], tables[1]


def _text_batch(first: int, starts: NDArray[np.int64], text: str) -> TextBatch:
    # Lone surrogates are rejected elsewhere; here they are symbols.
    data = text.encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(data, dtype="<u4").astype(np.uint32, copy=False)
    return TextBatch(
        np.arange(first, first + len(starts) - 1), starts, codes, character_flags().take(codes)
    )
