"""Rows of four formats become conversations and back; dirty ones are told by reason or counted."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.chat.config import FieldName, FormatName, RepairConfig
from raytune_llama.chat.conversations import Conversation, Defect
from raytune_llama.chat.formats import (
    PromptRow,
    RowFormat,
    describe_columns,
    detect_prompt_format,
    detect_row_format,
    read_prompt,
    read_row,
    write_row,
)
from raytune_llama.chat.row_fields import KeyCounts
from raytune_llama.storage.files import KEY_DECODER
from tests.chat.conftest import ANSWERS, CONTENTS, CONVERSATIONS, talk

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(row: dict[str, Any], **options: Any) -> Conversation | Defect:  # noqa: ANN401
    found = detect_row_format(row, options.get("columns"))
    assert found is not None
    return read_row(row, RowFormat(found, **options), KeyCounts())


def exchange(answer: dict[str, Any], **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """A row of a question and an answer with some fields."""
    return {"messages": [MESSAGES[0], MESSAGES[1] | answer], **fields}


def masks_of(row: dict[str, Any], **options: Any) -> list[bool]:  # noqa: ANN401
    conversation = read(row, **options)
    assert isinstance(conversation, Conversation), conversation
    return [turn.is_trained for turn in conversation.turns if turn.role == "assistant"]


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
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown_role"),
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
    "row", [{}, {"text": "a"}, {"prompt": "q"}, {"chosen": "a", "rejected": "b"}]
)
def test_row_of_no_format_is_not_sniffed(row: dict[str, Any]) -> None:
    assert detect_row_format(row) is None


def test_input_separator_is_between_instruction_and_input_only() -> None:
    row = {"instruction": "A", "input": "B", "output": "C"}
    assert read(row, input_separator="") == talk("AB", "C")


@pytest.mark.parametrize(("given_id", "wanted"), [("x", "x"), (7, "7"), ("", None), (None, None)])
def test_id_is_kept_as_text(given_id: object, wanted: str | None) -> None:
    conversation = read({"id": given_id, "prompt": "q", "completion": "a"})
    assert isinstance(conversation, Conversation)
    assert conversation.id == wanted


def test_names_are_counted_when_aliased_ignored_or_repeated() -> None:
    counts = KeyCounts()
    text = '{"指令": "q", "output": "a", "note": "n", "note": "m", "history": []}'
    read_row(KEY_DECODER.decode(text), RowFormat("alpaca"), counts)
    turn = {"from": "human", "text": "q", "timestamp": 1}
    read_row({"conversations": [turn, TURNS[1]]}, RowFormat("conversations"), counts)
    assert counts.aliased == {"指令": 1, "text": 1}
    assert counts.ignored == {"note": 1, "timestamp": 1}
    assert counts.repeated == {"note": 1}
    assert not counts.unknown


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


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"问题": "q", "回答": "a"}, talk("q", "a")),
        ({"input": "q", "output": "a"}, talk("q", "a")),
        ({"question": "q", "context": "x", "answer": "a"}, talk("q\nx", "a")),
        ({"instruction": "q", "output": "a", "system_prompt": "s"}, talk("q", "a", system="s")),
        ({"instruction": "q", "output": "a", "history": [["r", "b"]]}, talk("r", "b", "q", "a")),
        ({"instruction": "q", "output": "a", "history": MESSAGES}, talk("q", "a", "q", "a")),
        (exchange({"content": [{"type": "text", "text": "a"}] * 2}), talk("q", "aa")),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, talk("q", "a")),
        ({"prompt": MESSAGES[:1], "completion": "a"}, talk("q", "a")),
        # What repeats the texts that are used says nothing new.
        (
            {"instruction": "q", "input": "x", "output": "a", "text": "In: q\nx! Out: a"},
            talk("q\nx", "a"),
        ),
        ({"messages": MESSAGES, "prompt": "q"}, talk("q", "a")),
        # Nor does what is empty.
        ({"instruction": "q", "output": "a", "history": [], "weight": None}, talk("q", "a")),
    ],
)
def test_row_with_fields_of_meaning_is_read_whole(
    row: dict[str, Any], wanted: Conversation
) -> None:
    assert read(row) == wanted


@pytest.mark.parametrize("name", ["weight", "train", "loss"])
@pytest.mark.parametrize(
    ("value", "is_trained"), [(0, False), (False, False), (1, True), (0.0, False)]
)
def test_turn_that_is_marked_is_trained_or_not(
    name: str, value: object, *, is_trained: bool
) -> None:
    assert masks_of(exchange({name: value})) == [is_trained]


def test_answers_inside_a_prompt_of_messages_are_not_trained() -> None:
    row = {"prompt": [*MESSAGES, MESSAGES[0]], "completion": [MESSAGES[1]]}
    assert masks_of(row) == [False, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (exchange({"weight": 0.5}), "unsupported_value"),
        (exchange({"weight": 0, "train": True}), "ambiguous_field"),
        ({"messages": [MESSAGES[0] | {"train": True}, MESSAGES[1]]}, "unsupported_value"),
        ({"messages": [MESSAGES[0] | {"reasoning_content": "hm"}, MESSAGES[1]]}, "unknown_field"),
        (exchange({"content": [{"type": "image_url", "image_url": {}}]}), "wrong_type"),
        ({"instruction": "q", "output": "a", "history": ["r"]}, "wrong_type"),
        ({"instruction": "q", "output": "a", "tools": "{"}, "invalid_tools"),
        (exchange({"tool_calls": [{"function": {}}]}), "invalid_tools"),
        (exchange({"tool_calls": [{"name": "f", "arguments": '{"a'}]}), "invalid_tools"),
        (exchange({"tool_calls": [{"name": "f", "arguments": ""}]}), "invalid_tools"),
        (
            {"prompt": MESSAGES[:1], "completion": [{"role": "system", "content": "s"}]},
            "late_system",
        ),
    ],
)
def test_row_whose_meaning_cannot_be_used_is_told_by_reason(
    row: dict[str, Any], reason: str
) -> None:
    defect = read(row)
    assert isinstance(defect, Defect)
    assert defect.reason == reason


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"instruction": "q", "output": "a", "weight": 0.5}, "weight"),
        ({"prompt": "q", "completion": "a", "rejected": "b"}, "rejected"),
        ({"instruction": "q", "output": "a", "hint": "x"}, "hint"),
        (exchange({}, score=3), "score"),
        (exchange({"refusal": "no"}), "refusal"),
    ],
)
def test_unknown_field_is_refused_and_counted_unless_it_is_ignored(
    row: dict[str, Any], name: str
) -> None:
    counts, found = KeyCounts(), detect_row_format(row)
    assert found is not None
    defect = read_row(row, RowFormat(found), counts)
    assert isinstance(defect, Defect)
    assert (defect.reason, repr(name) in defect.detail) == ("unknown_field", True)
    assert counts.unknown == {name: 1}
    assert read(row, ignored=frozenset({name})) == talk("q", "a")


def test_columns_of_the_config_come_before_known_names() -> None:
    row = {"input": "q", "context": "x", "回复内容": "a", "output": "a"}
    columns: dict[FieldName, str] = {
        "instruction": "input",
        "input": "context",
        "output": "回复内容",
    }
    assert detect_row_format(row, columns) == "alpaca"
    assert read(row, columns=columns) == talk("q\nx", "a")
    described = describe_columns({"编号": "1", "提要": "q", "正文": "a"})
    assert all(name in described for name in ("提要", "正文", "fields"))
    assert '"prompt": "提要", "completion": "正文"' in described


def test_error_names_the_column_as_the_file_does() -> None:
    defect = read({"问题": "q", "回答": ["a"]})
    assert isinstance(defect, Defect)
    assert "'回答'" in defect.detail
    assert "completion" not in defect.detail


REPAIRS: list[tuple[str, dict[str, Any], Conversation]] = [
    ("drop_leading_answer", {"messages": [MESSAGES[1], *MESSAGES]}, talk("q", "a")),
    ("drop_trailing_question", {"messages": [*MESSAGES, MESSAGES[0]]}, talk("q", "a")),
    ("join_same_role", {"messages": [MESSAGES[0], *MESSAGES, MESSAGES[1]]}, talk("q\nq", "a\na")),
    ("trim", {"prompt": " q\n", "completion": "\ta"}, talk("q", "a")),
]


@pytest.mark.parametrize(("name", "row", "wanted"), REPAIRS)
def test_repair_is_done_and_counted_only_if_it_is_asked_for(
    name: str, row: dict[str, Any], wanted: Conversation
) -> None:
    assert read(row) != wanted
    counts, found = KeyCounts(), detect_row_format(row)
    assert found is not None
    assert read_row(row, RowFormat(found, repairs=RepairConfig(**{name: True})), counts) == wanted
    assert counts.repaired.total() == 1


WEATHER = {"name": "weather", "description": "Tell it.", "parameters": {"type": "object"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def test_tools_and_calls_are_read_in_every_spelling() -> None:
    rows = [
        {
            "tools": [{"type": "function", "function": WEATHER}],
            "messages": [
                MESSAGES[0],
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "warm"},
                MESSAGES[1],
            ],
        },
        {
            "functions": [{key: WEATHER[key] for key in reversed(WEATHER)}],
            "messages": [
                MESSAGES[0],
                {"role": "assistant", "function_call": {"name": "weather", "arguments": {}}},
                {"role": "function", "name": "weather", "content": "warm"},
                MESSAGES[1],
            ],
        },
        {
            "tools": json.dumps([WEATHER]),
            "conversations": [
                TURNS[0],
                {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
                {"from": "observation", "value": "warm"},
                TURNS[1],
            ],
        },
    ]
    first, *others = map(read, rows)
    assert isinstance(first, Conversation), first
    assert [first] * 2 == others
    assert first.tools == (json.dumps({"type": "function", "function": WEATHER}),)
    assert [turn.role for turn in first.turns] == ["user", "assistant"] * 2
    assert "weather" in first.turns[1].content
    assert "warm" in first.turns[2].content


def test_conversation_with_tools_marks_and_reasoning_survives_formats_with_turns() -> None:
    row = exchange({"reasoning_content": "hm", "weight": 0}, tools=[WEATHER])
    conversation = read(row)
    assert isinstance(conversation, Conversation), conversation
    for row_format in ("conversations", "messages"):
        written = write_row(conversation, row_format)
        assert isinstance(written, dict)
        assert read(written) == conversation
    defect = write_row(conversation, "completion")
    assert isinstance(defect, Defect)
    assert defect.reason == "not_representable"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "a"}, "completion"),
        ({"input": "a"}, "completion"),
        ({"instruction": "a"}, "alpaca"),
        ({"messages": []}, "messages"),
        ({"text": "a"}, None),
    ],
)
def test_format_of_a_prompt_is_detected_without_an_answer(
    row: dict[str, object], found: str | None
) -> None:
    assert detect_prompt_format(row) == found


def test_prompt_ends_before_the_last_answer_which_is_its_reference() -> None:
    said = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]},
    ]
    row = read_prompt({"messages": said}, RowFormat("messages"), KeyCounts())
    assert isinstance(row, PromptRow)
    assert [turn.content for turn in row.conversation.turns] == ["Rome?"]
    assert row.reference is not None
    assert '"name": "weather"' in row.reference
    open_row = read_prompt({"messages": said[:1]}, RowFormat("messages"), KeyCounts())
    assert isinstance(open_row, PromptRow)
    assert (open_row.conversation, open_row.reference) == (row.conversation, None)


def test_prompt_with_an_unknown_column_is_refused() -> None:
    row = read_prompt({"prompt": "a", "loss_scale": 2}, RowFormat("completion"), KeyCounts())
    assert isinstance(row, Defect)
    assert row.reason == "unknown_field"
