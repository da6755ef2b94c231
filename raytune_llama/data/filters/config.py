"""Settings of the document filters: cleaning rules and deduplication."""

import unicodedata
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings, to_dict

UNICODE_VERSION: Final = unicodedata.unidata_version
"""Version of the Unicode tables of letters, symbols and spaces; part of dependent fingerprints."""


CLEANING_VERSION = 1
"""Version of the cleaning rules; part of the fingerprint."""


Share = Annotated[float, Field(ge=0, le=1)]


@settings
class NgramRule:
    """A limit on the share of certain word n-grams in a document."""

    words: Annotated[int, Field(ge=1, le=100)]
    """Number of words, n. A Chinese character, a kana or a Thai letter is a word by itself."""
    max_share: Share
    """Maximum share of the characters of all words; documents with more are dropped."""


@settings
class CleaningConfig:
    """Rules that drop documents, and the normalization applied first. Null or empty: off."""

    normalization: Literal["NFC", "NFKC"] | None = None
    """Unicode normalization of every text. NFC changes how a character is encoded, not how it
    looks. NFKC also turns full-width letters, digits and punctuation into ASCII, circled numbers
    into numbers and so on, including the commas of Chinese text."""
    min_characters: Annotated[int, Field(ge=1)] | None = None
    """Minimum length in code points, white space included; shorter documents are dropped."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Maximum length in code points, white space included; longer documents are dropped."""
    max_symbol_share: Share | None = None
    """Maximum share of symbols among the characters that are not white space. Symbols are all but
    letters, marks and numbers: punctuation, emoji, control characters, U+FFFD."""
    min_cjk_share: Share | None = None
    """Minimum share of Chinese, Japanese and Korean characters among the letters; without letters,
    the share is 0. Punctuation and digits are not letters."""
    max_cjk_share: Share | None = None
    """Maximum share of Chinese, Japanese and Korean characters among the letters."""
    max_repeated_line_share: Share | None = None
    """Maximum share of repeated lines, equal to an earlier one, among the lines that are not blank.
    White space at their ends is ignored."""
    max_repeated_line_characters: Share | None = None
    """Maximum share of the characters of repeated lines among those of all lines."""
    max_repeated_paragraph_share: Share | None = None
    """Maximum share of repeated paragraphs, equal to an earlier one, among all paragraphs. Blank
    lines separate paragraphs."""
    max_repeated_paragraph_characters: Share | None = None
    """Maximum share of the characters of repeated paragraphs among those of all paragraphs."""
    top_ngrams: tuple[NgramRule, ...] = ()
    """Limits, per n, on the characters in all occurrences of the n-gram that covers the most, if it
    occurs at least twice. MassiveText has 2: 0.2, 3: 0.18, 4: 0.16."""
    repeated_ngrams: tuple[NgramRule, ...] = ()
    """Limits, per n, on the characters in n-grams that occurred earlier in the document.
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
                    f"{name}_ngrams: the values of words are {lengths}; list each once, ascending"
                )
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def fingerprint_inputs(self) -> dict[str, Any]:
        """The settings that determine the result, as plain JSON data; empty if all are off."""
        rules = {name: value for name, value in to_dict(self).items() if value not in (None, [])}
        return {"version": CLEANING_VERSION, "unicode": UNICODE_VERSION, **rules} if rules else {}


SIGNATURES_VERSION = 1
"""Version of the signature algorithm; part of the fingerprint."""


@settings
class NearDuplicatesConfig:
    """Near-duplicate detection by MinHash: documents that share most of their word n-grams."""

    shingle_words: Annotated[int, Field(ge=1, le=100)] = 5
    """Number of consecutive words per shingle; a Chinese character is a word. With fewer, long
    documents are similar because of common phrases. A shorter document is one shingle."""
    bands: Annotated[int, Field(ge=1, le=256)] = 14
    """Number of bands, of which one must agree for a pair to be found. A document takes 8 bytes per
    band during the search, and 16 more in its shuffle."""
    rows: Annotated[int, Field(ge=1, le=64)] = 8
    """Number of values per band, which must all agree; more rows find fewer pairs. With 14 bands of
    8 rows, 56 % of the pairs sharing 0.7 of their shingles are found, 92 % at 0.8, 5 % at 0.5."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Seed of the hash functions."""

    def detection_probability(self, similarity: float) -> float:
        """Return the share of pairs found at a similarity (shared / all shingles)."""
        return 1 - (1 - similarity**self.rows) ** self.bands


@settings
class DuplicatesConfig:
    """Deduplication over all documents of a store: the first in source order is kept."""

    exact: bool = False
    """Drop documents whose text is identical to that of an earlier one."""
    near: NearDuplicatesConfig | None = None
    """Drop documents that are similar to an earlier one, directly or through a chain of similar
    documents. Null: off."""

    @property
    def fingerprint_inputs(self) -> dict[str, Any]:
        """The settings that determine the result, as plain JSON data; empty if all are off."""
        rules: dict[str, Any] = {"exact": True} if self.exact else {}
        if self.near is not None:
            rules |= {"near": to_dict(self.near), "unicode": UNICODE_VERSION}
        return {"version": SIGNATURES_VERSION, **rules} if rules else {}
