"""`/v1/completions` with lists of prompts, echoes, and log-probabilities of the prompt."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion, CompletionChoice

from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.model import ServedModel
from tests.serve.engine.test_scheduler import by_transformers
from tests.serve.http.test_routes import Here, Server

TEXTS = ["the fox", "人民日报 over the dog", "the"]


@pytest.fixture(scope="module")
def server(answerer: CompletionService) -> Iterator[Server]:
    server = Server({"tiny": Here(answerer)})
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def complete(client: openai.OpenAI, prompt: Any, **fields: Any) -> Completion:  # noqa: ANN401
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0, **fields}
    return client.completions.create(prompt=prompt, **asked)


def own_logprobs(served: ServedModel, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities of all ids after each of some, (T, V)."""
    with torch.inference_mode():
        logits_TV = served.model(input_ids=torch.tensor([ids])).logits[0]
    return logits_TV[:, : len(served.tokenizer)].log_softmax(1)


def test_prompts_of_a_list_are_completed_as_they_are_alone(
    client: openai.OpenAI, served: ServedModel
) -> None:
    alone = [complete(client, text) for text in TEXTS]
    wanted = [one.choices[0].text for one in alone]
    together = complete(client, TEXTS)
    assert [choice.text for choice in together.choices] == wanted
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(
        one.usage.prompt_tokens for one in alone if one.usage is not None
    )
    ids = served.encode_texts(TEXTS)
    assert [choice.text for choice in complete(client, ids).choices] == wanted
    streamed = [""] * 3
    for chunk in client.completions.create(
        model="tiny", prompt=TEXTS, max_tokens=4, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == wanted


def test_choices_of_a_prompt_follow_each_other(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"temperature": 1.5, "seed": 3, "n": 2}
    first, second = (complete(client, text, **asked) for text in TEXTS[:2])
    both = complete(client, TEXTS[:2], **asked)
    assert [choice.text for choice in both.choices] == [
        choice.text for choice in (*first.choices, *second.choices)
    ]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("as_ids", [False, True])
def test_echoed_prompt_has_the_models_own_logprobs(
    client: openai.OpenAI, served: ServedModel, text: str, *, as_ids: bool
) -> None:
    ids = served.encode_texts([text])[0]
    answer = complete(client, ids if as_ids else text, echo=True, logprobs=3, max_tokens=1)
    choice = answer.choices[0]
    found = choice.logprobs
    assert found is not None
    assert choice.text.startswith(text)
    values, likeliest = found.token_logprobs or [], found.top_logprobs or []
    # Exactly one entry follows those of the prompt, also if the token only ends the text.
    assert len(values) == len(likeliest) == len(ids) + 1
    assert (values[0], likeliest[0]) == (None, None)
    wanted_TV = own_logprobs(served, ids)
    for place, token in enumerate(ids[1:], start=1):
        row_V = wanted_TV[place - 1]
        assert values[place] == pytest.approx(float(row_V[token]), abs=1e-5)
        top = row_V.topk(3).values.tolist()
        assert sorted(likeliest[place].values(), reverse=True)[:3] == pytest.approx(top, abs=1e-5)
        is_likeliest = int(row_V.argmax()) == token
        assert (max(likeliest[place].values()) == values[place]) == is_likeliest


def places_of(choice: CompletionChoice) -> list[tuple[str, int]]:
    assert choice.logprobs is not None
    return list(zip(choice.logprobs.tokens or [], choice.logprobs.text_offset or [], strict=True))


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_the_places_of_tokens_in_the_text(
    client: openai.OpenAI, *, echo: bool, stream: bool
) -> None:
    fields: dict[str, Any] = {"echo": echo, "logprobs": 0, "max_tokens": 12, "stream": stream}
    answer: Any = complete(client, TEXTS[1], **fields)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    places = [place for choice in choices if choice.logprobs for place in places_of(choice)]
    assert len(places) >= 12
    for token, offset in places:
        if token.startswith("bytes:"):
            assert 0 <= offset <= len(text)
        else:
            assert text[offset:].startswith(token.lstrip() if offset == 0 else token) or (
                token in {"</s>", "<s>"}
            )


def test_tokens_that_are_parts_of_a_character_have_their_bytes(
    client: openai.OpenAI, served: ServedModel
) -> None:
    text = "\N{FOX FACE}"
    assert len(served.encode_texts([text])[0]) >= 4
    choice = complete(client, text, echo=True, logprobs=0, max_tokens=1).choices[0]
    tokens = [token for token, _ in places_of(choice)][:-1]
    parts = "".join(token.removeprefix("bytes:") for token in tokens if "bytes:" in token)
    assert bytes.fromhex(parts.replace("\\x", "")) == text.encode()
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "the fox"}],
        logprobs=True,
        top_logprobs=20,
        max_tokens=4,
    )
    content = chat.choices[0].logprobs
    assert content is not None
    for one in (top for token in content.content or [] for top in token.top_logprobs):
        assert one.bytes
        known = bytes(one.bytes)
        if one.token.startswith("bytes:"):
            assert known == bytes.fromhex(one.token.removeprefix("bytes:").replace("\\x", ""))
        else:
            assert known == one.token.encode()


def test_no_likely_token_is_lost_by_its_text(client: openai.OpenAI) -> None:
    choice = complete(client, TEXTS, echo=True, logprobs=20, max_tokens=8).choices[0]
    assert choice.logprobs is not None
    for found in (choice.logprobs.top_logprobs or [])[1:]:
        assert len(found) in {20, 21}


@pytest.mark.parametrize("text", TEXTS)
def test_echo_alone_scores_without_generating(client: openai.OpenAI, text: str) -> None:
    answer = complete(client, text, echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    one = complete(client, text, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    assert answer.choices[0].logprobs is not None
    assert one is not None
    assert answer.choices[0].logprobs.token_logprobs == (one.token_logprobs or [])[:-1]
    with pytest.raises(openai.BadRequestError, match="only allowed with echo"):
        complete(client, text, max_tokens=0)


def test_completion_continues_the_text_of_its_prompt(
    client: openai.OpenAI, served: ServedModel
) -> None:
    ids = served.encode_texts(["the quick"])[0]
    told = by_transformers(served.model, tuple(ids), 8)
    told = told[: told.index(1)] if 1 in told else told
    wanted = served.tokenizer.decode([*ids, *told], skip_special_tokens=True)
    answer = complete(client, "the quick", max_tokens=8)
    assert "the quick" + answer.choices[0].text == wanted
    assert complete(client, "the quick", max_tokens=8, echo=True).choices[0].text == wanted


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "prompt: got an empty list"),
        ([[]], "the prompt has no tokens"),
        (["a", [5]], "prompt.1: expected all strings or all lists"),
        ([[5], [5, "x"]], "prompt.1.1: expected a token ID"),
        ([[5], [100_000]], "token id 100000 is outside the vocabulary"),
        (["a"] * 257, "prompt: got 257 items, expected at most 256"),
        (["a"] * 40, "at most 36 can be generated and queued at a time"),
        ({"text": "a"}, "prompt: got an object"),
    ],
)
def test_prompts_that_are_none_are_refused(
    client: openai.OpenAI, prompt: object, problem: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=problem):
        complete(client, prompt)
