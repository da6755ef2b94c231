"""What templates write of messages with tools."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import AddedToken

from raytune_llama.chat.config import ChatConfig
from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.encoding import EncodedConversation, build_chat_encoder
from raytune_llama.chat.formats import RowFormat, read_row
from raytune_llama.chat.row_fields import KeyCounts
from raytune_llama.chat.templates.tokenizer import TokenizerTemplate
from raytune_llama.chat.tools import ToolCallParser, place_tools, write_calls
from raytune_llama.serve.generation.conversation import build_conversation
from raytune_llama.serve.protocol.chat import ChatRequest, Message
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.chat.conftest import CHATML

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "的天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WRITTEN = (
    '{"type": "function", "function": {"name": "weather", "description": "的天气", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}}}}'
)
SYSTEM: Any = {"role": "system", "content": "Be brief."}
ASK: Any = {"role": "user", "content": "In Rom and Oslo?"}
RESULTS: Any = [
    # Not in the calls' order.
    {"role": "tool", "tool_call_id": "b", "content": "cold"},
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "warm"}]},
]


def called(*calls: tuple[str, str], **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    listed = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": text}}
        for name, text in calls
    ]
    return {"role": "assistant", "tool_calls": listed, **fields}


CALLS = called(("a", '{"city":"Rom"}'), ("b", "{}"), content=None, refusal=None, annotations=[])


def request(*messages: Any, **fields: Any) -> ChatRequest:  # noqa: ANN401
    return ChatRequest.model_validate({"model": "m", "messages": list(messages), **fields})


def read(*messages: Any, allows_system: bool = True, **fields: Any) -> Conversation:  # noqa: ANN401
    asked = request(*messages, **fields)
    conversation = build_conversation(asked.messages, asked.shown_tools)
    return place_tools(conversation, allows_system=allows_system)


def test_tools_are_told_behind_what_the_system_says() -> None:
    told = read(SYSTEM, ASK, tools=[TOOL]).system
    assert told is not None
    assert told.startswith("Be brief.\n\n# Tools\n\n")
    assert f"<tools>\n{WRITTEN}\n</tools>" in told
    alone = read(ASK, tools=[TOOL], tool_choice="required")
    assert alone.system is not None
    assert alone.system == told.removeprefix("Be brief.\n\n")
    assert [turn.content for turn in alone.turns] == [ASK["content"]]


def test_tools_are_told_before_the_first_question_where_nothing_is_the_systems() -> None:
    told = read(ASK, tools=[TOOL], allows_system=False)
    assert told.system is None
    assert told.turns[0].content == f"{read(ASK, tools=[TOOL]).system}\n\n{ASK['content']}"


@pytest.mark.parametrize("allows_system", [True, False])
def test_tools_that_may_not_be_called_are_not_shown(*, allows_system: bool) -> None:
    shown = read(ASK, tools=[TOOL], tool_choice="none", allows_system=allows_system)
    assert shown == read(ASK)


def test_calls_and_results_are_turns() -> None:
    told = read(ASK, {**CALLS, "content": "Let me see."}, *RESULTS)
    assert [turn.role for turn in told.turns] == ["user", "assistant", "user"]
    assert told.turns[1].content == (
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city":"Rom"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    )
    results = "<tool_response>\nwarm\n</tool_response>\n<tool_response>\ncold\n</tool_response>"
    assert told.turns[2].content == results
    more = read(ASK, CALLS, *RESULTS, {"role": "user", "content": "So?"})
    assert [turn.content for turn in more.turns[2:]] == [results + "\nSo?"]
    longer = read(ASK, CALLS, *RESULTS, {"role": "assistant", "content": "Warm."}, ASK)
    assert [turn.content for turn in longer.turns[2:]] == [results, "Warm.", ASK["content"]]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([ASK, RESULTS[0]], "messages.1.tool_call_id: 'b' is no call .* its calls are: none"),
        ([RESULTS[0]], "messages.0.tool_call_id: 'b' is no call"),
        ([ASK, CALLS, RESULTS[0]], "messages.1.tool_calls: 'a' has no result"),
        ([ASK, CALLS], "messages.1.tool_calls: 'a' has no result"),
        ([ASK, CALLS, RESULTS[0], ASK], "messages.1.tool_calls: 'a' has no result"),
        ([ASK, CALLS, RESULTS[0], RESULTS[0]], "messages.3.tool_call_id: 'b' has a result already"),
        (
            [ASK, CALLS, *RESULTS, {**RESULTS[0], "tool_call_id": "c"}],
            "messages.4.tool_call_id: 'c' is no call .* 'a', 'b'",
        ),
        (
            [ASK, CALLS, *RESULTS, {"role": "assistant", "content": "x"}, RESULTS[0]],
            "messages.5.tool_call_id: 'b' is no call",
        ),
        (
            [ASK, called(("a", "{}"), ("a", "{}"))],
            "messages.1.tool_calls: two calls have the same id",
        ),
        ([ASK, called(("a", "[]"))], "tool_calls.0.function.arguments: is not a JSON object"),
        # The first call is complete.
        ([ASK, called(("a", '{"a": 1}'), ("b", '{"a": '))], "messages.1.tool_calls: 'a' has no"),
        ([ASK, CALLS, RESULTS[0], SYSTEM, RESULTS[1]], "messages.1.tool_calls: 'a' has no result"),
        # As the request counts, whatever has been joined.
        ([SYSTEM, SYSTEM, ASK, CALLS, ASK], "messages.3.tool_calls: 'a' has no result"),
        ([SYSTEM, ASK, CALLS, *RESULTS, ASK, SYSTEM, CALLS], "messages.7.tool_calls: 'a' has no"),
        ([ASK, CALLS, *RESULTS, RESULTS[0]], "messages.4.tool_call_id: 'b' has a result already"),
        ([SYSTEM, SYSTEM, {"role": "user", "content": "a\0b"}], "messages.2.content: NUL at .* 1"),
        (
            [
                ASK,
                CALLS,
                *RESULTS,
                {"role": "user", "content": [{"type": "text", "text": "\ud83d"}]},
            ],
            "messages.4.content: lone surrogate",
        ),
        ([ASK, CALLS, {**RESULTS[0], "content": "\0"}, RESULTS[1]], "messages.2.content: NUL"),
        ([{**SYSTEM, "content": "\0"}, ASK], "messages.0.content: NUL"),
        (
            [ASK, called(("a", "{}"), ("b", '{"\0'))],
            "messages.1.tool_calls.1.function.arguments: NUL",
        ),
    ],
)
def test_messages_that_do_not_fit_together_are_refused(messages: list[Any], problem: str) -> None:
    asked = request(*messages)
    with pytest.raises(ValueError, match=problem):
        build_conversation(asked.messages, [])


def test_system_messages_may_be_anywhere() -> None:
    developer = {"role": "developer", "content": "In French."}
    said = {"role": "assistant", "content": "Chaud."}
    told = read(SYSTEM, developer, ASK, said, SYSTEM, ASK)
    assert told.system == "Be brief."
    assert [(turn.role, turn.content) for turn in told.turns] == [
        ("system", "In French."),
        ("user", ASK["content"]),
        ("assistant", "Chaud."),
        ("system", "Be brief."),
        ("user", ASK["content"]),
    ]
    assert read(developer, ASK).system == "In French."
    late = read(ASK, CALLS, *RESULTS, developer, ASK)
    assert [turn.role for turn in late.turns] == ["user", "assistant", "user", "system", "user"]


def test_turns_of_one_speaker_stay_apart_until_they_are_rendered() -> None:
    said = {"role": "assistant", "content": "Warm."}
    told = read(said, said, ASK, ASK, said)
    assert [turn.role for turn in told.turns] == [
        "assistant",
        "assistant",
        "user",
        "user",
        "assistant",
    ]


@pytest.mark.parametrize("arguments", ["", " \n"])
def test_empty_arguments_are_an_empty_object(arguments: str) -> None:
    # Where they were cut, the result is missing.
    for results in ([], [RESULTS[1]]):
        told = read(ASK, called(("a", arguments), content=None), *results, ASK)
        assert told.turns[1].content == write_calls("", [("weather", "{}")])


@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_answer_that_was_cut_in_a_call_is_what_the_model_wrote(content: str | None) -> None:
    written = write_calls(
        content or "", [("weather", "{}"), ("weather", '{"city": "Rom", "a": [1]}')]
    )
    start, stop = written.index('{"city'), written.index("}\n</tool_call>", -18)
    for end in range(start + 1, stop):
        parser = ToolCallParser(must_call=False)
        text, chunks = parser.push(written[:end])
        calls = [["", ""], ["", ""]]
        for chunk in chunks:
            calls[chunk.index][0] = chunk.id or calls[chunk.index][0]
            calls[chunk.index][1] += chunk.arguments
        assert text == (content or "")
        answer = called(*((name, arguments) for name, arguments in calls), content=content)
        first = {"role": "tool", "tool_call_id": calls[0][0], "content": "warm"}
        told = read(ASK, answer, first, ASK)
        assert told.turns[1].content == written[:end]
        # A result that is there all the same is used.
        second = {"role": "tool", "tool_call_id": calls[1][0], "content": "cold"}
        told = read(ASK, answer, first, second, ASK)
        assert "cold" in told.turns[2].content


def test_arguments_that_nest_too_deeply_are_text() -> None:
    told = read(ASK, called(("a", "[" * 100_000)), ASK)
    assert told.turns[1].content.endswith("[" * 100_000)


@pytest.mark.parametrize("content", [None, "", []])
def test_assistant_message_without_text_is_empty(content: Any) -> None:  # noqa: ANN401
    empty = Message.model_construct(role="assistant", content=content)
    asked = request(ASK, ASK).messages
    told = build_conversation([asked[0], empty, asked[1]], [])
    assert told.turns[1] == Turn("assistant", "")
    called_ = request(ASK, called(("a", "{}"), content="x"), RESULTS[1]).messages
    beside = called_[1].model_copy(update={"content": content})
    told = build_conversation([called_[0], beside, called_[2]], [])
    assert told.turns[1].content == write_calls("", [("weather", "{}")])


def tool(**function: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"type": "function", "function": {"name": "f", **function}}


DEEP: Any = {}
for _ in range(40):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id: required with role=tool"),
        ({"messages": [{**ASK, "tool_call_id": "a"}]}, "tool_call_id: required with role=tool"),
        (
            {"messages": [{**CALLS, "content": "x", "role": "user"}]},
            "tool_calls: only allowed with role=assistant",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "content: missing"),
        ({"tools": [tool(name="a b")]}, "name"),
        ({"tools": [tool(name="a\n")]}, "name"),
        ({"tools": [tool(name="a" * 65)]}, "name"),
        ({"tools": [tool(name=str(n)) for n in range(129)]}, "tools"),
        ({"tools": [tool(), tool()]}, "tools: got 2 functions named f"),
        ({"tools": [tool(parameters={"type": "string"})]}, "expected 'object'"),
        ({"tools": [tool(parameters=DEEP)]}, "more than 32 levels"),
        ({"tools": [tool(parameters={"x": "y" * 100_000})]}, "at most 100000"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "type"),
        ({"tool_choice": "required"}, "tool_choice: required, but there are no tools"),
        ({"tools": [tool()], "tool_choice": tool(name="g")}, "function g not found in tools"),
        ({"tools": [tool()], "tool_choice": "maybe"}, "tool_choice"),
    ],
)
def test_request_whose_tools_are_wrong_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ChatRequest.model_validate({"model": "m", "messages": [ASK], **fields})


def test_as_much_as_may_be_is_taken() -> None:
    request(ASK, tools=[tool(name=f"{n:064d}") for n in range(128)])
    request(ASK, tools=[tool(parameters={"type": "object", "a": [[["x"]]]})])


QWENS = r"""{% if tools %}{{ '<s>system\n' }}
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
{{ 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' }}
{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
{{ '</tools>\n\nFor each function call, return a json object with function name and ' }}
{{ 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": ' }}
{{ '<function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{% endif %}
{% for m in messages %}
{% if m.role == 'tool' %}
{% if loop.previtem.role != 'tool' %}{{ '<s>user' }}{% endif %}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{% elif m.role != 'system' or not tools %}
{{ '<s>' + m.role + '\n' + (m.content or '') }}
{% for call in m.tool_calls or [] %}
{% if m.content or not loop.first %}{{ '\n' }}{% endif %}
{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{ call.function.arguments + '}\n</tool_call>' }}
{% endfor %}
{{ '<|im_end|>\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}""".replace("}}\n", "}}")
"""Writes tools as the templates of Qwen's models do."""


@pytest.mark.parametrize("start", [[], [SYSTEM]])
@pytest.mark.parametrize("text", ["", "Let me see."])
def test_tools_are_written_as_qwens_templates_write_them(
    tokenizer_dir: Path, start: list[Any], text: str
) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    tokenizer.eos_token = "<|im_end|>"  # noqa: S105  # no secret
    for marker in ("<tool_call>", "</tool_call>"):
        tokenizer.add_tokens(AddedToken(marker, special=False, normalized=False))
    tokenizer.chat_template = QWENS
    chat = build_chat_encoder(tokenizer, ChatConfig(template="tokenizer"))
    results = [{**result, "content": "12"} for result in reversed(RESULTS)]
    said = {"role": "assistant", "content": "Warm."}
    for messages in (
        [*start, ASK],
        [*start, ASK, {**CALLS, "content": text}, *results],
        [*start, ASK, {**CALLS, "content": text}, *results, said, ASK],
    ):
        wanted = tokenizer.apply_chat_template(
            messages, tools=[TOOL, TOOL], add_generation_prompt=True, tokenize=False
        )
        asked = request(*messages, tools=[TOOL])
        told = build_conversation(asked.messages, [*asked.shown_tools, *asked.shown_tools])
        assert isinstance(wanted, str)
        ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
        assert chat.encode_prompt(told).tolist() == ids


@pytest.mark.parametrize("template", ["qwen", "alpaca"])
def test_row_with_tools_is_trained_as_it_is_served_and_parsed(
    tokenizer_dir: Path, template: str
) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    if template == "qwen":
        tokenizer.eos_token = "<|im_end|>"  # noqa: S105  # no secret
        tokenizer.chat_template = QWENS
    name = "tokenizer" if template == "qwen" else "alpaca"
    chat = build_chat_encoder(tokenizer, ChatConfig(template=name))
    said = {"role": "assistant", "content": "Warm.</s>"}
    last = {**CALLS, "content": "Let me see."}
    messages = [ASK, CALLS, *RESULTS, said, ASK, last]
    counts = KeyCounts()
    row = read_row({"messages": messages, "tools": [TOOL]}, RowFormat("messages"), counts)
    assert isinstance(row, Conversation), row
    (made,) = chat.encode([row])
    assert isinstance(made, EncodedConversation), made

    edges = np.flatnonzero(np.diff(made.targets.astype(int), prepend=0))
    starts = edges[::2].tolist()
    assert len(starts) == 3
    for start, asked in zip(starts, (messages[:1], messages[:4], messages[:6]), strict=True):
        served = request(*asked, tools=[TOOL])
        prompt = chat.encode_prompt(build_conversation(served.messages, served.shown_tools))
        assert prompt.tolist() == made.ids[:start].tolist()
    learned = str(tokenizer.decode(made.ids[starts[-1] :]))
    parser = ToolCallParser(must_call=False)
    text, chunks = parser.push(learned[: learned.rindex("</tool_call>") + len("</tool_call>")])
    assert text.strip() == "Let me see."
    arguments = {chunk.index: "" for chunk in chunks}
    for chunk in chunks:
        arguments[chunk.index] += chunk.arguments
    assert arguments == {0: '{"city":"Rom"}', 1: "{}"}
    assert "warm" not in tokenizer.decode(made.ids[made.targets])


@pytest.mark.parametrize(
    ("text", "is_other"),
    [(QWENS, False), (QWENS.replace("<tool_call>", "[CALL]"), True), (CHATML, False)],
)
def test_tool_format_of_a_template_is_compared(
    tokenizer_dir: Path, text: str, *, is_other: bool
) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    tokenizer.chat_template = text
    assert TokenizerTemplate(tokenizer).has_other_tool_format() is is_other
