"""LlamaIndex: OpenAILike and OpenAILikeEmbedding, for servers other than OpenAI's."""

from typing import Any, Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from steps import QUESTION, Endpoint, joined, run


class Trip(BaseModel):
    """A trip to a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Get the weather of a city."""
    return f"sunny in {city}"


def connect(endpoint: Endpoint, **fields: Any) -> OpenAILike:
    return OpenAILike(
        model=endpoint.model,
        api_base=endpoint.url,
        api_key=endpoint.key,
        context_window=4096,
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        **fields,
    )


def complete(endpoint: Endpoint) -> object:
    llm = OpenAILike(
        model=endpoint.model,
        api_base=endpoint.url,
        api_key=endpoint.key,
        context_window=4096,
        is_chat_model=True,
        is_function_calling_model=True,
    )
    return str(llm.complete(QUESTION))


def chat(endpoint: Endpoint) -> object:
    messages = [
        ChatMessage(role="system", content="You are a pirate with a colorful personality."),
        ChatMessage(role="user", content=QUESTION),
    ]
    return connect(endpoint).chat(messages).message.content


def stream_chat(endpoint: Endpoint) -> object:
    messages = [ChatMessage(role="user", content=QUESTION)]
    chunks = connect(endpoint, max_tokens=20).stream_chat(messages)
    return joined([chunk.delta for chunk in chunks])


def stream_complete(endpoint: Endpoint) -> object:
    chunks = connect(endpoint, max_tokens=20).stream_complete(QUESTION)
    return joined([chunk.delta for chunk in chunks])


def tools(endpoint: Endpoint) -> object:
    llm, weather = connect(endpoint), FunctionTool.from_defaults(get_weather)
    response = llm.chat_with_tools([weather], user_msg=QUESTION, tool_required=True)
    calls = llm.get_tool_calls_from_response(response)
    assert calls[0].tool_kwargs["city"] in ("Paris", "Rome")
    results = [
        ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": call.tool_id})
        for call in calls
    ]
    history = [ChatMessage(role="user", content=QUESTION), response.message, *results]
    answer = connect(endpoint, max_tokens=12).chat_with_tools([weather], chat_history=history)
    return calls[0].tool_kwargs, answer.message.content


def stream_tools(endpoint: Endpoint) -> object:
    llm, weather = connect(endpoint), FunctionTool.from_defaults(get_weather)
    *_, last = llm.stream_chat_with_tools([weather], user_msg=QUESTION, tool_required=True)
    call = llm.get_tool_calls_from_response(last)[0]
    assert call.tool_kwargs["city"] in ("Paris", "Rome")
    return call.tool_kwargs


def structured(endpoint: Endpoint) -> object:
    trip = connect(endpoint).structured_predict(Trip, PromptTemplate(QUESTION))
    assert isinstance(trip, Trip)
    return trip.model_dump()


def structured_by_a_schema(endpoint: Endpoint) -> object:
    llm = connect(endpoint, should_use_structured_outputs=True)
    trip = llm.structured_predict(Trip, PromptTemplate(QUESTION))
    assert isinstance(trip, Trip)
    return trip.model_dump()


def completions(endpoint: Endpoint) -> object:
    llm = OpenAILike(
        model=endpoint.model,
        api_base=endpoint.url,
        api_key=endpoint.key,
        context_window=4096,
        is_chat_model=False,
        max_tokens=20,
    )
    streamed = joined([chunk.delta for chunk in llm.stream_complete("Once upon a time")])
    return str(llm.complete("Once upon a time")), streamed


def embeddings(endpoint: Endpoint) -> object:
    embedder = OpenAILikeEmbedding(
        model_name=endpoint.model, api_base=endpoint.url, api_key=endpoint.key, embed_batch_size=10
    )
    vectors = embedder.get_text_embedding_batch([QUESTION, "Rome"])
    one = embedder.get_text_embedding(QUESTION)
    assert all(abs(a - b) < 1e-5 for a, b in zip(one, vectors[0], strict=True))
    return len(embedder.get_query_embedding(QUESTION))


if __name__ == "__main__":
    run(
        complete,
        chat,
        stream_chat,
        stream_complete,
        tools,
        stream_tools,
        structured,
        structured_by_a_schema,
        completions,
        embeddings,
    )
