"""The same requests to both engines: what must be equal is, and each keeps its promises."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai.types import CompletionChoice

from tests.serve.http.test_routes import Server
from tests.serve.http.test_tools import ASK, SCHEMAS, TOOLS
from tests.serve.vllm.conftest import (
    ENGINES,
    NEEDS_VLLM,
    NUM_SLOTS,
    NUM_WAITING,
    Served,
    close,
    load,
)

pytestmark = NEEDS_VLLM

NEAR = 1e-4
"""Difference of log-probabilities below which either of two tokens may be the likeliest."""

FOX: Any = [{"role": "user", "content": "the fox"}]
DEMO = Path("demo/model")


def prompts(number: int, num_ids: int = 400) -> list[list[int]]:
    generator = random.Random(0)
    return [
        [generator.randrange(2, num_ids) for _ in range(generator.randrange(1, 48))]
        for _ in range(number)
    ]


def complete(client: openai.OpenAI, engine: str, prompt: Any, **fields: Any) -> CompletionChoice:  # noqa: ANN401
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 24, **fields}
    return client.completions.create(model=engine, prompt=prompt, **asked).choices[0]


def answer_both(client: openai.OpenAI, prompt: Any, **fields: Any) -> list[CompletionChoice]:  # noqa: ANN401
    return [complete(client, engine, prompt, **fields) for engine in ENGINES]


def check_same(own: CompletionChoice, other: CompletionChoice) -> None:
    """Check that two greedy answers differ only behind a place where two tokens are as likely."""
    assert own.logprobs is not None
    assert other.logprobs is not None
    tokens, others = own.logprobs.tokens or [], other.logprobs.tokens or []
    found = (
        place for place, pair in enumerate(zip(tokens, others, strict=False)) if len({*pair}) > 1
    )
    place = next(found, None)
    if place is None:
        assert (own.text, own.finish_reason) == (other.text, other.finish_reason)
        return
    likeliest = sorted((own.logprobs.top_logprobs or [])[place].values())
    assert likeliest[-1] - likeliest[-2] < NEAR, f"token {place} of {own.text!r}, {other.text!r}"


def test_greedy_answers_to_50_prompts_are_equal(both: Served) -> None:
    for prompt in prompts(50):
        check_same(*answer_both(both.client, prompt, logprobs=2))


@pytest.fixture(scope="module")
def demo() -> Iterator[openai.OpenAI]:
    loaded = {engine: load(DEMO, engine, num_slots=8) for engine in ENGINES}
    server = Server(dict(loaded))
    yield server.client()
    close(server, loaded)


@pytest.mark.timeout(1800)  # minutes on two busy cores
@pytest.mark.skipif(not DEMO.is_dir(), reason="no demo model: make demo")
def test_greedy_answers_of_the_demo_model_are_equal(demo: openai.OpenAI) -> None:
    for prompt in prompts(50, 49_000):
        check_same(*answer_both(demo, prompt, logprobs=2, max_tokens=16))


def test_logprobs_are_equal_to_a_thousandth_also_of_the_prompt(both: Served) -> None:
    for prompt in prompts(5):
        own, other = answer_both(both.client, prompt, echo=True, logprobs=5, max_tokens=6)
        assert own.logprobs is not None
        assert other.logprobs is not None
        assert len(own.logprobs.tokens or []) == len(prompt) + 6
        assert own.logprobs.tokens == other.logprobs.tokens
        pairs = zip(
            (own.logprobs.token_logprobs or [])[1:],
            (other.logprobs.token_logprobs or [])[1:],
            strict=True,
        )
        for one, two in pairs:
            assert one == pytest.approx(two, abs=1e-3)
        tops = zip(
            (own.logprobs.top_logprobs or [])[1:],
            (other.logprobs.top_logprobs or [])[1:],
            strict=True,
        )
        for one, two in tops:
            assert sorted(one.values()) == pytest.approx(sorted(two.values()), abs=1e-3)


def test_chat_has_the_same_text_and_usage_streamed_or_not(both: Served) -> None:
    told = []
    for engine in ENGINES:
        asked: dict[str, Any] = {"model": engine, "messages": FOX, "temperature": 0}
        whole = both.client.chat.completions.create(**asked, max_tokens=20)
        chunks = both.client.chat.completions.create(**asked, max_tokens=20, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        told.append((text, whole.usage))
    assert told[0] == told[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_seeds_draw_equal_answers_and_others_draw_others(both: Served, engine: str) -> None:
    def draw(seed: int) -> list[str | None]:
        answer = both.client.chat.completions.create(
            model=engine, messages=FOX, temperature=1.5, seed=seed, n=3, max_tokens=20
        )
        return [choice.message.content for choice in answer.choices]

    first = draw(7)
    assert first == draw(7)
    assert first != draw(8)
    assert len(set(first)) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_ends_the_answer_before_it(both: Served, engine: str) -> None:
    whole = complete(both.client, engine, "the quick brown", max_tokens=40).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    stopped = complete(both.client, engine, "the quick brown", max_tokens=40, stop=[stop])
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"extra_body": {"repetition_penalty": 1.7}},
        {"logit_bias": {"17": 8.0, "33": -100.0}},
        {"logit_bias": {"21": 100.0}},
        {"frequency_penalty": 0.7, "presence_penalty": 0.7, "logit_bias": {"40": 5.0}},
    ],
)
def test_penalties_and_bias_change_answers_alike(both: Served, fields: dict[str, Any]) -> None:
    changed = 0
    for prompt in prompts(8):
        own, other = answer_both(both.client, prompt, logprobs=2, **fields)
        assert own.text == other.text
        changed += own.text != complete(both.client, "transformers", prompt).text
    assert changed


@pytest.mark.parametrize("engine", ENGINES)
def test_tiny_share_of_probability_leaves_only_the_likeliest_token(
    both: Served, engine: str
) -> None:
    for narrow in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        for prompt in prompts(3):
            drawn = complete(both.client, engine, prompt, temperature=1.5, **narrow)
            assert drawn.text == complete(both.client, engine, prompt).text


def test_schema_is_kept_and_greedy_answers_are_equal(both: Served) -> None:
    for name in ("weather", "search"):
        form: Any = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name]}}
        texts = []
        for engine in ENGINES:
            answer = both.client.chat.completions.create(
                model=engine, messages=FOX, temperature=0, max_tokens=200, response_format=form
            )
            texts.append(answer.choices[0].message.content or "")
            assert answer.choices[0].finish_reason == "stop"
            jsonschema.validate(json.loads(texts[-1]), SCHEMAS[name])
        assert texts[0] == texts[1]


def test_required_tools_are_called_with_equal_arguments(both: Served) -> None:
    calls: list[list[tuple[str, str]]] = []
    for engine in ENGINES:
        answer = both.client.chat.completions.create(
            model=engine,
            messages=ASK,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=300,
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        found: Any = answer.choices[0].message.tool_calls
        calls.append([(call.function.name, call.function.arguments) for call in found])
        for name, arguments in calls[-1]:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert calls[0] == calls[1]


def test_text_beside_tools_ends_alike(both: Served) -> None:
    told = []
    for engine in ENGINES:
        answer = both.client.chat.completions.create(
            model=engine, messages=ASK, tools=TOOLS, temperature=0, max_tokens=60
        )
        told.append((answer.choices[0].message.content, answer.choices[0].finish_reason))
    assert told[0] == told[1]


def test_context_limit_is_the_same(both: Served) -> None:
    full = (prompts(1)[0] * 4096)[:4095]
    for own, other in [answer_both(both.client, full, logprobs=2, max_tokens=9)]:
        assert (own.finish_reason, other.finish_reason) == ("length", "length")
        assert own.text == other.text
    messages = []
    for engine in ENGINES:
        with pytest.raises(openai.BadRequestError) as caught:
            complete(both.client, engine, [*full, 7])
        messages.append(caught.value.message.replace(engine, "MODEL"))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_canceled_requests_free_their_slots(both: Served, engine: str) -> None:
    asked: dict[str, Any] = {"model": engine, "prompt": "x", "max_tokens": 4000, "temperature": 0}
    asked |= {"logit_bias": {"1": -100.0}}

    async def fill_and_leave() -> None:
        address = str(both.client.base_url)
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            one_too_many = NUM_SLOTS + NUM_WAITING + 1
            tasks = [
                asyncio.create_task(client.completions.create(**asked)) for _ in range(one_too_many)
            ]
            refused, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert [type(task.exception()) for task in refused] == [openai.RateLimitError]
            for task in rest:
                task.cancel()
            await asyncio.wait(rest)

    for _ in range(2):
        asyncio.run(fill_and_leave())
        # Each of them would have run for 4000 tokens, and most would still wait.
        patient = both.client.with_options(max_retries=10, timeout=30)
        assert complete(patient, engine, "the quick", max_tokens=2).finish_reason == "length"


def test_vectors_are_refused_with_what_to_do(both: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=r"replicas\.engine=transformers"):
        both.client.embeddings.create(model="vllm", input="x")
