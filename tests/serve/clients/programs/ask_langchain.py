"""LangChain: https://docs.langchain.com/oss/python/integrations/chat/openai."""

from typing import Any, Literal

import openai
from langchain.agents import create_agent
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from steps import QUESTION, Endpoint, error_of, joined, run


class Trip(BaseModel):
    """A trip to a city."""

    city: Literal["Paris", "Rome"] = Field(description="Where to go")
    days: int = Field(description="For how long", ge=1, le=9)


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Get the weather of a city."""
    return f"sunny in {city}"


def connect(endpoint: Endpoint, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=endpoint.model, base_url=endpoint.url, api_key=endpoint.key, max_retries=0, **fields
    )


def invoke(endpoint: Endpoint) -> object:
    llm = ChatOpenAI(model=endpoint.model, base_url=endpoint.url, api_key=endpoint.key)
    message = llm.invoke([("system", "Talk like a pirate."), ("human", QUESTION)])
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] > 0
    return message.text


def invoke_with_temperature(endpoint: Endpoint) -> object:
    llm = connect(endpoint, temperature=0, max_tokens=12, timeout=60, seed=1, stop=["###"])
    return llm.invoke(QUESTION).text


def stream(endpoint: Endpoint) -> object:
    llm = connect(endpoint, max_tokens=20)
    chunks = list(llm.stream(QUESTION))
    return joined([chunk.text for chunk in chunks])


def stream_with_usage(endpoint: Endpoint) -> object:
    llm = connect(endpoint, max_tokens=20, stream_usage=True)
    whole: Any = None
    for chunk in llm.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.usage_metadata["output_tokens"] > 0
    return whole.usage_metadata


def batch(endpoint: Endpoint) -> object:
    return [message.text for message in connect(endpoint, max_tokens=8).batch(["Rome?", "Paris?"])]


def bind_tools(endpoint: Endpoint) -> object:
    llm = connect(endpoint)
    bound = llm.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    message = bound.invoke(QUESTION)
    call = message.tool_calls[0]
    assert call["name"] == "get_weather"
    assert call["args"]["city"] in ("Paris", "Rome")
    results = [ToolMessage("sunny", tool_call_id=one["id"]) for one in message.tool_calls]
    answer = llm.bind_tools([get_weather]).invoke(
        [HumanMessage(QUESTION), message, *results], max_tokens=12
    )
    return call["args"], answer.text


def stream_tools(endpoint: Endpoint) -> object:
    llm = connect(endpoint).bind_tools([get_weather], tool_choice="get_weather")
    whole: Any = None
    for chunk in llm.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"]["city"] in ("Paris", "Rome")
    return whole.tool_calls[0]["args"]


def structured_output(endpoint: Endpoint) -> object:
    trip = connect(endpoint).with_structured_output(Trip).invoke(QUESTION)
    assert isinstance(trip, Trip)
    return trip.model_dump()


def structured_output_by_a_call(endpoint: Endpoint) -> object:
    llm = connect(endpoint).with_structured_output(Trip, method="function_calling")
    trip = llm.invoke(QUESTION)
    assert isinstance(trip, Trip)
    return trip.model_dump()


def agent(endpoint: Endpoint) -> object:
    made = create_agent(
        model=connect(endpoint, max_tokens=20),
        tools=[get_weather],
        system_prompt="You are a helpful assistant",
    )
    asked: Any = {"messages": [{"role": "user", "content": "what is the weather in Rome"}]}
    return made.invoke(asked)["messages"][-1].text


def responses_api(endpoint: Endpoint) -> object:
    llm = connect(endpoint, use_responses_api=True, max_tokens=20)
    return llm.invoke(QUESTION).text


def completions(endpoint: Endpoint) -> object:
    llm = OpenAI(model=endpoint.model, base_url=endpoint.url, api_key=endpoint.key, max_tokens=12)
    return llm.invoke("Once upon a time"), llm.batch(["Once upon a time", "The end"])


def completions_stream(endpoint: Endpoint) -> object:
    llm = OpenAI(model=endpoint.model, base_url=endpoint.url, api_key=endpoint.key, max_tokens=20)
    return joined(list(llm.stream("Once upon a time")))


def embeddings(endpoint: Endpoint) -> object:
    # Else it cuts texts with the tokenizer of OpenAI's models and sends their token ids.
    embedder = OpenAIEmbeddings(
        model=endpoint.model,
        base_url=endpoint.url,
        api_key=endpoint.key,
        check_embedding_ctx_length=False,
    )
    vectors = embedder.embed_documents([QUESTION, "Rome"])
    assert len(vectors) == 2
    query = embedder.embed_query(QUESTION)
    assert all(abs(a - b) < 1e-5 for a, b in zip(query, vectors[0], strict=True))
    return len(query)


def error_of_an_unknown_model(endpoint: Endpoint) -> object:
    llm = ChatOpenAI(model="gpt-9", base_url=endpoint.url, api_key=endpoint.key)
    return error_of(lambda: llm.invoke(QUESTION), openai.NotFoundError).message


def error_of_a_long_prompt(endpoint: Endpoint) -> object:
    return str(error_of(lambda: connect(endpoint).invoke("fox " * 5000), ContextOverflowError))


if __name__ == "__main__":
    run(
        invoke,
        invoke_with_temperature,
        stream,
        stream_with_usage,
        batch,
        bind_tools,
        stream_tools,
        structured_output,
        structured_output_by_a_call,
        agent,
        responses_api,
        completions,
        completions_stream,
        embeddings,
        error_of_an_unknown_model,
        error_of_a_long_prompt,
    )
