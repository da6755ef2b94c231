"""Promise: models are compared question by question, and averages say what they weigh."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest

from raytune_llama.evaluate.results import (
    RESULTS_FILE,
    SAMPLES_FILE,
    SUBMISSION_FILE,
    ModelOutcome,
    build_results,
    read_results,
    write_results,
)
from raytune_llama.evaluate.tasks.config import TaskConfig
from raytune_llama.evaluate.tasks.outcome import Metric, Sample, TaskOutcome

CONFIG = TaskConfig(path="data", format="ceval")


def test_difference_to_the_base_has_the_error_of_paired_questions(
    outcomes: Sequence[ModelOutcome],
) -> None:
    base, tuned = build_results(CONFIG, outcomes).models
    assert not any(task.differences for task in base.tasks)
    difference = tuned.tasks[0].differences["acc"]
    paired = [0, 1, 0, 1, 0, 1, -1, 0]
    assert difference.value == pytest.approx(fmean(paired))
    assert difference.stderr == pytest.approx(stdev(paired) / math.sqrt(8))


def test_difference_of_a_metric_that_is_no_mean_of_its_samples_has_no_error(
    outcomes: Sequence[ModelOutcome],
) -> None:
    def with_perplexity(outcome: ModelOutcome, shift: float) -> ModelOutcome:
        task = outcome.tasks[0]
        values = [-3.0 + shift + number / 10 for number in range(len(task.samples))]
        samples = tuple(
            replace(sample, metrics={"perplexity": value})
            for sample, value in zip(task.samples, values, strict=True)
        )
        metrics = {"perplexity": Metric(math.exp(-fmean(values)), 0.4, higher_is_better=False)}
        return replace(outcome, tasks=(replace(task, metrics=metrics, samples=samples),))

    changed = [with_perplexity(one, number / 100) for number, one in enumerate(outcomes)]
    difference = build_results(CONFIG, changed).models[1].tasks[0].differences["perplexity"]
    assert difference.value < 0
    assert difference.stderr is None


def test_averages_weigh_questions_or_subjects(outcomes: Sequence[ModelOutcome]) -> None:
    base, tuned = build_results(CONFIG, outcomes).models
    whole, humanities, other = base.groups
    assert (whole.group, humanities.group, other.group) == (None, "Humanities", "Other")
    assert (whole.num_questions, whole.num_tasks) == (14, 3)
    assert whole.by_questions.value == pytest.approx(6 / 14)
    assert whole.by_subjects.value == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert humanities.by_questions.value == pytest.approx(0.5)
    errors = [task.metrics["acc"].stderr or 0 for task in base.tasks]
    expected = math.sqrt(sum((n * e / 14) ** 2 for n, e in zip((8, 2, 4), errors, strict=True)))
    assert whole.by_questions.stderr == pytest.approx(expected)
    assert whole.difference is None
    change = tuned.groups[0].difference
    assert change is not None
    assert change.value == pytest.approx(9 / 14 - 6 / 14)


def test_results_are_read_back(outcomes: Sequence[ModelOutcome], tmp_path: Path) -> None:
    results = build_results(CONFIG, outcomes)
    written = write_results(results, outcomes, tmp_path)
    assert [file.name for file in written] == [RESULTS_FILE, SAMPLES_FILE]
    assert read_results(tmp_path / RESULTS_FILE) == results
    lines = (tmp_path / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 2 * 14
    assert samples[0]["model"] == "base"
    assert samples[0]["question"] in lines[0], "text is readable, not escaped"
    assert sum(sample["correct"] for sample in samples if sample["model"] == "base") == 6


def test_each_model_has_a_submission_of_its_own(
    outcomes: Sequence[ModelOutcome], tmp_path: Path
) -> None:
    sample = Sample("7", "?", ("a", "b"), (), "B", gold=None, correct=None)
    task = TaskOutcome(
        "ceval/law", "ceval", "law", "Humanities", {}, 1, 0, 0, 0, "likelihood", None, {}, "", 1.0,
        (sample,),
    )  # fmt: skip
    unknown = [ModelOutcome(outcome.model, (task,)) for outcome in outcomes]
    results = build_results(CONFIG, unknown)
    write_results(results, unknown, tmp_path)
    for name in (SUBMISSION_FILE, "submission-base___law.json"):
        assert json.loads((tmp_path / name).read_bytes()) == {"law": {"7": "B"}}
    assert results.models[0].groups == ()
