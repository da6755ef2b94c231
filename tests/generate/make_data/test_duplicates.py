"""Near duplicates are found exactly as rouge-score measures them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from raytune_llama.generate.make_data.duplicates import NearDuplicates


class _Characters(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return list(text)


ENGLISH = RougeScorer(["rougeL"])
CHINESE = RougeScorer(["rougeL"], tokenizer=_Characters())

few_words = st.lists(st.sampled_from(["sort", "a", "List", "of", "x1", "it's"]), max_size=12)
english = few_words.map(" ".join) | st.text("ab1 _-.,", max_size=30)
chinese = st.text("写一首关于春天的诗", max_size=14)
limits = st.sampled_from([0.5, 0.7, 0.9, 1.0])


def check_equal(kept: list[str], text: str, limit: float, scorer: RougeScorer) -> None:
    search = NearDuplicates(limit)
    for one in kept:
        search.add(one)
    scores = [scorer.score(one, text)["rougeL"].fmeasure for one in kept]
    found = search.find(text)
    if max(scores, default=0.0) > limit:
        assert found is not None
        assert found.rouge_l == max(scores)
        assert scores[found.position] == max(scores)
    else:
        assert found is None


@given(st.lists(english, max_size=6), english, limits)
def test_english_decisions_equal_those_of_rouge_score(
    kept: list[str], text: str, limit: float
) -> None:
    check_equal(kept, text, limit, ENGLISH)


@given(st.lists(chinese, max_size=6), chinese, limits)
def test_chinese_decisions_equal_those_of_rouge_score_on_characters(
    kept: list[str], text: str, limit: float
) -> None:
    check_equal(kept, text, limit, CHINESE)


def test_chinese_and_english_in_one_text_are_words_of_both() -> None:
    search = NearDuplicates(0.7)
    search.add("用 Python 写一个排序函数")
    assert search.find("用 python 写一个排序的函数。") is not None
    assert search.find("用 Rust 讲三个冷笑话") is None


def test_measure_at_the_limit_is_no_duplicate() -> None:
    search = NearDuplicates(0.5)
    search.add("one two three four")
    assert search.find("one two five six") is None
    match = search.find("one two three six")
    assert match is not None
    assert match.rouge_l == pytest.approx(0.75)


def test_text_without_words_is_like_no_other() -> None:
    search = NearDuplicates(0.7)
    search.add("...")
    assert search.find("...") is None
