"""Near duplicates of texts by ROUGE-L, against all texts that are kept.

    kept = NearDuplicates(max_rouge_l=0.7)
    if kept.find(text) is None:
        kept.add(text)

ROUGE-L is the F-measure of the longest common subsequence of words, as the package rouge-score
computes it; words are those of `data.filters.words`, so that a Chinese character is one. A word
becomes one character of a string, whose subsequences rapidfuzz compares with bit operations. The
words that two texts have in common bound the measure, so that few texts need that comparison.
"""

from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from raytune_llama.config.errors import UserError
from raytune_llama.data.filters.words import batch_texts, find_words

_ROUNDING = 1e-9
_FIRST_SURROGATE, _NUM_SURROGATES = 0xD800, 0x800
_NUM_CODES = 0x110000 - _NUM_SURROGATES


class Match(NamedTuple):
    """A text that is kept and is too similar to another one."""

    position: int
    """Position of the text in the order of `add`, from 0."""

    rouge_l: float
    """F-measure of ROUGE-L, at most 1."""


class _Postings(NamedTuple):
    """Texts that have a word."""

    indices: "array[int]"
    """Index of each text."""

    counts: "array[int]"
    """Number of times that it has the word."""


class NearDuplicates:
    """Texts that are kept, and the search for one that is similar to a new text."""

    def __init__(self, max_rouge_l: float) -> None:
        """Start without a text.

        Args:
            max_rouge_l: F-measure above which two texts are near duplicates.
        """
        self._limit = max_rouge_l
        self._codes: dict[int, str] = {}
        self._texts: list[str] = []
        self._lengths = array("i")
        self._postings: dict[str, _Postings] = {}

    def add(self, text: str) -> None:
        """Keep a text."""
        words = self._encode(text)
        for word, count in Counter(words).items():
            postings = self._postings.get(word)
            if postings is None:
                postings = self._postings[word] = _Postings(array("i"), array("i"))
            postings.indices.append(len(self._texts))
            postings.counts.append(count)
        self._texts.append(words)
        self._lengths.append(len(words))

    def find(self, text: str) -> Match | None:
        """Return the most similar text that is kept; None if none is a near duplicate."""
        words = self._encode(text)
        # F is 2 LCS / (m + n), and LCS at most the number of words that both have, in any order.
        lengths = np.frombuffer(self._lengths, np.int32)
        wanted = np.ceil(self._limit * (len(words) + lengths) / 2 - _ROUNDING)
        best: Match | None = None
        for index in np.flatnonzero(self._count_common(words) >= np.maximum(wanted, 1)).tolist():
            common = LCSseq.similarity(words, self._texts[index])
            measure = _f_measure(common, len(words), len(self._texts[index]))
            if measure > max(self._limit, best.rouge_l if best else 0.0):
                best = Match(index, measure)
        return best

    def _count_common(self, words: str) -> NDArray[np.int32]:
        """Count the words that a text has in common with each text that is kept."""
        common = np.zeros(len(self._texts), np.int32)
        for word, count in Counter(words).items():
            postings = self._postings.get(word)
            if postings is not None:
                indices = np.frombuffer(postings.indices, np.int32)
                common[indices] += np.minimum(np.frombuffer(postings.counts, np.int32), count)
        return common

    def _encode(self, text: str) -> str:
        """Return a text with one character per word; equal words have the same one."""
        hashes: list[int] = []
        for batch in batch_texts([text]):
            words = find_words(batch)
            starts = np.arange(len(words.text))
            hashes += words.hash_ngrams(starts, starts + 1).tolist()
        return "".join([self._codes.get(word) or self._add_word(word) for word in hashes])

    def _add_word(self, word: int) -> str:
        number = len(self._codes)
        if number == _NUM_CODES:
            raise UserError(f"the instructions have more than {_NUM_CODES} different words")
        code = number if number < _FIRST_SURROGATE else number + _NUM_SURROGATES
        return self._codes.setdefault(word, chr(code))


def _f_measure(common: int, first: int, second: int) -> float:
    """Return the F-measure of ROUGE-L, with the rounding of rouge-score.

    Args:
        common: Length of the longest common subsequence, in words.
        first: Length of one text, in words.
        second: Length of the other one, in words.
    """
    if not common:
        return 0.0
    precision, recall = common / first, common / second
    return 2 * precision * recall / (precision + recall)
