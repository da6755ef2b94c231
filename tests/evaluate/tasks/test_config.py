"""Promise: settings of a task that contradict each other are refused together, by field."""

from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.evaluate.tasks.config import TaskConfig

FILES = {"path": "data", "format": "ceval"}
CALM = {"path": "data", "format": "calm"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "path: set either path (with format) or task"),
        ({**FILES, "task": "arc_easy"}, "path: set either path (with format) or task"),
        ({"path": "data"}, "format: required with path"),
        ({"task": "arc_easy", "split": "val"}, "split: only for tasks from files"),
        ({"task": "arc_easy", "method": "generation"}, "method: an lm-eval task sets its own"),
        ({"path": "data", "format": "cmmlu", "split": "val"}, "split: got val, wanted test or dev"),
        ({**CALM, "split": "test"}, "split: got test, wanted null"),
        ({**CALM, "subjects": ["law"]}, "subjects: only for formats ceval and cmmlu"),
        ({**CALM, "shots": 2}, "shots_path: set it if and only if shots is above 0"),
        ({**FILES, "shots_path": "x"}, "shots_path: ceval takes examples from its dev split"),
        ({**FILES, "split": "dev", "shots": 1}, "shots: the examples are the dev split"),
        ({**FILES, "shots": 6}, "shots: got 6"),
        ({**FILES, "subjects": ["law", "law"]}, "subjects: a subject is named more than once"),
        ({**FILES, "options": "texts"}, "options: only for format choices"),
        ({**FILES, "positive": "A"}, "positive: only where options are texts"),
        ({**FILES, "prompt": "{options}"}, "prompt: contains no {question}"),
        ({**FILES, "prompt": "{question}"}, "prompt: contains no {options}"),
        ({**CALM, "prompt": "{question}{options}"}, "prompt: contains {options}, but no letter"),
        ({**FILES, "answer_forms": ["{}", "A"]}, "answer_forms: got ['{}', 'A']"),
        (
            {**FILES, "answer_forms": ["{}"], "method": "generation"},
            "answer_forms: only for method likelihood",
        ),
        ({**FILES, "include": "x"}, "include: only for task"),
        ({**FILES, "ignore_fields": ["x"]}, "ignore_fields: only for formats calm and choices"),
    ],
)
def test_contradiction_is_refused_by_field(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(TaskConfig, fields)
    assert any(line.startswith(problem) for line in error.value.problems), error.value.problems


def test_contradictions_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(TaskConfig, {**CALM, "split": "val", "shots": 1, "options": "texts"})
    assert len(error.value.problems) == 3
