"""Scores of a classification: F1, precision, recall and Matthews' correlation coefficient.

All of them depend on the confusion matrix alone. Their standard errors are bootstrapped from it,
with a fixed seed: resampling questions is drawing matrices from a multinomial distribution.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raytune_llama.evaluate.tasks.outcome import Metric, Sample

BOOTSTRAP_DRAWS = 1000
"""Number of resampled confusion matrices."""
_SEED = 0

Counts = NDArray[np.float64]


def score_classes(samples: Sequence[Sample], positive: str | None = None) -> dict[str, Metric]:
    """Return `f1` (macro average over the classes of the right answers) and `mcc`.

    A missing answer is a class of its own that is never right, so it lowers both. Answers are
    compared without case.

    Args:
        samples: Samples with right answers.
        positive: Class whose `f1_positive`, `precision` and `recall` are returned too.
    """
    golds = [(sample.gold or "").casefold() for sample in samples]
    answers = [(sample.answer or "").casefold() for sample in samples]
    classes = sorted(set(golds))
    # The last row and column: answers that no question has as its right one, and missing ones.
    position = {name: index for index, name in enumerate(classes)}
    counts = np.zeros((len(classes) + 1, len(classes) + 1))
    for gold, answer in zip(golds, answers, strict=True):
        counts[position[gold], position.get(answer, len(classes))] += 1
    resampled = _resample(counts)
    scores = {"f1": _macro_f1, "mcc": _matthews}
    metrics = {
        name: Metric(float(score(counts)), float(np.std(score(resampled), ddof=1)))
        for name, score in scores.items()
    }
    if positive is not None and (index := position.get(positive.casefold())) is not None:
        for name, score in {"f1_positive": _f1, "precision": _precision, "recall": _recall}.items():
            value, draws = score(counts)[index], score(resampled)[..., index]
            metrics[name] = Metric(float(value), float(np.std(draws, ddof=1)))
    return metrics


def _resample(counts: Counts) -> Counts:
    total = int(counts.sum())
    draws = np.random.default_rng(_SEED).multinomial(
        total, counts.ravel() / total, size=BOOTSTRAP_DRAWS
    )
    return draws.reshape(BOOTSTRAP_DRAWS, *counts.shape).astype(np.float64)


def _divide(above: Counts, below: Counts) -> Counts:
    """Divide; 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _diagonal(counts: Counts) -> Counts:
    return np.diagonal(counts, axis1=-2, axis2=-1)


def _precision(counts: Counts) -> Counts:
    return _divide(_diagonal(counts), counts.sum(-2))


def _recall(counts: Counts) -> Counts:
    return _divide(_diagonal(counts), counts.sum(-1))


def _f1(counts: Counts) -> Counts:
    return _divide(2 * _diagonal(counts), counts.sum(-1) + counts.sum(-2))


def _macro_f1(counts: Counts) -> Counts:
    """Mean of F1 over the classes that questions have; the last class is no right answer."""
    return _f1(counts)[..., :-1].mean(-1)


def _matthews(counts: Counts) -> Counts:
    """Matthews' correlation coefficient for several classes; 0 if it is undefined."""
    total, right = counts.sum((-2, -1)), _diagonal(counts).sum(-1)
    golds, answers = counts.sum(-1), counts.sum(-2)
    above = right * total - (golds * answers).sum(-1)
    spread = (total**2 - (answers**2).sum(-1)) * (total**2 - (golds**2).sum(-1))
    return _divide(above, np.sqrt(spread))
