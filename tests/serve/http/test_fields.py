"""Fields that mean nothing, are not supported, or that nobody documents."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.generation.completion import CompletionService
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_routes import FOX, Here, Server


@pytest.fixture(scope="module")
def server(answerer: CompletionService) -> Iterator[Server]:
    server = Server({"tiny": Here(answerer), "scripted": Scripted("a")})
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


CHAT: dict[str, Any] = {"model": "tiny", "messages": FOX, "max_tokens": 3, "temperature": 0}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the fox", "max_tokens": 3, "temperature": 0}
IGNORED = ("ignored_fields",)
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}

SHARED_NOTHING: list[dict[str, Any]] = [
    *({name: None} for name in ("temperature", "top_p", "n", "seed", "stop", "stream", "user")),
    *({name: None} for name in ("logit_bias", "logprobs", "stream_options", "max_tokens")),
    {"frequency_penalty": 0, "presence_penalty": 0.0, "n": 1, "min_p": 0, "top_k": -1},
    {"logit_bias": {}, "stop": [], "metadata": {}, "best_of": 1},
    {"stop": "", "top_k": 0, "use_beam_search": False, "ignore_eos": False, "num_beams": 1},
    {"stream_options": {"include_usage": True}},
    {"user": "u", "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
]
CHAT_NOTHING: list[dict[str, Any]] = [
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tools": None, "tool_choice": "none", "parallel_tool_calls": False},
    {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None},
    {"top_logprobs": 0, "functions": [], "function_call": "auto", "verbosity": "medium"},
    {"reasoning_effort": "none", "chat_template_kwargs": {}, "web_search_options": {}},
    {"reasoning_effort": "low"},  # the template does not read it
    {"messages": [{"role": "user", "content": "the fox", "name": None, "tool_calls": []}]},
    {"messages": [{"role": "user", "content": "the fox", "audio": None, "annotations": []}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "the fox"}]}]},
]


@pytest.mark.parametrize("fields", SHARED_NOTHING + CHAT_NOTHING)
def test_chat_fields_that_mean_nothing_change_nothing(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    plain = client.chat.completions.create(**CHAT)
    asked: Any = {**CHAT, **fields, "max_tokens": 3, "temperature": 0}
    found: Any = client.post("/chat/completions", body=asked, cast_to=object)
    assert found["choices"][0]["message"]["content"] == plain.choices[0].message.content


@pytest.mark.parametrize("fields", [*SHARED_NOTHING, {"echo": False, "suffix": ""}])
def test_completion_fields_that_mean_nothing_change_nothing(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    plain = client.completions.create(**TEXT)
    asked: Any = {**TEXT, **fields, "max_tokens": 3, "temperature": 0}
    found: Any = client.post("/completions", body=asked, cast_to=object)
    assert found["choices"][0]["text"] == plain.choices[0].text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"web_search_options": {"user_location": {}}}, "web_search_options"),
        ({"verbosity": "low"}, "verbosity"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"best_of": 3}, "best_of"),
        ({"messages": [{"role": "user", "content": "a", "function_call": {"name": "f"}}]}, None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={**CHAT, **fields}, cast_to=object)
    wanted = param or "messages.0.function_call"
    assert caught.value.param == wanted
    assert wanted in caught.value.message


@pytest.mark.parametrize("name", ["response_format", "guided_json", "structured_outputs"])
def test_fields_of_constrained_decoding_are_refused_where_they_are_not_supported(
    client: openai.OpenAI, name: str
) -> None:
    asked: dict[str, Any] = {**TEXT, name: {"type": "json_object"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body=asked, cast_to=object)
    assert caught.value.param == name
    assert "use /v1/chat/completions with response_format" in caught.value.message


def test_unknown_fields_are_ignored_counted_and_logged_once(
    server: Server, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{"role": "user", "content": "the fox", "mood": "good"}]
    asked: Any = {**CHAT, "messages": messages, "colour": "red"}
    before = server.metrics.values.get(IGNORED, 0.0)
    with caplog.at_level(logging.WARNING, logger="raytune_llama.serve"):
        for _ in range(3):
            client.post("/chat/completions", body=asked, cast_to=object)
    assert server.metrics.values.get(IGNORED, 0.0) - before == 6
    told = [record.getMessage() for record in caplog.records if "unknown field" in record.msg]
    assert sorted(one.count("'colour'") - one.count("'messages.mood'") for one in told) == [-1, 1]


@pytest.mark.parametrize(
    ("route", "asked", "name"),
    [
        ("/chat/completions", {**CHAT, "colour": "red"}, "colour"),
        ("/chat/completions", {**CHAT, "tools": [{**TOOL, "x": 1}]}, "tools.x"),
        ("/completions", {**TEXT, "colour": None, "shape": 1}, "shape"),
        ("/embeddings", {"model": "tiny", "input": "a", "colour": 1}, "colour"),
    ],
)
def test_unknown_fields_are_refused_where_requests_are_strict(
    answerer: CompletionService, route: str, asked: dict[str, Any], name: str
) -> None:
    strict = RequestLimits(strict_requests=True)
    server = Server({"tiny": Here(answerer)}, limits=strict)
    try:
        with pytest.raises(openai.BadRequestError) as caught:
            server.client().post(route, body=asked, cast_to=object)
        assert (caught.value.param, caught.value.code) == (name, "unknown_parameter")
        server.client().chat.completions.create(**CHAT, user="u", metadata={"a": "b"})
    finally:
        server.close()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": None}, "messages: missing; this field is required"),
        ({"messages": "x"}, "messages: got a string, expected a list"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: got a number, expected a string or a list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type: got 'image_url', expected 'text' or 'refusal'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text: missing",
        ),
        ({"temperature": 3}, "temperature: got 3, expected at most 2"),
        ({"temperature": "1"}, "temperature: got a string, expected a number"),
        ({"n": 1.5}, "n: got 1.5, expected an integer"),
        ({"max_tokens": -1}, "max_tokens: got -1, expected at least 0"),
        ({"stream": "yes"}, "stream: got a string, expected true or false"),
        ({"stop": ["x"] * 17}, "stop: got 17, expected at most 16 items"),
        ({"stop": [5]}, "stop.0: got a number, expected a string"),
        (
            {"tool_choice": "must", "tools": [TOOL]},
            "tool_choice: got 'must', expected 'none', 'auto' or 'required'",
        ),
        ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice.function: missing"),
        ({"tool_choice": "required"}, "tool_choice: required, but there are no tools"),
        ({"tools": [{"type": "custom"}]}, "tools.0.type: got 'custom', expected 'function'"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: got 101, expected at most 100"),
        ({"logit_bias": {"fox": 1}}, "logit_bias.fox"),
        ({"logit_bias": {"100000": 1}}, "logit_bias: token id 100000 is outside"),
    ],
)
def test_invalid_fields_are_described_in_words_of_json(
    client: openai.OpenAI, fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={**CHAT, **fields}, cast_to=object)
    body: Any = caught.value.body
    assert problem in body["message"]
    assert body["param"]
    assert body["code"]
    assert "Input should" not in json.dumps(body)
