"""LiteLLM's SDK: https://docs.litellm.ai/docs/providers/openai_compatible."""

import asyncio
import json
import os
from typing import Any

# Else it asks a server for a list of prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from steps import QUESTION, Endpoint, error_of, joined, provoke, run

MESSAGES: Any = [{"role": "user", "content": QUESTION}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
            },
        },
    }
]


def ask(endpoint: Endpoint, **fields: Any) -> Any:
    asked: dict[str, Any] = {
        "model": f"openai/{endpoint.model}",
        "api_base": endpoint.url,
        "api_key": endpoint.key,
        "messages": MESSAGES,
        "max_retries": 0,
    }
    return litellm.completion(**(asked | fields))


def completion(endpoint: Endpoint) -> object:
    response: Any = litellm.completion(
        model=f"openai/{endpoint.model}",
        api_base=endpoint.url,
        api_key=endpoint.key,
        messages=[{"role": "user", "content": QUESTION}],
    )
    assert response.usage.completion_tokens > 0
    return response.choices[0].message.content


def completion_stream(endpoint: Endpoint) -> object:
    chunks = ask(endpoint, stream=True, max_tokens=20)
    return joined([chunk.choices[0].delta.content for chunk in chunks])


def completion_stream_with_usage(endpoint: Endpoint) -> object:
    chunks = list(ask(endpoint, stream=True, stream_options={"include_usage": True}, max_tokens=9))
    assert chunks[-1].usage.completion_tokens > 0
    return chunks[-1].usage.completion_tokens


def completion_async(endpoint: Endpoint) -> object:
    response: Any = asyncio.run(
        litellm.acompletion(
            model=f"openai/{endpoint.model}",
            api_base=endpoint.url,
            api_key=endpoint.key,
            messages=MESSAGES,
            max_tokens=12,
        )
    )
    return response.choices[0].message.content


def completion_tools(endpoint: Endpoint) -> object:
    response = ask(endpoint, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    call = response.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    results = [
        {"role": "tool", "tool_call_id": one.id, "name": one.function.name, "content": "sunny"}
        for one in response.choices[0].message.tool_calls
    ]
    messages = [*MESSAGES, response.choices[0].message, *results]
    answer = ask(endpoint, tools=TOOLS, messages=messages, max_tokens=12)
    return call.function.arguments, answer.choices[0].message.content


def text_completion(endpoint: Endpoint) -> object:
    response: Any = litellm.text_completion(
        model=f"text-completion-openai/{endpoint.model}",
        api_base=endpoint.url,
        api_key=endpoint.key,
        prompt="Once upon a time",
        max_tokens=12,
    )
    return response.choices[0].text


def embedding(endpoint: Endpoint) -> object:
    response: Any = litellm.embedding(
        model=f"openai/{endpoint.model}",
        api_base=endpoint.url,
        api_key=endpoint.key,
        input=["good morning from litellm", QUESTION],
    )
    assert len(response.data) == 2
    return len(response.data[0]["embedding"])


def responses(endpoint: Endpoint) -> object:
    response: Any = litellm.responses(
        model=f"openai/{endpoint.model}",
        api_base=endpoint.url,
        api_key=endpoint.key,
        input=QUESTION,
        max_output_tokens=20,
    )
    return response.output[0].content[0].text


def error_bad_request(endpoint: Endpoint) -> object:
    error = error_of(lambda: ask(endpoint, temperature=9), litellm.BadRequestError)
    assert "temperature" in str(error)
    return str(error)


def error_not_found(endpoint: Endpoint) -> object:
    return str(error_of(lambda: ask(endpoint, model="openai/gpt-9"), litellm.NotFoundError))


def error_authentication(endpoint: Endpoint) -> object:
    return str(error_of(lambda: ask(endpoint, api_key="sk-wrong"), litellm.AuthenticationError))


def error_context_window(endpoint: Endpoint) -> object:
    messages = [{"role": "user", "content": "fox " * 5000}]
    kind = litellm.ContextWindowExceededError
    return str(error_of(lambda: ask(endpoint, messages=messages), kind))


def error_rate_limit(endpoint: Endpoint) -> object:
    return str(provoke(lambda: ask(endpoint), litellm.RateLimitError))


if __name__ == "__main__":
    run(
        completion,
        completion_stream,
        completion_stream_with_usage,
        completion_async,
        completion_tools,
        text_completion,
        embedding,
        responses,
        error_bad_request,
        error_not_found,
        error_authentication,
        error_context_window,
        error_rate_limit,
    )
