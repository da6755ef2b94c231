"""Rows are found in whatever a model makes of the JSON that it was asked for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.generate.make_data.config import FilterConfig, PromptConfig
from raytune_llama.generate.make_data.prompt import Prompt, build_prompt, load_texts
from raytune_llama.generate.make_data.replies import (
    ParsedReply,
    Rejection,
    Row,
    check_item,
    parse_items,
)

A = {"instruction": "写诗", "input": "", "output": "春眠 [1] {x}"}
B = {"instruction": 'say "hi"', "input": "a\nb", "output": '```py\nx = [{"a": "b"}, [1]]\n```'}
LIST = json.dumps([A, B], ensure_ascii=False)
PROMPT = Prompt(1, "text", 100, 200, ("只编写仅凭文字就能完成的任务",))


def parsed(text: str) -> ParsedReply:
    found = parse_items(text)
    assert isinstance(found, ParsedReply)
    return found


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (LIST, "json"),
        ("\ufeff \n" + LIST, "json"),
        (json.dumps({"data": [A, B]}), "json"),
        (f"```json\n{LIST}\n```", "extracted"),
        (f"好的，以下是数据：\n\n{LIST}\n\n希望有帮助！", "extracted"),  # noqa: RUF001
        (f"Sure [see below]:\n```\n{LIST}\n```", "extracted"),
        (f"{json.dumps(A)}\n{json.dumps(B)}\n", "extracted"),
        (f"Here: {json.dumps({'data': [A, B]})} Bye.", "extracted"),
        (f"<think>maybe [{{}}]?</think>\n{LIST}", "json"),
        (f"1. {json.dumps(A)}\n2. {json.dumps(B)}", "extracted"),
        (f"{json.dumps(A)}\nNext one:\n{json.dumps(B)}", "extracted"),
        (f"```json\n{json.dumps(A)}\n```\n```json\n{json.dumps(B)}\n```", "extracted"),
        (f"```json\n[{json.dumps(A)}]\n```\n```json\n[{json.dumps(B)}]\n```", "extracted"),
        (LIST[:-1], "extracted"),
        (LIST[:-1] + ",", "extracted"),
        (LIST[:-1] + ",]", "extracted"),
        (LIST.replace("a\\nb", "a\nb"), "extracted"),
    ],
)
def test_complete_items_are_found(text: str, form: str) -> None:
    found = parsed(text)
    assert found.items == [A, B]
    assert (found.form, found.cut_off) == (form, None)


@pytest.mark.parametrize(
    "text",
    [
        '[{"instruction": "q", "input": "", "output": "a",}]',
        "[{'instruction': 'q', 'input': '', 'output': 'a'}]",
        '[{instruction: "q", "input": "", "output": "a"}]',
        '[{"instruction": "q" "input": "", "output": "a"}]\nDone.',
    ],
)
def test_invalid_json_is_repaired(text: str) -> None:
    found = parsed(text)
    assert found.items == [{"instruction": "q", "input": "", "output": "a"}]
    assert found.form == "repaired"


@pytest.mark.parametrize("length", range(1, 40))
def test_part_of_an_invalid_item_is_never_kept(length: int) -> None:
    bad = """{'instruction': "q [1] {x}]", 'output': "a"}]"""
    found = parse_items("[" + json.dumps(A) + ", " + bad[:length])
    assert isinstance(found, ParsedReply)
    assert found.items == [A]


def test_item_whose_repair_would_lose_text_is_rejected() -> None:
    lost = '{"instruction": "q", "output": "one" two "three", "four"}'
    found = parsed(f"[{lost}, {json.dumps(A)}]")
    assert found.items == [lost + ", ", A]
    rejection = check_item(found.items[0], PROMPT, FilterConfig())
    assert isinstance(rejection, Rejection)
    assert rejection.reason == "invalid_json"


def test_valid_items_after_an_invalid_one_are_kept() -> None:
    bad = '{"instruction": "q", "output": "a",}'
    found = parsed(f"[{json.dumps(A)}, {bad}, {json.dumps(B)}]")
    assert found.items == [A, {"instruction": "q", "output": "a"}, B]


@given(st.integers(0, len(LIST) - 1))
def test_no_part_of_an_item_is_ever_kept(length: int) -> None:
    found = parse_items(LIST[:length])
    items = found.items if isinstance(found, ParsedReply) else []
    assert items == [A, B][: len(items)]
    assert len(items) == sum(length >= end for end in (_end_of(A), len(LIST) - 1))


def _end_of(row: dict[str, str]) -> int:
    return 1 + len(json.dumps(row, ensure_ascii=False))


def test_item_that_is_cut_off_is_returned_apart() -> None:
    found = parsed(LIST[:-5])
    assert found.items == [A]
    assert found.cut_off is not None
    assert found.cut_off == LIST[LIST.index('{"instruction": "say') : -5]


def test_cut_off_fenced_reply_keeps_complete_items() -> None:
    found = parsed("```json\n" + LIST[:-5])
    assert found.items == [A]


@pytest.mark.parametrize(
    "text", ["", "I can't do that.", "42", '"text"', "1. Instruction: write", "[[[[" * 5000]
)
def test_reply_without_an_object_is_rejected(text: str) -> None:
    found = parse_items(text)
    assert isinstance(found, Rejection)
    assert found.reason == "not_json"


@pytest.mark.parametrize("text", ["[]", "```json\n[]\n```", "[ ] sorry"])
def test_empty_list_is_rejected_by_that_name(text: str) -> None:
    found = parse_items(text)
    assert isinstance(found, Rejection)
    assert found.reason == "empty_list"


@given(st.text(max_size=60) | st.text("[]{}\",:'ab\\ `\n", max_size=60))
def test_no_text_is_too_strange(text: str) -> None:
    found = parse_items(text)
    items = found.items if isinstance(found, ParsedReply) else []
    for item in items:
        row = check_item(item, PROMPT, FilterConfig())
        assert isinstance(row, Row | Rejection)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "not_an_object"),
        (3, "not_an_object"),
        ({}, "missing_field"),
        ({"instruction": "q"}, "missing_field"),
        ({"instruction": "q", "output": ["a"]}, "wrong_type"),
        ({"instruction": "q", "output": None}, "wrong_type"),
        ({"instruction": "q", "output": "a", "input": 3}, "wrong_type"),
        ({"instruction": "……", "output": "……"}, "empty_instruction"),
        ({"instruction": "q", "output": " \n"}, "empty_output"),
        ({"instruction": "q" * 501, "output": "a"}, "instruction_too_long"),
        ({"instruction": "q", "output": "a", "input": "x" * 151}, "input_too_long"),
        ({"instruction": "q", "output": "a" * 301}, "output_too_long"),
        ({"instruction": "只编写仅凭文字就能完成的任务", "output": "a"}, "copied_prompt"),
    ],
)
def test_item_that_is_no_row_is_rejected_with_the_reason(item: object, reason: str) -> None:
    found = check_item(item, PROMPT, FilterConfig())
    assert isinstance(found, Rejection)
    assert found.reason == reason


def test_item_with_invalid_unicode_is_rejected() -> None:
    (item,) = parsed('[{"instruction": "q", "output": "\\ud800"}]').items
    assert isinstance(check_item(item, PROMPT, FilterConfig()), Rejection)


def test_item_with_a_repeated_field_is_rejected() -> None:
    (item,) = parsed('[{"instruction": "q", "output": "a", "output": "b"}]').items
    found = check_item(item, PROMPT, FilterConfig())
    assert isinstance(found, Rejection)
    assert found.reason == "repeated_field"


@pytest.mark.parametrize("extra", [{}, {"input": None}, {"input": " "}])
def test_input_may_be_missing(extra: dict[str, str | None]) -> None:
    row = check_item({"instruction": " q ", "output": "a", **extra}, PROMPT, FilterConfig())
    assert row == Row("q", "", "a")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_each_requirement_of_the_real_prompt_is_recognized_as_copied(language: str) -> None:
    config = PromptConfig(language="zh" if language == "zh" else "en")
    prompt = build_prompt(config, load_texts(config), 1)
    requirements = [line for line in prompt.text.splitlines() if line[:1].isdigit()]
    assert len(requirements) == 6
    for line in requirements:
        found = check_item({"instruction": line[:490], "output": "a"}, prompt, FilterConfig())
        assert isinstance(found, Rejection)
        assert found.reason == "copied_prompt", line
