"""Rows of four formats become conversations and back; dirty ones are told by reason or counted."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.chat.config import FormatName
from raytune_llama.chat.conversations import Conversation, Defect
from raytune_llama.chat.formats import KeyCounts, detect_row_format, read_row, write_row
from raytune_llama.storage.files import KEY_DECODER
from tests.chat.conftest import ANSWERS, CONTENTS, CONVERSATIONS, talk

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(row: dict[str, Any], row_format: FormatName | None = None) -> Conversation | Defect:
    found = row_format or detect_row_format(row)
    assert found is not None
    return read_row(row, found, KeyCounts())


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, talk("q", "a")),
        ({"instruction": "q", "input": None, "output": "a"}, talk("q", "a")),
        ({"instruction": "q", "input": "x", "output": "a"}, talk("q\nx", "a")),
        ({"instruction": "q", "output": "a", "system": "s"}, talk("q", "a", system="s")),
        ({"指令": "q", "输入": "x", "输出": "a"}, talk("q\nx", "a")),
        ({"指示": "q", "news article": "x", "output": "a"}, talk("q\nx", "a")),
        ({"instruction : ": "q", "Input": "x", "output": "a"}, talk("q\nx", "a")),
        (
            {"instruction": "q", "指令": "q", "输入": "", "input": "x", "output": "a"},
            talk("q\nx", "a"),
        ),
        ({"conversations": TURNS}, talk("q", "a")),
        ({"conversations": [{"from": "system", "value": "s"}, *TURNS]}, talk("q", "a", system="s")),
        ({"conversations": TURNS, "system": ""}, talk("q", "a")),
        ({"messages": MESSAGES}, talk("q", "a")),
        ({"messages": MESSAGES, "prompt": "q", "system": "s"}, talk("q", "a", system="s")),
        ({"messages": [{"role": "user", "message": "q"}, MESSAGES[1]]}, talk("q", "a")),
        ({"prompt": "q", "completion": "a"}, talk("q", "a")),
        ({"question": "q", "response": "a"}, talk("q", "a")),
        ({"query": " q ", "answer": "a\n"}, talk(" q ", "a\n")),
    ],
)
def test_row_is_sniffed_and_read(row: dict[str, Any], wanted: Conversation) -> None:
    assert read(row) == wanted


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q"}, "missing_field"),
        ({"instruction": "q", "output": None}, "wrong_type"),
        ({"instruction": ["q"], "output": "a"}, "wrong_type"),
        ({"instruction": "q", "output": ""}, "empty_target"),
        ({"instruction": "q", "指令": "other", "output": "a"}, "ambiguous_field"),
        ({"instruction": "q", "output": "a", "id": ["x"]}, "wrong_type"),
        ({"conversations": "q"}, "wrong_type"),
        ({"conversations": []}, "empty_conversation"),
        ({"conversations": ["q", "a"]}, "wrong_type"),
        ({"conversations": [{"from": "human"}]}, "missing_field"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown_role"),
        ({"conversations": [*TURNS, {"from": "system", "value": "s"}]}, "late_system"),
        (
            {"conversations": [{"from": "system", "value": "s"}, *TURNS], "system": "t"},
            "ambiguous_field",
        ),
        ({"conversations": TURNS[::-1]}, "assistant_first"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": None}]}, "wrong_type"),
        ({"messages": [*MESSAGES, MESSAGES[0]]}, "last_not_assistant"),
        ({"prompt": "q\0", "completion": "a"}, "nul"),
        ({"prompt": "q", "completion": "\udc00"}, "lone_surrogate"),
    ],
)
def test_bad_row_is_told_by_reason(row: dict[str, Any], reason: str) -> None:
    defect = read(row)
    assert isinstance(defect, Defect)
    assert defect.reason == reason


@pytest.mark.parametrize(
    "row", [{}, {"text": "a"}, {"prompt": "q"}, {"chosen": "a", "output": "b"}]
)
def test_row_of_no_format_is_not_sniffed(row: dict[str, Any]) -> None:
    assert detect_row_format(row) is None


def test_input_separator_is_between_instruction_and_input_only() -> None:
    row = {"instruction": "A", "input": "B", "output": "C"}
    assert read_row(row, "alpaca", KeyCounts(), input_separator="") == talk("AB", "C")


@pytest.mark.parametrize(("given_id", "wanted"), [("x", "x"), (7, "7"), ("", None), (None, None)])
def test_id_is_kept_as_text(given_id: object, wanted: str | None) -> None:
    conversation = read({"id": given_id, "prompt": "q", "completion": "a"})
    assert isinstance(conversation, Conversation)
    assert conversation.id == wanted


def test_names_are_counted_when_aliased_ignored_or_repeated() -> None:
    counts = KeyCounts()
    text = '{"指令": "q", "output": "a", "note": "n", "note": "m", "history": []}'
    read_row(KEY_DECODER.decode(text), "alpaca", counts)
    turn = {"from": "human", "text": "q", "weight": 1}
    read_row({"conversations": [turn, TURNS[1]]}, "conversations", counts)
    assert counts.aliased == {"指令": 1, "text": 1}
    assert counts.ignored == {"note": 1, "history": 1, "weight": 1}
    assert counts.repeated == {"note": 1}


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "q", "prompt": "r", "completion": "a"}',
        '{"messages": [{"role": "user", "content": "q", "content": "r"}]}',
        '{"conversations": [], "conversations": []}',
    ],
)
def test_field_that_stands_twice_is_refused(text: str) -> None:
    row = KEY_DECODER.decode(text)
    defect = read(row)
    assert isinstance(defect, Defect)
    assert defect.reason == "duplicate_key"


@given(CONVERSATIONS, st.none() | ANSWERS, st.sampled_from(["conversations", "messages"]))
def test_conversation_survives_formats_with_turns(
    conversation: Conversation, system: str | None, row_format: FormatName
) -> None:
    written = Conversation(conversation.turns, system, "n-1")
    row = write_row(written, row_format)
    assert isinstance(row, dict)
    assert detect_row_format(row) == row_format
    assert read(json.loads(json.dumps(row))) == written


@given(CONTENTS, ANSWERS, st.sampled_from(["alpaca", "completion"]))
def test_exchange_survives_flat_formats(user: str, answer: str, row_format: FormatName) -> None:
    written = talk(user, answer, system="s")
    row = write_row(written, row_format)
    assert isinstance(row, dict)
    assert read(row) == written


@pytest.mark.parametrize("row_format", ["alpaca", "completion"])
def test_long_conversation_is_refused_by_flat_formats(row_format: FormatName) -> None:
    defect = write_row(talk("q", "a", "r", "b"), row_format)
    assert isinstance(defect, Defect)
    assert defect.reason == "not_representable"


def test_written_row_is_as_calm_writes_it() -> None:
    row = write_row(Conversation(talk("问", "答").turns, id="calm-1"), "conversations")
    assert json.dumps(row, ensure_ascii=False) == (
        '{"id": "calm-1", "conversations": [{"from": "human", "value": "问"}, '
        '{"from": "assistant", "value": "答"}]}'
    )
