"""OpenAI's client for Python: https://github.com/openai/openai-python."""

import asyncio
import json
from typing import Any, Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from steps import QUESTION, Endpoint, error_of, joined, provoke, run

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Trip(BaseModel):
    """A trip; its fields are bounded, so that any model comes to an end."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def connect(endpoint: Endpoint) -> OpenAI:
    return OpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=0)


def ask(endpoint: Endpoint, **fields: Any) -> Any:
    """Ask the question; fields replace those of the request."""
    asked = {"model": endpoint.model, "messages": [{"role": "user", "content": QUESTION}]}
    return connect(endpoint).chat.completions.create(**(asked | fields))


def models(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    names = [model.id for model in client.models.list()]
    assert client.models.retrieve(endpoint.model).id == endpoint.model
    return names


def chat(endpoint: Endpoint) -> object:
    client = OpenAI(base_url=endpoint.url, api_key=endpoint.key)
    completion = client.chat.completions.create(
        model=endpoint.model,
        messages=[
            {"role": "developer", "content": "Talk like a pirate."},
            {"role": "user", "content": QUESTION},
        ],
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens > 0
    return completion.choices[0].message.content


def chat_stream(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    stream = client.chat.completions.create(
        model=endpoint.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    return joined([chunk.choices[0].delta.content for chunk in chunks if chunk.choices])


def chat_stream_helper(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    messages: Any = [{"role": "user", "content": QUESTION}]
    # An answer that is cut is an error of this helper: the schema lets any model come to an end.
    with client.chat.completions.stream(
        model=endpoint.model, messages=messages, response_format=Trip
    ) as stream:
        parts = [event.delta for event in stream if event.type == "content.delta"]
        message = stream.get_final_completion().choices[0].message
    assert joined(parts) == message.content
    assert isinstance(message.parsed, Trip)
    return message.content


def chat_async(endpoint: Endpoint) -> object:
    async def ask() -> str | None:
        client = AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key)
        completion = await client.chat.completions.create(
            model=endpoint.model,
            messages=[{"role": "user", "content": QUESTION}],
            max_completion_tokens=20,
        )
        return completion.choices[0].message.content

    return asyncio.run(ask())


def chat_sampling(endpoint: Endpoint) -> object:
    client = connect(endpoint)

    def ask() -> list[str | None]:
        completion = client.chat.completions.create(
            model=endpoint.model,
            messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
            n=2,
            max_completion_tokens=12,
            temperature=0.8,
            top_p=0.9,
            frequency_penalty=0.5,
            presence_penalty=-0.5,
            logit_bias={"65": -100, "66": 1},
            logprobs=True,
            top_logprobs=3,
            seed=7,
            stop=["\n\n", "###"],
            user="reader",
        )
        content = completion.choices[1].logprobs and completion.choices[1].logprobs.content
        assert content
        assert all(len(token.top_logprobs) == 3 for token in content)
        return [choice.message.content for choice in completion.choices]

    first = ask()
    assert ask() == first, "another answer with the same seed"
    return first


def chat_other_fields(endpoint: Endpoint) -> object:
    """Send fields that programs set for OpenAI's own models."""
    client = connect(endpoint)
    completion = client.chat.completions.create(
        model=endpoint.model,
        messages=[{"role": "user", "content": QUESTION, "name": "reader"}],
        max_completion_tokens=12,
        metadata={"purpose": "test"},
        modalities=["text"],
        parallel_tool_calls=True,
        prompt_cache_key="reader",
        reasoning_effort="low",
        response_format={"type": "text"},
        safety_identifier="reader",
        service_tier="auto",
        store=False,
        tool_choice="auto",
        tools=[TOOL],
        verbosity="medium",
        extra_body={"field_of_another_server": 1},
    )
    return completion.choices[0].message.content


def chat_prefill(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    completion = client.chat.completions.create(
        model=endpoint.model,
        messages=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "I would go to"},
        ],
        max_tokens=12,
    )
    return completion.choices[0].message.content


def chat_roles(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    completion = client.chat.completions.create(
        model=endpoint.model,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "Paris."},
            {"role": "system", "content": "Be long."},
            {"role": "user", "content": "Why?"},
        ],
        max_tokens=12,
    )
    return completion.choices[0].message.content


def chat_parse(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    completion = client.chat.completions.parse(
        model=endpoint.model,
        messages=[{"role": "user", "content": QUESTION}],
        response_format=Trip,
    )
    trip = completion.choices[0].message.parsed
    assert isinstance(trip, Trip)
    return trip.model_dump()


def chat_tools(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    messages: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
    completion = client.chat.completions.create(
        model=endpoint.model,
        messages=messages,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    message: Any = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = client.chat.completions.create(
        model=endpoint.model, messages=messages, tools=[TOOL], max_tokens=20
    )
    return call.function.arguments, answer.choices[0].message.content


def chat_tools_stream(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    messages: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
    with client.chat.completions.stream(
        model=endpoint.model,
        messages=messages,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    ) as stream:
        kind = "tool_calls.function.arguments.delta"
        parts = [event.arguments_delta for event in stream if event.type == kind]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert joined(parts) == call.function.arguments
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    return call.function.arguments


def completion(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    told = client.completions.create(model=endpoint.model, prompt="Once upon a time", max_tokens=12)
    return told.choices[0].text


def completion_stream(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    stream = client.completions.create(
        model=endpoint.model, prompt="Once upon a time", max_tokens=20, stream=True
    )
    return joined([chunk.choices[0].text for chunk in stream if chunk.choices])


def completion_lists(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    told = client.completions.create(
        model=endpoint.model, prompt=["Once upon a time", "The end"], n=2, max_tokens=8
    )
    assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
    ids = client.completions.create(
        model=endpoint.model, prompt=[[70, 71, 72], [80, 81]], max_tokens=8
    )
    assert len(ids.choices) == 2
    return [choice.text for choice in told.choices]


def completion_scores(endpoint: Endpoint) -> object:
    """Score a text: log-probabilities of the prompt, nothing generated."""
    client = connect(endpoint)
    told = client.completions.create(
        model=endpoint.model, prompt="Once upon a time", max_tokens=0, echo=True, logprobs=1
    )
    logprobs = told.choices[0].logprobs
    assert told.choices[0].text == "Once upon a time"
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "Once upon a time"
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    return logprobs.token_logprobs


def embeddings(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    one = client.embeddings.create(model=endpoint.model, input=QUESTION)
    two = client.embeddings.create(
        model=endpoint.model, input=[QUESTION, "Rome"], encoding_format="float"
    )
    assert len(two.data) == 2
    differences = zip(one.data[0].embedding, two.data[0].embedding, strict=True)
    assert all(abs(left - right) < 1e-5 for left, right in differences)
    return len(one.data[0].embedding)


def responses(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    response = client.responses.create(
        model=endpoint.model,
        instructions="You are a coding assistant that talks like a pirate.",
        input="How do I check if a Python object is an instance of a class?",
    )
    assert response.usage is not None
    assert response.usage.output_tokens > 0
    assert response.status in ("completed", "incomplete")
    return response.output_text


def responses_stream(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    stream = client.responses.create(
        model=endpoint.model,
        input=[{"role": "user", "content": QUESTION}],
        max_output_tokens=20,
        stream=True,
    )
    events: list[Any] = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert joined(deltas) == events[-1].response.output_text
    return events[-1].response.output_text


def responses_stream_helper(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    with client.responses.stream(model=endpoint.model, input=QUESTION, text_format=Trip) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert joined(deltas) == final.output_text
    assert isinstance(final.output_parsed, Trip)
    return final.output_text


def responses_parse(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    response = client.responses.parse(
        model=endpoint.model,
        input=[
            {"role": "system", "content": "Plan a trip."},
            {"role": "user", "content": QUESTION},
        ],
        text_format=Trip,
    )
    assert isinstance(response.output_parsed, Trip)
    return response.output_parsed.model_dump()


def responses_tools(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    tools: Any = [{"type": "function", **TOOL["function"]}]
    conversation: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
    response = client.responses.create(
        model=endpoint.model,
        input=conversation,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    conversation += response.output
    conversation.append(
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    )
    answer = client.responses.create(
        model=endpoint.model, input=conversation, tools=tools, max_output_tokens=20
    )
    return call.arguments, answer.output_text


def responses_tools_stream(endpoint: Endpoint) -> object:
    client = connect(endpoint)
    tools: Any = [{"type": "function", **TOOL["function"]}]
    stream = client.responses.create(
        model=endpoint.model,
        input="How is the weather in Rome?",
        tools=tools,
        tool_choice={"type": "function", "name": "get_weather"},
        stream=True,
    )
    events: list[Any] = list(stream)
    kind = "response.function_call_arguments"
    parts = [event.delta for event in events if event.type == f"{kind}.delta"]
    (whole,) = [event.arguments for event in events if event.type == f"{kind}.done"]
    assert joined(parts) == whole
    assert json.loads(whole)["city"] in ("Paris", "Rome")
    return whole


def error_of_a_wrong_key(endpoint: Endpoint) -> object:
    client = OpenAI(base_url=endpoint.url, api_key="sk-wrong", max_retries=0)
    error = error_of(client.models.list, openai.AuthenticationError)
    assert error.code == "invalid_api_key"
    return error.message


def error_of_an_unknown_model(endpoint: Endpoint) -> object:
    error = error_of(lambda: ask(endpoint, model="gpt-9"), openai.NotFoundError)
    assert (error.code, error.type) == ("model_not_found", "invalid_request_error")
    return error.message


def error_of_a_bad_field(endpoint: Endpoint) -> object:
    error = error_of(lambda: ask(endpoint, temperature=9), openai.BadRequestError)
    assert (error.param, error.type) == ("temperature", "invalid_request_error")
    return error.message


def error_of_a_long_prompt(endpoint: Endpoint) -> object:
    messages = [{"role": "user", "content": "fox " * 5000}]
    error = error_of(lambda: ask(endpoint, messages=messages), openai.BadRequestError)
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    return error.message


def error_of_too_many_requests(endpoint: Endpoint) -> object:
    error = provoke(lambda: ask(endpoint), openai.RateLimitError)
    assert int(error.response.headers["Retry-After"]) >= 1
    return error.message


if __name__ == "__main__":
    run(
        models,
        chat,
        chat_stream,
        chat_stream_helper,
        chat_async,
        chat_sampling,
        chat_other_fields,
        chat_prefill,
        chat_roles,
        chat_parse,
        chat_tools,
        chat_tools_stream,
        completion,
        completion_stream,
        completion_lists,
        completion_scores,
        embeddings,
        responses,
        responses_stream,
        responses_stream_helper,
        responses_parse,
        responses_tools,
        responses_tools_stream,
        error_of_a_wrong_key,
        error_of_an_unknown_model,
        error_of_a_bad_field,
        error_of_a_long_prompt,
        error_of_too_many_requests,
    )
