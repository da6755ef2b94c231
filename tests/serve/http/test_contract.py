"""What OpenAI's own client may ask for, and what it then finds."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.errors import BusyError, EngineError
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.http.keys import ApiKeys, make_key
from tests.serve.http.test_routes import FOX, Failing, Here, Server

KEY, LINE = make_key()


@pytest.fixture(scope="module")
def server(answerer: CompletionService) -> Iterator[Server]:
    server = Server(
        {
            "tiny": Here(answerer),
            "busy": Failing(BusyError("9 requests are waiting already"), 0),
            "broken": Failing(EngineError("the engine has failed"), 0),
            "buggy": Failing(ZeroDivisionError("secret of the house"), 0),
        },
        ApiKeys((bytes.fromhex(LINE),)),
        limits=RequestLimits(body_bytes=2**16),
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client(KEY)


def ask(client: openai.OpenAI, **fields: Any) -> ChatCompletion:  # noqa: ANN401
    asked: dict[str, Any] = {"model": "tiny", "messages": FOX, "temperature": 0, **fields}
    return client.chat.completions.create(**asked)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_bound_the_answer_and_its_end_says_so(client: openai.OpenAI, name: str) -> None:
    answer = ask(client, **{name: 5})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_stop_as_a_text_and_in_a_list_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=30).choices[0].message.content
    assert whole
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    before = whole[: whole.index(stop)]
    for given in (stop, [stop], ["never there", stop]):
        answer = ask(client, max_tokens=30, stop=given)
        assert answer.choices[0].message.content == before
        assert answer.choices[0].finish_reason == "stop"
        asked: Any = {"model": "tiny", "messages": FOX, "temperature": 0, "max_tokens": 30}
        chunks = list(client.chat.completions.create(**asked, stop=given, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_equal_seeds_draw_equal_answers_and_others_draw_others(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str | None]:
        answer = ask(client, temperature=1.5, seed=seed, n=3, max_tokens=20)
        return [choice.message.content for choice in answer.choices]

    first = draw(7)
    assert first == draw(7)
    assert first != draw(8)
    assert len(set(first)) == 3


def test_usage_comes_with_a_stream_where_it_is_asked_for_alone(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": FOX, "max_tokens": 4, "stream": True}
    plain = list(client.chat.completions.create(**asked))
    assert all(chunk.usage is None for chunk in plain)
    options: Any = {"include_usage": True}
    counted = list(client.chat.completions.create(**asked, stream_options=options))
    assert [bool(chunk.usage) for chunk in counted] == [False] * (len(counted) - 1) + [True]
    assert counted[-1].choices == []
    completions = list(
        client.completions.create(
            model="tiny", prompt="the", max_tokens=4, stream=True, stream_options=options
        )
    )
    assert completions[-1].usage is not None
    assert completions[-1].usage.prompt_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_one_a_token_and_come_only_where_asked_for(
    client: openai.OpenAI, *, stream: bool
) -> None:
    asked: Any = {"model": "tiny", "messages": FOX, "max_tokens": 6, "temperature": 0}
    asked |= {"logprobs": True, "stream": stream}
    answer: Any = client.chat.completions.create(**asked)
    choices = [one.choices[0] for one in answer] if stream else [answer.choices[0]]
    told = [one for c in choices if c.logprobs for one in c.logprobs.content]
    assert len(told) == 6
    assert all(one.logprob <= 0 and one.top_logprobs == [] for one in told)
    assert ask(client, max_tokens=2).choices[0].logprobs is None


def test_async_client_streams(server: Server, client: openai.OpenAI) -> None:
    async def main() -> str:
        url = f"http://127.0.0.1:{server.port}/v1"
        one = openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0)
        asked: Any = {"model": "tiny", "messages": FOX, "temperature": 0, "max_tokens": 12}
        chunks = await one.chat.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert asyncio.run(main()) == ask(client, max_tokens=12).choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"max_tokens": "many"}, openai.BadRequestError, "invalid_type"),
        ({"model": "none"}, openai.NotFoundError, "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 2**16}]}, openai.APIStatusError, None),
        ({"model": "busy"}, openai.RateLimitError, "rate_limit_exceeded"),
        ({"model": "broken"}, openai.InternalServerError, None),
        ({"model": "buggy"}, openai.InternalServerError, None),
    ],
)
def test_errors_are_of_the_clients_classes(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIError], code: str | None
) -> None:
    with pytest.raises(error) as caught:
        ask(client, **fields)
    assert caught.value.code == code
    # What went wrong inside is for the log.
    assert "secret" not in str(caught.value)


def test_wrong_key_is_an_authentication_error(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(server.client(KEY + "x"))
    assert caught.value.code == "invalid_api_key"


def test_client_that_may_ask_again_does_so_by_itself(server: Server) -> None:
    again = server.client(KEY).with_options(max_retries=1)
    with pytest.raises(openai.RateLimitError) as caught:
        again.chat.completions.create(model="busy", messages=FOX)
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "1"
