"""Calls are read as they were written, however the text is cut into pieces."""

import json
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from raytune_llama.chat.tools import (
    ChatMessage,
    ToolCall,
    ToolCallChunk,
    ToolCallParser,
    join_tool_messages,
    write_calls,
    write_results,
    write_tools,
)

NAMES = st.text("abZ09_-", min_size=1, max_size=64)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[]<>/人\n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("a}\"'"), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text('ab"}', max_size=3), VALUES, max_size=3)
# Letters of the marker, so that text nearly is one.
TEXTS = st.text("<tool_call>\n/ 人", max_size=20).filter(
    lambda text: "<tool_call>" not in text and not text.endswith("\n")
)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:stop] for start, stop in pairwise(edges)]


def read(
    pieces: list[str], *, must_call: bool
) -> tuple[str, list[tuple[str, str]], list[ToolCallChunk]]:
    parser = ToolCallParser(must_call=must_call)
    text, told = "", list[ToolCallChunk]()
    for piece in pieces:
        said, new = parser.push(piece)
        assert not (said and told), "text behind a call"
        text, told = text + said, told + new
    text += parser.finish()
    calls: list[list[str]] = []
    for piece in told:
        if piece.name is not None:
            calls.append([piece.name, ""])
        assert piece.index == len(calls) - 1
        calls[-1][1] += piece.arguments
    assert len(calls) == parser.num_calls
    return text, [(name, arguments) for name, arguments in calls], told


@given(
    text=TEXTS,
    calls=st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3),
    is_ascii=st.booleans(),
    places=st.lists(st.integers(0, 2000), max_size=30),
)
def test_calls_are_read_as_written_whatever_the_pieces(
    text: str, calls: list[tuple[str, dict[str, object]]], places: list[int], *, is_ascii: bool
) -> None:
    wanted = [(name, json.dumps(value, ensure_ascii=is_ascii)) for name, value in calls]
    written = write_calls(text, wanted)
    found_text, found, pieces = read(cut(written, places), must_call=False)
    assert (found_text, found) == (text, wanted)
    names = [piece.id for piece in pieces if piece.id is not None]
    assert len(set(names)) == len(names) == len(calls)
    if wanted and not text:
        assert read(cut(written, places), must_call=True)[:2] == ("", wanted)


def test_arguments_are_told_as_they_come() -> None:
    written = write_calls("", [("weather", '{"city": "Rom"}')])
    parser, told = ToolCallParser(must_call=False), list[ToolCallChunk]()
    for character in written:
        told += parser.push(character)[1]
    assert told[0].name == "weather"
    assert told[0].arguments == ""
    assert [piece.arguments for piece in told[1:]] == list('{"city": "Rom"}')


@pytest.mark.parametrize(
    ("cut_at", "text", "calls"),
    [
        ("Sure", "Sure", []),
        # What only looks like a call is text.
        ("Sure.\n<tool_cal", "Sure.\n<tool_cal", []),
        ("Sure.\n<tool_call>", "Sure.", []),
        ('Sure.\n<tool_call>\n{"name": "w', "Sure.", []),
        ('Sure.\n<tool_call>\n{"name": "w", "arguments": ', "Sure.", [("w", "")]),
        ('Sure.\n<tool_call>\n{"name": "w", "arguments": {"a', "Sure.", [("w", '{"a')]),
        ('Sure.\n<tool_call>\n{"name": "w", "arguments": {}}\n</to', "Sure.", [("w", "{}")]),
    ],
)
def test_answer_that_is_cut_tells_what_has_come(
    cut_at: str, text: str, calls: list[tuple[str, str]]
) -> None:
    assert read([cut_at], must_call=False)[:2] == (text, calls)


def test_call_that_has_to_come_and_is_cut_in_its_marker_is_no_text() -> None:
    assert read(["<tool_ca"], must_call=True)[:2] == ("", [])


def test_tools_and_results_have_qwens_form() -> None:
    assert write_tools(['{"a": 1}', '{"b": 2}']).startswith(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
        'provided with function signatures within <tools></tools> XML tags:\n<tools>\n{"a": 1}\n'
        '{"b": 2}\n</tools>\n\n'
    )
    assert write_results(["12", "a\nb"]) == (
        "<tool_response>\n12\n</tool_response>\n<tool_response>\na\nb\n</tool_response>"
    )


def test_turn_is_placed_at_its_first_message() -> None:
    calls = (ToolCall("f", "{}", "a"), ToolCall("f", "{}", "b"))
    joined = join_tool_messages(
        [
            ChatMessage("system", "Be brief."),
            ChatMessage("user", "q"),
            ChatMessage("assistant", "", calls),
            ChatMessage("tool", "2", call_id="b"),
            ChatMessage("tool", "1", call_id="a"),
            ChatMessage("user", "r"),
            ChatMessage("assistant", "s"),
            ChatMessage("user", "t"),
        ],
        first=1,
    )
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert [turn.role for turn in joined.turns] == roles
    assert joined.places == (1, 2, 3, 4, 7, 8)


def test_call_that_needs_no_result_takes_one() -> None:
    call = ToolCall("f", '{"a', "a", is_cut=True, needs_result=False)
    asked = [ChatMessage("user", "q"), ChatMessage("assistant", "", (call,))]
    without = join_tool_messages([*asked, ChatMessage("user", "r")]).turns
    result = ChatMessage("tool", "1", call_id="a")
    with_result = join_tool_messages([*asked, result, ChatMessage("user", "r")]).turns
    written = '<tool_call>\n{"name": "f", "arguments": {"a'
    assert [turn.content for turn in without] == ["q", written, "r"]
    assert [turn.content for turn in with_result] == ["q", written, write_results(["1"]) + "\nr"]
