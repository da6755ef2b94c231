"""Promise: F1 and MCC are scikit-learn's, with missing answers counted as wrong."""

from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef, precision_score, recall_score

from raytune_llama.evaluate.tasks.outcome import Sample
from raytune_llama.evaluate.tasks.scores import score_classes


def make_samples(pairs: list[tuple[str, str | None]]) -> list[Sample]:
    return [
        Sample(str(number), "", (), (), answer, gold, answer == gold)
        for number, (gold, answer) in enumerate(pairs)
    ]


PAIRS = st.lists(
    st.tuples(st.sampled_from(["good", "bad"]), st.sampled_from(["good", "bad", None])),
    min_size=2,
    max_size=30,
)


@given(PAIRS)
def test_scores_equal_scikit_learn(pairs: list[tuple[str, str | None]]) -> None:
    golds = [gold for gold, _ in pairs]
    answers = [answer or "missing" for _, answer in pairs]
    hypothesis.assume(len({*golds, *answers}) > 1)  # scikit-learn warns of a single class
    scores = score_classes(make_samples(pairs), positive="bad")
    zero: Any = 0
    labels = sorted(set(golds))
    expected = f1_score(golds, answers, labels=labels, average="macro", zero_division=zero)
    assert scores["f1"].value == pytest.approx(expected)
    assert scores["mcc"].value == pytest.approx(matthews_corrcoef(golds, answers))
    if "bad" in golds:
        one = {"labels": ["bad"], "average": "macro", "zero_division": zero}
        assert scores["precision"].value == pytest.approx(precision_score(golds, answers, **one))
        assert scores["recall"].value == pytest.approx(recall_score(golds, answers, **one))


def test_scores_missing_answer_lowers_f1() -> None:
    right = [("good", "good"), ("bad", "bad")] * 10
    missing: list[tuple[str, str | None]] = [*right, ("good", None), ("bad", None)]
    assert score_classes(make_samples([*right]))["f1"].value == 1
    assert score_classes(make_samples(missing))["f1"].value == pytest.approx(20 / 21)


def test_stderr_equals_resampled_questions() -> None:
    generator = np.random.default_rng(1)
    golds = generator.choice(["a", "b"], 200)
    answers = np.where(generator.random(200) < 0.8, golds, "a")
    pairs = [(str(gold), str(answer)) for gold, answer in zip(golds, answers, strict=True)]
    found = score_classes(make_samples([*pairs]))["f1"].stderr
    draws = [generator.integers(0, 200, 200) for _ in range(1000)]
    values = [f1_score(golds[draw], answers[draw], average="macro") for draw in draws]
    assert found == pytest.approx(np.std(values, ddof=1), rel=0.1)
