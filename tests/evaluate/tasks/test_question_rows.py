"""Promise: CALM's rows and plain multiple choice are read as they are, or refused by row."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.evaluate.tasks.question_rows import read_question_rows
from tests.evaluate.tasks.conftest import task_config

CALM = {"id": "1", "query": "Good or bad? Answer:", "choices": ["good", "bad"], "gold": 1}
CHOICES = {"question": "Which is a fruit?", "choices": ["stone", "apple", "iron"], "answer": 1}


def read(row: Any, task_format: str, **fields: Any) -> tuple[Any, list[str]]:  # noqa: ANN401
    config = task_config(Path("x"), task_format, **fields)
    return read_question_rows(json.dumps(row).encode(), config)


@pytest.mark.parametrize("answer", [1, "B", "b", "apple", " Apple "])
def test_right_answer_is_an_index_a_letter_or_a_text(answer: int | str) -> None:
    (question,), problems = read({**CHOICES, "answer": answer}, "choices")
    assert not problems
    assert (question.gold, question.id) == (1, "0")


def test_right_answer_that_is_the_text_of_an_option_is_no_letter() -> None:
    (question,), _ = read({"question": "?", "choices": ["B", "A"], "answer": "A"}, "choices")
    assert question.gold == 1


def test_calm_row_is_read_and_its_text_is_not_shown() -> None:
    (question,), problems = read({**CALM, "answer": "bad", "text": "Good or bad?"}, "calm")
    assert not problems
    assert (question.text, question.gold) == ("Good or bad? Answer:", 1)


def test_array_of_objects_is_read_as_lines_are() -> None:
    config = task_config(Path("x"), "choices")
    array = json.dumps([CHOICES, CHOICES], indent=2).encode()
    lines = f"{json.dumps(CHOICES)}\n\n{json.dumps(CHOICES)}\n".encode()
    assert read_question_rows(array, config) == read_question_rows(lines, config)


@pytest.mark.parametrize(
    ("row", "task_format", "problem"),
    [
        ({**CALM, "gold": 2}, "calm", "gold: got 2, which is no index"),
        ({**CALM, "answer": "good"}, "calm", "are different choices"),
        ({**CALM, "gold": None}, "calm", "no field gold or answer"),
        ({**CALM, "label": "x"}, "calm", "unknown field 'label'"),
        ({**CALM, "query": " "}, "calm", "query: got ' ', wanted a text"),
        ({**CHOICES, "choices": ["one"]}, "choices", "choices: got 1, wanted 2 to 26"),
        ({**CHOICES, "choices": ["a", "A"]}, "choices", "of which two are equal"),
        ({**CHOICES, "choices": "a,b"}, "choices", "wanted a list of texts"),
        ({**CHOICES, "answer": "pear"}, "choices", "answer: got 'pear'"),
        ({**CHOICES, "answer": True}, "choices", "answer: got True"),
        ({**CHOICES, "id": 1.5}, "choices", "id: got 1.5"),
        (["a"], "choices", "row 1: got a string, wanted an object"),
        ([], "choices", "no questions"),
        ([{**CHOICES, "id": 1}, {**CHOICES, "id": "1"}], "choices", "id '1' occurs more than once"),
    ],
)
def test_bad_row_is_named(row: Any, task_format: str, problem: str) -> None:  # noqa: ANN401
    _, problems = read(row, task_format)
    assert any(problem in one for one in problems), problems


def test_field_that_is_repeated_in_a_row_is_refused() -> None:
    line = '{"question": "?", "choices": ["a", "b"], "answer": 0, "answer": 1}'
    _, (problem,) = read_question_rows(line.encode(), task_config(Path("x"), "choices"))
    assert problem == "line 1: field 'answer' occurs more than once"


def test_ignored_field_is_accepted() -> None:
    _, problems = read({**CALM, "label": "x"}, "calm", ignore_fields=["label"])
    assert not problems
