"""Tools as OpenAI's own client sees them, over real HTTP on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.serve.config import SamplingDefaults, ServedModelConfig
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.model import load_served_model
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.serve.http.test_routes import Here, Server

SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Rom", "人民", 'a "quoted" {one}']},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "search": {
        "type": "object",
        "properties": {"words": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
        "required": ["words"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMAS["weather"]}},
    {"type": "function", "function": {"name": "search", "parameters": SCHEMAS["search"]}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
ASK: Any = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def tools_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A model directory with room for tools in the prompt."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tools") / "tiny"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=4096,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(path)
    load_tokenizer(tokenizer_dir).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def answerer(tools_dir: Path) -> Iterator[CompletionService]:
    # A template without a place for what the system says.
    served = load_served_model(
        ServedModelConfig(path=str(tools_dir), template="belle"), torch.device("cpu")
    )
    stepper = BatchScheduler(
        served.model, num_slots=4, max_context=served.max_context, num_tokens=400
    )
    engine = TransformersEngine(stepper, max_waiting=32)
    yield CompletionService(served, engine, SamplingDefaults())
    engine.close()


@pytest.fixture(scope="module")
def client(answerer: CompletionService) -> Iterator[openai.OpenAI]:
    server = Server({"tiny": Here(answerer)})
    yield server.client()
    server.close()


def ask(client: openai.OpenAI, **fields: Any) -> Any:  # noqa: ANN401
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS, "max_tokens": 400}
    return client.chat.completions.create(**(asked | fields))


def check_call(call: Any) -> None:  # noqa: ANN401
    assert call.type == "function"
    assert call.id.startswith("call_")
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("seed", range(4))
def test_calls_that_are_required_keep_their_schemas(client: openai.OpenAI, seed: int) -> None:
    answer = ask(client, tool_choice="required", n=4, seed=seed, temperature=1.5)
    for choice in answer.choices:
        assert choice.message.content is None
        assert choice.message.tool_calls
        # A model of random weights may go on and on; the last call may then be cut.
        is_cut = choice.finish_reason == "length"
        assert choice.finish_reason == ("length" if is_cut else "tool_calls")
        for call in choice.message.tool_calls[: -1 if is_cut else None]:
            check_call(call)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", list(SCHEMAS))
@pytest.mark.parametrize("stream", [False, True])
def test_tool_that_is_named_is_called_once(
    client: openai.OpenAI, name: str, *, stream: bool
) -> None:
    fields: dict[str, Any] = {
        "tool_choice": {"type": "function", "function": {"name": name}},
        "seed": 3,
    }
    if stream:
        with client.chat.completions.stream(
            model="tiny", messages=ASK, tools=TOOLS, **fields
        ) as events:
            answer: Any = events.get_final_completion()
    else:
        answer = ask(client, **fields)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == name
    check_call(call)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert not answer.choices[0].message.content


def test_calls_are_several_only_where_they_may_be(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "tools": [tool for tool in TOOLS if tool["function"]["name"] == "now"],
        "temperature": 2,
        "seed": 0,
        "n": 16,
        "max_tokens": 200,
    }

    def numbers(choice: object, **more: Any) -> set[int]:  # noqa: ANN401
        answer = ask(client, tool_choice=choice, **fields, **more)
        return {len(one.message.tool_calls) for one in answer.choices}

    assert max(numbers("required")) > 1
    assert numbers("required", parallel_tool_calls=False) == {1}
    # A function that is named is called once.
    assert numbers({"type": "function", "function": {"name": "now"}}) == {1}


def test_call_streamed_is_named_first_and_is_the_call_at_once(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "temperature": 0,
        "parallel_tool_calls": False,
    }
    whole = ask(client, **fields).choices[0].message.tool_calls[0].function
    deltas = [
        delta
        for chunk in ask(client, stream=True, **fields)
        for delta in chunk.choices[0].delta.tool_calls or []
    ]
    first = deltas[0].model_dump(exclude_unset=True)
    assert first.pop("id").startswith("call_")
    assert first == {
        "index": 0,
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert len(deltas) > 4
    for delta in deltas[1:]:
        assert delta.model_dump(exclude_unset=True).keys() == {"index", "function"}
        assert delta.function.model_dump(exclude_unset=True).keys() == {"arguments"}
    assert "".join(delta.function.arguments for delta in deltas) == whole.arguments


def test_call_that_is_cut_has_what_came_so_far(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "temperature": 0,
    }
    whole = ask(client, **fields, parallel_tool_calls=False)
    count = whole.usage.completion_tokens
    for max_tokens in range(1, count - 1, 1 + count // 8):
        choice = ask(client, **fields, max_tokens=max_tokens).choices[0]
        assert choice.finish_reason == "length"
        assert not choice.message.content
        for call in choice.message.tool_calls or []:
            told = whole.choices[0].message.tool_calls[0].function.arguments
            assert told.startswith(call.function.arguments)


def test_answer_with_tools_may_be_text(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=30, n=8, seed=1, temperature=1.2)
    texts = [choice.message.content for choice in answer.choices]
    assert any(texts)
    for choice in answer.choices:
        assert choice.message.tool_calls is None
        assert "<tool_call>" not in choice.message.content
        assert choice.finish_reason in {"stop", "length"}


def test_tools_that_may_not_be_called_change_nothing(client: openai.OpenAI) -> None:
    plain = ask(client, tools=openai.omit, max_tokens=20, temperature=0)
    none = ask(client, tool_choice="none", max_tokens=20, temperature=0)
    assert none.choices[0].message == plain.choices[0].message
    assert none.usage == plain.usage


def test_text_keeps_its_schema_where_tools_are_not_called(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"good": {"type": "boolean"}},
        "required": ["good"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "said", "schema": schema}}
    answer = ask(client, response_format=form, n=8, seed=2, temperature=1.5)
    kinds: set[str] = set()
    for choice in answer.choices:
        if choice.message.tool_calls:
            kinds.add("calls")
            assert choice.message.content is None
        else:
            kinds.add("text")
            jsonschema.validate(json.loads(choice.message.content), schema)
    assert kinds == {"calls", "text"}


def test_conversation_goes_on_behind_a_call(client: openai.OpenAI) -> None:
    called = ask(client, tool_choice="required", parallel_tool_calls=False, seed=1)
    said = called.choices[0].message
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "12 degrees"}
    for turn in (said, said.model_dump()):
        answer = ask(client, messages=[*ASK, turn, result], max_tokens=5)
        assert answer.usage.prompt_tokens > called.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "problem", "param"),
    [
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {
                                "type": "object",
                                "properties": {"a": {"type": "nothing"}},
                            },
                        },
                    }
                ]
            },
            "tools: f: the schema can't be used",
            "tools",
        ),
        (
            {"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "1"}]},
            "'x' is no call",
            "messages.1.tool_call_id",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "function g not found",
            "tool_choice",
        ),
        (
            {"tools": openai.omit, "tool_choice": "required"},
            "required, but there are no tools",
            "tool_choice",
        ),
        ({"messages": [{"role": "user", "content": "fox " * 9000}]}, "is 4096 tokens", "messages"),
    ],
)
def test_refusal_says_what_is_wrong(
    client: openai.OpenAI, fields: dict[str, Any], problem: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    body: Any = caught.value.body
    assert problem in body["message"]
    assert body["param"] == param
