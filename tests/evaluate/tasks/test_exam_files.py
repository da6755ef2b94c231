"""Promise: files of C-Eval and CMMLU are read as published; what is wrong is said by line."""

# ruff: noqa: RUF001  # Chinese punctuation

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.evaluate.tasks.exam_files import read_exam_file
from tests.evaluate.tasks.conftest import LAW, exam_text


def test_ceval_file_yields_questions_with_ids_and_answers() -> None:
    questions, problems = read_exam_file(exam_text(LAW).encode("utf-8-sig"))
    assert not problems
    assert [question.id for question in questions] == ["0", "1", "2", "3"]
    assert questions[0].text == "中国的根本法是哪一部？"
    assert questions[0].options == ("民法典", "宪法", "刑法", "行政诉讼法")
    assert [question.gold for question in questions] == [1, 2, 0, 3]


def test_cmmlu_file_has_an_unnamed_index_and_capital_names() -> None:
    text = ",Question,A,B,C,D,Answer\n7,羊胴体中，肉质较好的是,胸下肉,肩胛肉,后腿肉,小腿肉,C\n"
    (question,), problems = read_exam_file(text.encode())
    assert not problems
    assert (question.id, question.gold) == ("7", 2)


def test_ceval_dev_file_has_explanations_that_are_not_shown() -> None:
    text = "id,question,A,B,C,D,answer,explanation\n0,q,1,2,3,4,A,因为\n"
    (question,), problems = read_exam_file(text.encode())
    assert not problems
    assert "因为" not in repr(question)


def test_test_file_without_answers_has_no_right_options() -> None:
    questions, problems = read_exam_file(exam_text(LAW, answers=False).encode())
    assert not problems
    assert {question.gold for question in questions} == {None}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty"),
        ("id,question,A,B,C,D,answer\n", "no questions"),
        ("id,question,A,B,C,answer\n0,q,1,2,3,A\n", "no column D"),
        ("id,question,A,B,C,D,answer,hint\n", "unknown column hint"),
        ("id,question,A,B,C,D,answer\n0,q,1,2,3,4\n", "line 2: 6 columns, the header has 7"),
        ("id,question,A,B,C,D,answer\n0,q,1,2,3,4,\n", "line 2: answer is '', wanted A, B, C or D"),
        ("id,question,A,B,C,D,answer\n0,,1,2,3,4,A\n", "line 2: the question is empty"),
        ("id,question,A,B,C,D\n0,q,1,2,3,4\n0,r,1,2,3,4\n", "id '0' occurs more than once"),
        ('id,question,A,B,C,D\n0,"q"x,1,2,3,4\n', "line 2: invalid CSV"),
    ],
)
def test_bad_file_is_named(text: str, problem: str) -> None:
    _, problems = read_exam_file(text.encode())
    assert any(problem in one for one in problems), problems


def test_gbk_file_is_refused_with_the_command_that_converts_it() -> None:
    _, (problem,) = read_exam_file(exam_text(LAW).encode("gbk"))
    assert "iconv -f gb18030 -t utf-8" in problem


def test_many_problems_are_counted_not_listed() -> None:
    rows = "".join(f"{number},,1,2,3,4,A\n" for number in range(20))
    _, problems = read_exam_file(f"id,question,A,B,C,D,answer\n{rows}".encode())
    assert problems[-1] == "and 15 more"


CELLS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text and "\r" not in text and "\0" not in text
)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS, CELLS, st.sampled_from("ABCD")), min_size=1))
def test_any_csv_text_is_read_back(rows: list[tuple[str, ...]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("question", "A", "B", "C", "D", "answer"), *rows])
    questions, problems = read_exam_file(buffer.getvalue().encode())
    assert not problems
    assert [(one.text, *one.options, "ABCD"[one.gold or 0]) for one in questions] == rows
