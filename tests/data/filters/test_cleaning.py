"""Promise: a document is dropped for the first rule that it breaks, and for nothing else."""

# ruff: noqa: RUF001 - the punctuation of Chinese text is what is tested here

import unicodedata
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.filters.cleaning import Cleaner
from raytune_llama.data.filters.config import CleaningConfig, NgramRule
from raytune_llama.data.filters.words import BATCH_CHARACTERS

SYMBOLS = st.sampled_from("aB 1,.\n人民日报\u2026\uff0c\uff21e\u0301\uac00\ud800")
TEXTS = st.lists(st.text(SYMBOLS, max_size=30) | st.text(max_size=8), max_size=8)
EVERYTHING = CleaningConfig(
    normalization="NFKC",
    min_characters=2,
    max_characters=25,
    max_symbol_share=0.4,
    min_cjk_share=0.2,
    max_cjk_share=0.9,
    max_repeated_line_share=0.3,
    max_repeated_line_characters=0.2,
    max_repeated_paragraph_share=0.3,
    max_repeated_paragraph_characters=0.2,
    top_ngrams=(NgramRule(words=1, max_share=0.5), NgramRule(words=2, max_share=0.4)),
    repeated_ngrams=(NgramRule(words=2, max_share=0.3), NgramRule(words=3, max_share=0.2)),
)


def rule(words: int, max_share: float) -> tuple[NgramRule, ...]:
    return (NgramRule(words=words, max_share=max_share),)


@pytest.mark.parametrize(
    ("fields", "kept", "dropped", "reason"),
    [
        ({"min_characters": 3}, "人 民", "人民", "too_short"),
        ({"max_characters": 3}, "人民\n", "人民日报", "too_long"),
        # Two of eight and three of ten characters that are not white space.
        ({"max_symbol_share": 0.25}, "人民，日报一二。", "人 民，日 报，一 二三 。", "symbols"),
        ({"max_symbol_share": 0.0}, "Nai\u0308ve 7", "a\u200b", "symbols"),
        # Three of four letters; digits and punctuation are none.
        ({"min_cjk_share": 0.75}, "人民报 a 1998！！", "人民 a 1998", "too_little_cjk"),
        ({"min_cjk_share": 0.1}, "人", "1998 ...", "too_little_cjk"),
        ({"max_cjk_share": 0.75}, "カナ한a", "カナ한글a", "too_much_cjk"),
        # One of four lines, blank ones not counted, and white space at the ends neither.
        ({"max_repeated_line_share": 0.25}, "a\n\nb\nc\n a\r", "a\nb\na", "repeated_lines"),
        # Three of nine characters.
        (
            {"max_repeated_line_characters": 0.33334},
            "abc\nabc\ndef",
            "abcd\nabcd\ndef",
            "repeated_line_characters",
        ),
        (
            {"max_repeated_paragraph_share": 0.34},
            "a\nb\n\na\nb\n\n\nc",
            "a\nb\n \na\nb",
            "repeated_paragraphs",
        ),
        (
            {"max_repeated_paragraph_characters": 0.25},
            "aa\n\naa\n\nbbbb",
            "aaa\n\naaa\n\nbbbb",
            "repeated_paragraph_characters",
        ),
        # "ab 人" is 3 of 12 characters and comes twice; what comes once does not count.
        ({"top_ngrams": rule(2, 0.5)}, "ab人, AB人 cdefgh", "ab人 ab人 cdefg", "top_2_gram"),
        # The second "一二三", three of nine; overlapping ones count once.
        (
            {"repeated_ngrams": rule(3, 0.34)},
            "一二三，一二三四五六",
            "哈哈哈哈",
            "repeated_3_grams",
        ),
    ],
)
def test_clean_just_within_a_rule_is_kept_and_beyond_it_dropped(
    fields: dict[str, Any], kept: str, dropped: str, reason: str
) -> None:
    cleaner = Cleaner(CleaningConfig(**fields))
    assert cleaner.reasons == (reason,)
    assert cleaner.clean(kept) == (kept, None)
    assert cleaner.clean(dropped) == (dropped, reason)


def test_clean_without_rules_keeps_everything() -> None:
    cleaner = Cleaner(CleaningConfig())
    assert cleaner.reasons == ()
    assert cleaner.clean_all(["", "\ud800", "\x00" * 9]) == [
        ("", None),
        ("\ud800", None),
        ("\x00" * 9, None),
    ]


def test_clean_breaking_many_rules_names_the_first() -> None:
    cleaner = Cleaner(EVERYTHING)
    assert cleaner.clean("！" * 50).reason == "too_long"
    assert cleaner.clean("，" * 20).reason == "symbols"
    assert cleaner.clean("ha ha\n" * 4).reason == "too_little_cjk"
    assert cleaner.clean("哈 a\n" * 4).reason == "repeated_lines"
    assert cleaner.reasons.index("repeated_lines") < cleaner.reasons.index("top_1_gram")


@given(TEXTS)
def test_clean_all_equals_clean_of_each(texts: list[str]) -> None:
    cleaner = Cleaner(EVERYTHING)
    assert cleaner.clean_all(texts) == [cleaner.clean(text) for text in texts]
    assert {cleaned.reason for cleaned in cleaner.clean_all(texts)} <= {*cleaner.reasons, None}


@given(TEXTS, st.sampled_from(["NFC", "NFKC"]))
def test_clean_normalization_is_that_of_unicode(texts: list[str], form: Any) -> None:  # noqa: ANN401
    found = Cleaner(CleaningConfig(normalization=form)).clean_all(texts)
    assert [cleaned.text for cleaned in found] == [
        unicodedata.normalize(form, text) for text in texts
    ]


def repeated_share(words: str, n: int) -> float:
    """Share of the characters that belong to n that stood there before; each word is one letter."""
    runs = [words[start : start + n] for start in range(len(words) - n + 1)]
    covered = {
        start + offset
        for start, run in enumerate(runs)
        if run in runs[:start]
        for offset in range(n)
    }
    return len(covered) / max(len(words), 1)


def top_share(words: str, n: int) -> float:
    runs = Counter(words[start : start + n] for start in range(len(words) - n + 1))
    most = max((number for number in runs.values() if number > 1), default=0)
    return min(most * n, len(words)) / max(len(words), 1)


@given(
    st.lists(st.text("一二三", max_size=20), max_size=5),
    st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True).map(sorted),
    st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
)
@example(["一一一"], [2], 1.0)
def test_clean_ngrams_equal_the_definition(
    texts: list[str], sizes: list[int], bound: float
) -> None:
    rules = tuple(NgramRule(words=n, max_share=bound) for n in sizes)
    for config, share, name in (
        (CleaningConfig(repeated_ngrams=rules), repeated_share, "repeated_{}_grams"),
        (CleaningConfig(top_ngrams=rules), top_share, "top_{}_gram"),
    ):
        wanted = [
            next((name.format(n) for n in sizes if share(text, n) > bound), None) for text in texts
        ]
        found = Cleaner(config).clean_all(texts)
        assert [cleaned.reason for cleaned in found] == wanted


def test_clean_text_of_many_pieces_is_measured_whole() -> None:
    cleaner = Cleaner(
        CleaningConfig(
            max_symbol_share=0.5, repeated_ngrams=rule(20, 0.45), top_ngrams=rule(1, 0.9)
        )
    )
    unique = "".join(map(chr, range(0x4E00, 0x9000)))
    half = "，" * BATCH_CHARACTERS + "人" * BATCH_CHARACTERS
    assert cleaner.clean(half + "人").reason == "top_1_gram"
    assert cleaner.clean(half + "，").reason == "symbols"
    # The first piece repeats itself nearly everywhere, the second one is a little longer, unique.
    assert cleaner.clean("人民" * (len(unique) // 2) + unique).reason == "repeated_20_grams"


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        (
            {
                "min_characters": 9,
                "max_characters": 8,
                "min_cjk_share": 0.5,
                "max_cjk_share": 0.4,
                "top_ngrams": [{"words": 3, "max_share": 0.1}, {"words": 2, "max_share": 0.1}],
                "repeated_ngrams": [{"words": 5, "max_share": 0.1}] * 2,
            },
            ["min_characters: ", "min_cjk_share: ", "top_ngrams: ", "repeated_ngrams: "],
        ),
        ({"normalization": "NFD"}, ["normalization: "]),
        ({"max_symbol_share": 1.5}, ["max_symbol_share: "]),
    ],
)
def test_config_contradictions_are_refused_at_once(
    data: dict[str, Any], problems: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(CleaningConfig, data)
    assert len(caught.value.problems) == len(problems)
    for line, start in zip(caught.value.problems, problems, strict=True):
        assert line.startswith(start)


def test_inputs_are_the_rules_that_are_on() -> None:
    assert CleaningConfig().fingerprint_inputs == {}
    inputs = CleaningConfig(max_symbol_share=0.0, top_ngrams=rule(2, 0.2)).fingerprint_inputs
    assert inputs == {
        "version": 1,
        "unicode": unicodedata.unidata_version,
        "max_symbol_share": 0.0,
        "top_ngrams": [{"words": 2, "max_share": 0.2}],
    }
