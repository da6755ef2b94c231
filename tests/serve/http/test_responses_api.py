"""`/v1/responses` as OpenAI's own client sees it, over real HTTP on loopback."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx2 as httpx
import jsonschema
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall

from raytune_llama.serve.errors import BusyError, EngineError
from raytune_llama.serve.generation.completion import CompletionService
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_routes import Failing, Here, Server
from tests.serve.http.test_tools import SCHEMAS, TOOLS, answerer, tools_dir

__all__ = ["answerer", "tools_dir"]

ASK: Any = [{"role": "user", "content": "the fox"}]
FLAT: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module")
def server(answerer: CompletionService) -> Iterator[Server]:
    server = Server(
        {
            "tiny": Here(answerer),
            "scripted": Scripted("Yes", "."),
            "busy": Failing(BusyError("9 requests are waiting already"), 0),
            "broken": Failing(EngineError("the engine has failed"), 2),
        }
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, openai.OpenAI]]:
    model = Scripted("Yes", ".")
    server = Server({"tiny": model})
    yield model, server.client()
    server.close()


def ask(client: openai.OpenAI, **fields: Any) -> Any:  # noqa: ANN401
    asked: dict[str, Any] = {"model": "tiny", "input": "the fox", "temperature": 0}
    return client.responses.create(**(asked | fields))


def chat(client: openai.OpenAI, **fields: Any) -> Any:  # noqa: ANN401
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "temperature": 0}
    return client.chat.completions.create(**(asked | fields))


def without_ids(response: Response) -> dict[str, Any]:
    """Return what two responses to a request have in common at temperature 0."""
    found = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in found["output"]:
        assert item.pop("id").startswith(("msg_", "fc_"))
        item.pop("call_id", None)
    return found


@pytest.mark.parametrize("max_tokens", [1, 12])
def test_response_is_chats_text_with_chats_counts(client: openai.OpenAI, max_tokens: int) -> None:
    response = ask(client, max_output_tokens=max_tokens)
    wanted = chat(client, max_tokens=max_tokens)
    assert wanted.choices[0].finish_reason == "length"
    assert response.output_text == wanted.choices[0].message.content
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (
        wanted.usage.prompt_tokens,
        wanted.usage.completion_tokens,
        wanted.usage.total_tokens,
    )
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert (response.object, response.model, response.id[:5]) == ("response", "tiny", "resp_")


def test_complete_response_says_so_and_returns_its_request(client: openai.OpenAI) -> None:
    response = ask(
        client,
        model="scripted",
        instructions="Be brief.",
        metadata={"a": "b"},
        top_p=0.5,
        max_output_tokens=99,
        tools=FLAT,
        tool_choice="none",
        parallel_tool_calls=False,
        reasoning={"effort": None},
        store=False,
    )
    assert response.output_text == "Yes."
    assert (response.status, response.error, response.incomplete_details) == (
        "completed",
        None,
        None,
    )
    assert response.completed_at >= response.created_at
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0, 0.5, 99)
    assert [tool.name for tool in response.tools] == list(SCHEMAS)
    assert (response.tool_choice, response.parallel_tool_calls) == ("none", False)
    assert (response.text.format.type, response.truncation) == ("text", "disabled")
    # The whole of it, as OpenAI's types have it: a client's objects may lack any field.
    strict = Response.model_validate(json.loads(response.to_json()))
    assert strict.output_text == "Yes."


@pytest.mark.parametrize(
    "fields",
    [
        {"max_output_tokens": 12},
        {"model": "scripted"},
        {"tools": FLAT, "tool_choice": "required", "max_output_tokens": 200},
        {"tools": FLAT, "tool_choice": {"type": "function", "name": "weather"}},
    ],
)
def test_stream_ends_with_the_response_at_once(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    fields = {"parallel_tool_calls": False} | fields
    events = list(ask(client, stream=True, **fields))
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert without_ids(events[-1].response) == without_ids(ask(client, **fields))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_events_are_named_and_end_without_the_mark_of_chats_streams(server: Server) -> None:
    asked = {"model": "scripted", "input": "the fox", "stream": True}
    answer = httpx.post(f"{server.url}/v1/responses", json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in answer.text.strip("\n").split("\n\n")]
    for name, data in events:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert events[-1][0] == "event: response.completed"


def test_clients_stream_accumulates_the_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="scripted", input="the fox") as stream:
        events: Any = list(stream)
        snapshots = [event.snapshot for event in events if event.type.endswith("text.delta")]
        assert snapshots == ["Yes", "Yes."]
        assert stream.get_final_response().output_text == "Yes."


class Said(pydantic.BaseModel):
    good: bool
    word: Literal["fox", "人民"]


@pytest.mark.parametrize("seed", range(3))
def test_text_is_parsed_as_its_schema(client: openai.OpenAI, seed: int) -> None:
    fields: Any = {"model": "tiny", "input": f"the fox {seed}", "temperature": 1.5}
    response = client.responses.parse(text_format=Said, **fields)
    assert isinstance(response.output_parsed, Said)
    with client.responses.stream(text_format=Said, **fields) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Said)


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    form = {"format": {"type": "json_object"}}
    response = ask(client, text=form, max_output_tokens=300)
    wanted = chat(client, response_format={"type": "json_object"}, max_tokens=300)
    assert response.output_text == wanted.choices[0].message.content
    assert response.output_text.lstrip().startswith("{")
    assert response.text.format.type == "json_object"


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_call_is_chats_call(client: openai.OpenAI, name: str) -> None:
    fields: dict[str, Any] = {"parallel_tool_calls": False}
    response = ask(client, tools=FLAT, tool_choice={"type": "function", "name": name}, **fields)
    choice = {"type": "function", "function": {"name": name}}
    wanted = chat(client, tools=TOOLS, tool_choice=choice, **fields)
    (call,) = response.output
    assert isinstance(call, ResponseFunctionToolCall)
    (same,) = wanted.choices[0].message.tool_calls
    assert (call.name, call.arguments) == (name, same.function.arguments)
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[name])
    assert call.call_id.startswith("call_")
    assert (call.status, response.status) == ("completed", "completed")
    assert response.usage.input_tokens == wanted.usage.prompt_tokens
    assert response.usage.output_tokens == wanted.usage.completion_tokens


def test_call_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "tools": FLAT,
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
    }
    whole = ask(client, **fields)
    cut = ask(client, **fields, max_output_tokens=whole.usage.output_tokens - 4)
    assert (cut.status, cut.output[-1].status) == ("incomplete", "incomplete")
    assert whole.output[0].arguments.startswith(cut.output[0].arguments)


def test_only_allowed_functions_are_called(client: openai.OpenAI) -> None:
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "now"}],
    }
    response = ask(client, tools=FLAT, tool_choice=choice, max_output_tokens=100)
    assert {call.name for call in response.output} == {"now"}
    assert response.tool_choice.to_dict() == choice


def test_conversation_continues_with_the_output_as_it_came(client: openai.OpenAI) -> None:
    first = ask(client, tools=FLAT, tool_choice="required", parallel_tool_calls=False)
    (call,) = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    message = {
        "role": "assistant",
        "tool_calls": [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
        ],
    }
    result = {"role": "tool", "tool_call_id": call.call_id, "content": "12 degrees"}
    wanted = chat(client, messages=[*ASK, message, result], tools=TOOLS, max_tokens=5)
    for item in (call, call.model_dump(), call.to_dict()):
        asked = [*ASK, item, output]
        second = ask(client, input=asked, tools=FLAT, max_output_tokens=5)
        assert second.usage.input_tokens == wanted.usage.prompt_tokens
    third = ask(client, input=[*asked, *second.output, *ASK], tools=FLAT, max_output_tokens=5)
    assert third.usage.input_tokens > second.usage.input_tokens


def test_input_becomes_chats_messages(scripted: tuple[Scripted, openai.OpenAI]) -> None:
    model, client = scripted
    call = {"type": "function_call", "name": "now", "arguments": "{}"}
    items: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Rhyme."}]},
        {"type": "message", "role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xx"},
        {
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "b", "annotations": [], "logprobs": []},
                {"type": "refusal", "refusal": "c"},
            ],
        },
        {**call, "call_id": "1", "id": "fc_1", "status": "completed"},
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "d"},
        {
            "type": "function_call_output",
            "call_id": "2",
            "output": [{"type": "input_text", "text": "e"}, {"type": "text", "text": "f"}],
        },
        {**call, "call_id": "3"},
        {"type": "function_call_output", "call_id": "3", "output": ""},
    ]
    ask(client, input=items, instructions="Be brief.")
    assert model.messages == [
        ("system", "Be brief."),
        ("developer", "Rhyme."),
        ("user", "a"),
        ("assistant", "bc"),
        ("tool", "d"),
        ("tool", "ef"),
        ("assistant", ""),
        ("tool", ""),
    ]
    messages: Any = model.fields["messages"]
    calls = [[one["id"] for one in message.get("tool_calls", [])] for message in messages]
    assert calls == [[], [], [], ["1", "2"], [], [], ["3"], []]
    ids = [message.get("tool_call_id") for message in messages]
    assert ids == [None, None, None, None, "1", "2", None, "3"]


def test_options_become_chats_options(scripted: tuple[Scripted, openai.OpenAI]) -> None:
    model, client = scripted
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    ask(
        client,
        temperature=0.5,
        top_p=0.25,
        max_output_tokens=7,
        text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=3,
        reasoning={"effort": "low", "summary": "auto"},
        user="someone",
        metadata={"a": "b"},
        prompt_cache_key="x",
        max_tool_calls=3,
        truncation="disabled",
        service_tier="flex",
    )
    fields = model.fields
    assert (fields["temperature"], fields["top_p"]) == (0.5, 0.25)
    assert (fields["max_completion_tokens"], fields["reasoning_effort"]) == (7, "low")
    assert (fields["logprobs"], fields["top_logprobs"]) == (True, 3)
    form: Any = fields["response_format"]
    assert (form["type"], form["json_schema"]["name"]) == ("json_schema", "x")
    assert form["json_schema"]["schema_"] == schema
    assert not fields.keys() & {"tools", "tool_choice", "parallel_tool_calls"}
    choice = {"type": "function", "name": "now"}
    ask(client, tools=FLAT, tool_choice=choice, parallel_tool_calls=False)
    fields = model.fields
    assert fields["tools"] == TOOLS
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "now"}}
    assert fields["parallel_tool_calls"] is False


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_chats(client: openai.OpenAI, *, stream: bool) -> None:
    fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    fields |= {"max_output_tokens": 6}
    wanted = chat(client, max_tokens=6, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    pairs = [(one.token, one.logprob) for one in wanted]
    assert len(pairs) == 6
    if stream:
        events = list(ask(client, stream=True, **fields))
        told = [
            one for event in events if event.type.endswith("text.delta") for one in event.logprobs
        ]
        assert [(one.token, one.logprob) for one in told] == pairs
        response = events[-1].response
    else:
        response = ask(client, **fields)
    told = response.output[0].content[0].logprobs
    assert [(one.token, one.logprob) for one in told] == pairs
    assert all(len(one.top_logprobs) == 2 for one in told)
    assert ask(client, max_output_tokens=2).output[0].content[0].logprobs == []


PART = {"type": "input_image", "image_url": "data:image/png;base64,xx"}
CALL = {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "x"}
NUL = [{"role": "user", "content": "a\0b"}]


UNSUPPORTED: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "responses are not stored"),
    ({"conversation": "conv_1"}, "conversation", "send the whole conversation as input"),
    ({"store": True}, "store", "set store to false"),
    ({"background": True}, "background", "set background to false"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "as instructions or input"),
    ({"truncation": "auto"}, "truncation", "shorten the input"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "ask for it in the instructions"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "omit it"),
    ({"extra_body": {"max_tokens": 3}}, "max_tokens", "use max_output_tokens"),
    ({"extra_body": {"seed": 3}}, "seed", "use /v1/chat/completions"),
    ({"extra_body": {"seed": 0}}, "seed", "use /v1/chat/completions"),
    ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "use text.format"),
    ({"extra_body": {"ignore_eos": True}}, "ignore_eos", "omit it"),
    (
        {"input": [{"type": "reasoning", "content": [{"type": "reasoning_text"}]}]},
        "input.0.content",
        "omit reasoning items",
    ),
    (
        {"input": [*ASK, {"type": "item_reference", "id": "msg_1"}]},
        "input.1.type",
        "store: false",
    ),
    ({"input": [*ASK, {"id": "msg_1"}]}, "input.1.type", "send the whole conversation"),
    ({"input": [{"type": "web_search_call", "id": "1"}]}, "input.0.type", "supported types"),
    ({"input": [{"role": "user", "content": [PART]}]}, "input.0.content.0.type", "only text"),
    (
        {"input": [*ASK, CALL, {**RESULT, "output": [PART]}]},
        "input.2.output.0.type",
        "only text",
    ),
    ({"tools": [FLAT[0], {"type": "web_search"}]}, "tools.1.type", "no built-in tools"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type", "define a function"),
    ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "choose a function"),
    ({"include": ["file_search_call.results"]}, "include.0", "not supported"),
]
INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "at least 1"),
    ({"input": 3}, "input", "got a number, expected a string or a list"),
    ({"input": [{"role": "user", "content": {}}]}, "input.0.content", "expected a string or"),
    ({"input": [*ASK, 3]}, "input.1", "expected an object"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input.0.role", "'system'"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input.0.content.0.text",
        "",
    ),
    ({"input": [*ASK, {**CALL, "name": "no name"}]}, "input.1.name", "a match of"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name", "a match of"),
    ({"tools": [{"type": "function"}]}, "tools.0.name", "missing"),
    ({"tool_choice": "maybe"}, "tool_choice", "expected none, auto"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "'json_schema'"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"temperature": "hot"}, "temperature", "expected a number"),
    # What chat finds wrong.
    ({"tools": [FLAT[2], FLAT[2]]}, "tools", "got 2 functions named now"),
    ({"tools": FLAT, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "not found"),
    ({"input": [*ASK, *([CALL] * 200)]}, "input.1", "at most 128 items"),
    ({"input": [*ASK, RESULT]}, "input.1.call_id", "input.1.call_id: '1' is no call"),
    (
        {"instructions": "x", "input": [*ASK, RESULT]},
        "input.1.call_id",
        "input.1.call_id: '1' is no call",
    ),
    ({"input": [*ASK, CALL]}, "input.1", "input.1: '1' has no result"),
    ({"input": [*ASK, CALL]}, "input.1", "followed by a function_call_output item"),
    ({"input": [*ASK, CALL, CALL]}, "input.1", "input.1: two calls have the same id"),
    (
        {"input": [*ASK, CALL, {**CALL, "call_id": "2", "arguments": "[]"}, RESULT]},
        "input.2.arguments",
        "input.2.arguments: is not a JSON object",
    ),
    ({"input": NUL, "instructions": "x"}, "input.0.content", "input.0.content: "),
    ({"input": "fox " * 9000}, "input", "4096 tokens"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}},
        "text.format",
        "schema can't be used",
    ),
]


@pytest.mark.parametrize(("fields", "param", "problem"), [*UNSUPPORTED, *INVALID])
def test_refusal_names_the_field_and_what_to_do(
    client: openai.OpenAI, fields: dict[str, Any], param: str, problem: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert problem in caught.value.message
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("none", openai.NotFoundError),
        ("busy", openai.RateLimitError),
    ],
)
def test_error_before_the_first_token_has_its_status(
    client: openai.OpenAI, model: str, error: type[openai.APIError], *, stream: bool
) -> None:
    with pytest.raises(error):
        ask(client, model=model, stream=stream)


def test_stream_of_an_engine_that_fails_ends_with_an_error(
    server: Server, client: openai.OpenAI
) -> None:
    events: list[Any] = []
    with pytest.raises(openai.APIError, match="the engine has failed"):
        events.extend(ask(client, model="broken", stream=True))
    asked = {"model": "broken", "input": "the fox", "stream": True}
    lines = httpx.post(f"{server.url}/v1/responses", json=asked).text.split("\n")
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [one["type"] for one in told[-2:]] == ["error", "response.failed"]
    # Clients differ in which form they read.
    assert told[-2]["message"] == told[-2]["error"]["message"] == "the engine has failed"
    failed = told[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["content"][0]["text"] == "0 1 "
    assert (failed["output"][0]["status"], failed["usage"]["output_tokens"]) == ("incomplete", 2)


def test_stored_responses_are_not_found(client: openai.OpenAI) -> None:
    for call in (
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError, match="are not stored"):
            call("resp_1")


def test_request_is_counted_as_a_models(answerer: CompletionService) -> None:
    server = Server({"tiny": Here(answerer)})
    client = server.client()
    usage = ask(client, max_output_tokens=5).usage
    list(ask(client, max_output_tokens=5, stream=True))
    server.close()
    values = server.metrics.values
    assert values["http_requests", "/v1/responses", "200"] == 2
    assert values["answers", "tiny", "", "ok"] == 2
    assert values["prompt_tokens", "tiny", ""] == 2 * usage.input_tokens
    assert values["completion_tokens", "tiny", ""] == 2 * usage.output_tokens
