"""Promise: an answer in a text is found where a reader sees one; a doubtful one is missing."""

# ruff: noqa: RUF001  # Chinese punctuation

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.evaluate.tasks.extraction import find_letter, find_text


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" C. 宪法", "C"),
        ("：A", "A"),
        ("答案是 D。因为 A 不对。", "D"),
        ("答案：Ｂ", "B"),
        ("先看 A，再看 C。故选C", "C"),
        ("The answer is (B).", "B"),
        ("Answer: A, not B", "A"),
        ("我认为B正确", "B"),
        ("A dog barks, so the answer is D", "D"),
        ("The answer is B because the sky is blue.", "B"),
        ("Answer: C is right", "C"),
        ("B is correct.", "B"),
        ("A is correct.", "A"),
        ("应该选B，不选A", "B"),
        ("答案不是A，而是B", "B"),
    ],
)
def test_letter_that_a_text_gives_is_found(text: str, letter: str) -> None:
    assert find_letter(text, 4) == "ABCD".index(letter)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "Because",
            "A dog barks",
            "A 或 B",
            "ABCD",
            "不知道",
            "B2 vitamins",
            "A's",
            "E",
            "DNA",
        ),
        *("B or C", "B and C", "Answer: B or C", "The answer is not A", "答案不是A", "I think so"),
    ],
)
def test_letter_that_is_doubtful_is_missing(text: str) -> None:
    assert find_letter(text, 4) is None


@pytest.mark.parametrize(
    ("text", "options", "index"),
    [
        ("no", ("yes", "no"), 1),
        ("No, I do not know yes from no.", ("yes", "no"), 1),
        ("Nothing is known; answer: yes", ("yes", "no"), 0),
        ("I know that it is good", ("good", "bad"), 0),
        ("是的", ("是", "否"), 0),
        ("答案是否", ("可能", "否"), 1),
        ("This risk is not good, it is bad", ("good", "bad"), 1),
        ("不良", ("良", "不良"), 1),
        ("GOOD.", ("good", "bad"), 0),
        ("good or bad: bad", ("good", "bad"), 1),
        ("Yes or no? No.", ("yes", "no"), 1),
        ("Good/bad: bad", ("good", "bad"), 1),
        ("No, no.", ("yes", "no"), 1),
    ],
)
def test_option_that_a_text_gives_is_found(text: str, options: tuple[str, ...], index: int) -> None:
    assert find_text(text, options) == index


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("I do not know", ("yes", "no")),
        ("Nobody noticed another knot", ("yes", "no")),
        ("It is not good", ("good", "bad")),
        ("It isn't good", ("good", "bad")),
        ("不是", ("是", "否")),
        ("是否有风险", ("是", "否")),
        ("It may be good or bad", ("good", "bad")),
        ("", ("yes", "no")),
        ("goodness, badly", ("good", "bad")),
    ],
)
def test_option_that_is_doubtful_is_missing(text: str, options: tuple[str, ...]) -> None:
    assert find_text(text, options) is None


@given(st.text(st.sampled_from("abnoyes "), max_size=30))
def test_option_inside_a_longer_word_never_counts(text: str) -> None:
    words = text.split()
    if "no" not in words and "yes" not in words:
        assert find_text(text, ("yes", "no")) is None


@given(st.text(max_size=40), st.integers(2, 26))
def test_letter_is_one_of_the_options_and_in_the_text(text: str, num_options: int) -> None:
    found = find_letter(text, num_options)
    assert found is None or 0 <= found < num_options
