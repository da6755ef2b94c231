"""What is cut can still be learned from: answers end, questions are whole, lengths hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.chat.config import Truncation
from raytune_llama.chat.truncation import truncate

BOS, EOS = 1, 2


def row(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets: `b` is BOS, `e` a trained end, `q` a question's token, `a` an answer's."""
    ids = {"b": BOS, "e": EOS, "q": 10, "a": 20}
    return (
        np.array([ids[letter] for letter in text], dtype=np.uint32),
        np.array([letter in "ae" for letter in text]),
    )


def cut(text: str, max_tokens: int, truncation: Truncation) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets of what is kept."""
    ids, targets = row(text)
    kept = truncate(targets, max_tokens, truncation, begins_with_bos=text[0] == "b")
    return ids[kept], targets[kept]


@pytest.mark.parametrize(
    ("text", "max_tokens", "truncation", "wanted"),
    [
        ("bqqaaae", 6, "keep_eos", "bqqaae"),
        ("bqqaaae", 5, "keep_eos", "bqqae"),
        ("bqqaaae", 4, "keep_eos", ""),  # no token of the answer before its end
        ("bqaeqqae", 4, "keep_eos", "bqae"),
        ("bqaeqqae", 6, "keep_eos", "bqae"),  # a question without answer goes
        ("bqaeqqae", 7, "keep_eos", "bqae"),
        ("bqaeqqaae", 8, "keep_eos", "bqaeqqae"),
        ("bqqaaae", 6, "drop", ""),
        ("bqqaaae", 5, "cut_left", "baaae"),
        ("qqqaaae", 5, "cut_left", "qaaae"),
        ("bqqaaae", 2, "cut_left", ""),
        ("bqaeqae", 4, "cut_left", "bqae"),
    ],
)
def test_policy_keeps_what_it_says(
    text: str, max_tokens: int, truncation: Truncation, wanted: str
) -> None:
    ids, targets = cut(text, max_tokens, truncation)
    wanted_ids, wanted_targets = row(wanted)
    assert ids.tolist() == wanted_ids.tolist()
    assert targets.tolist() == wanted_targets.tolist()
    assert len(ids) <= max_tokens


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(2, 30),
)
def test_kept_eos_ends_what_is_left_and_nothing_else_changes(
    exchanges: list[tuple[int, int]], max_tokens: int
) -> None:
    text = "b" + "".join("q" * users + "a" * answers + "e" for users, answers in exchanges)
    if len(text) <= max_tokens:
        return
    whole, _ = row(text)
    ids, targets = cut(text, max_tokens, "keep_eos")
    assert len(ids) <= max_tokens
    if len(ids):
        assert (ids[-1], bool(targets[-1]), bool(targets[-2])) == (EOS, True, True)
        assert ids[:-1].tolist() == whole[: len(ids) - 1].tolist()
        # As much is left as can be: one token more would be too many, or a question.
        rest = text[len(ids) : max_tokens]
        assert "a" not in rest[:-1] or rest.startswith("q")
    else:
        assert "a" not in text[: max_tokens - 1]
