"""What a request becomes: the prompt's ids, and the text of its answers."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.encoding import EncodedConversation
from raytune_llama.serve.config import SamplingDefaults
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.errors import InvalidRequestError, UnknownModelError
from raytune_llama.serve.generation.completion import CompletionService, PreparedRequest
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.serve.protocol.completions import CompletionRequest
from raytune_llama.tokenizer.loader import encode_text
from tests.serve.engine.test_scheduler import by_transformers


def chat(*turns: str, **fields: Any) -> ChatRequest:  # noqa: ANN401
    messages = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": text}
        for number, text in enumerate(turns)
    ]
    return ChatRequest.model_validate(
        {"model": "tiny", "messages": messages, "temperature": 0, **fields}
    )


def complete(prompt: str | list[int], **fields: Any) -> CompletionRequest:  # noqa: ANN401
    return CompletionRequest.model_validate(
        {"model": "tiny", "prompt": prompt, "temperature": 0, **fields}
    )


def parts_of(answerer: CompletionService, prompt: PreparedRequest) -> list[OutputDelta]:
    async def main() -> list[OutputDelta]:
        return [part async for part in answerer.generate(prompt)]

    return asyncio.run(main())


def ids_of(prompt: PreparedRequest) -> tuple[int, ...]:
    return prompt.choices[0].generation.prompt


def texts_of(answerer: CompletionService, prompt: PreparedRequest) -> list[str]:
    texts = [""] * len(prompt.choices)
    for part in parts_of(answerer, prompt):
        texts[part.index] += part.text
    return texts


def test_chat_prompt_is_what_the_template_trains_on(
    answerer: CompletionService, served: ServedModel
) -> None:
    prompt = answerer.prepare_chat(chat("the fox", "jumps", "</s> over"))
    assert served.chat is not None
    turns = [Turn("user", "the fox"), Turn("assistant", "jumps"), Turn("user", "</s> over")]
    trained = served.chat.encode([Conversation((*turns, Turn("assistant", "the dog")))])[0]
    assert isinstance(trained, EncodedConversation)
    ids = ids_of(prompt)
    assert prompt.num_prompt_tokens == len(ids)
    assert tuple(trained.ids[: len(ids)]) == ids
    assert trained.targets[len(ids) :].all()
    # A control token that a user types is text: only the one behind the first answer is one.
    assert ids.count(1) == 1
    assert "</s> over" in served.tokenizer.decode(list(ids))


def test_completion_prompt_begins_as_transformers_begins_it_and_holds_plain_text(
    answerer: CompletionService, served: ServedModel
) -> None:
    text = "the </s> fox"
    prompt = answerer.prepare_completion(complete(text))
    # The tokenizer has a BOS token, but puts none before a text.
    assert list(ids_of(prompt)) == encode_text(served.tokenizer, [text])[0]
    plain = "the fox"
    prompt = answerer.prepare_completion(complete(plain))
    assert list(ids_of(prompt)) == served.tokenizer(plain)["input_ids"]
    assert ids_of(answerer.prepare_completion(complete([5, 6]))) == (5, 6)


def test_answer_is_the_models_own(answerer: CompletionService, served: ServedModel) -> None:
    prompt = answerer.prepare_completion(complete("the quick", max_tokens=16))
    tokens = by_transformers(served.model, ids_of(prompt), 16)
    if 1 in tokens:
        tokens = tokens[: tokens.index(1)]
    parts = parts_of(answerer, prompt)
    told = "".join(part.text for part in parts)
    whole = [*ids_of(prompt), *tokens]
    assert "the quick" + told == served.tokenizer.decode(whole, clean_up_tokenization_spaces=False)
    assert sum(part.num_tokens for part in parts) == min(len(tokens) + 1, 16)
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason in {"stop", "length"}


def test_answer_ends_before_a_stop_string(answerer: CompletionService) -> None:
    whole = texts_of(answerer, answerer.prepare_completion(complete("the", max_tokens=20)))[0]
    stop = whole[7:10]
    prompt = answerer.prepare_completion(complete("the", max_tokens=20, stop=[stop, "never there"]))
    parts = parts_of(answerer, prompt)
    assert "".join(part.text for part in parts) == whole[: whole.index(stop)]
    assert parts[-1].finish_reason == "stop"


def test_answers_to_one_request_differ_and_repeat_with_the_seed(
    answerer: CompletionService,
) -> None:
    prompt = answerer.prepare_completion(
        complete("the", n=5, seed=7, temperature=1.5, max_tokens=12)
    )
    texts = texts_of(answerer, prompt)
    assert len(set(texts)) == 5
    assert texts_of(answerer, prompt) == texts


def test_logprobs_name_the_chosen_token_among_the_likeliest(answerer: CompletionService) -> None:
    request = chat("the fox", max_tokens=4, logprobs=True, top_logprobs=3)
    parts = parts_of(answerer, answerer.prepare_chat(request))
    tokens = [token for part in parts for token in part.tokens]
    assert tokens
    for token in tokens:
        assert len(token.top_logprobs) == 3
        # The likeliest is chosen at temperature 0.
        assert token.top_logprobs[0] == (token.content, token.logprob)
        assert (token.logprob or 0.0) <= 0


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (chat("word " * 200), "is 128 tokens, including the answer"),
        (complete([399, 405]), "token id 405 is outside the vocabulary"),
        (complete("word " * 200), "is 128 tokens, including the answer"),
    ],
)
def test_request_that_cannot_be_answered_is_refused(
    answerer: CompletionService, request_: ChatRequest | CompletionRequest, problem: str
) -> None:
    readers: dict[type, Callable[[Any], PreparedRequest]] = {
        ChatRequest: answerer.prepare_chat,
        CompletionRequest: answerer.prepare_completion,
    }
    read = readers[type(request_)]
    with pytest.raises(InvalidRequestError, match=problem):
        read(request_)


def test_system_message_is_part_of_a_question_where_the_template_has_none(
    answerer: CompletionService,
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    request = ChatRequest.model_validate({"model": "tiny", "messages": messages})
    wanted = ids_of(answerer.prepare_chat(chat("a\n\nb")))
    assert ids_of(answerer.prepare_chat(request)) == wanted


def test_answer_at_the_end_is_continued(answerer: CompletionService, served: ServedModel) -> None:
    begun, asked = (
        ids_of(answerer.prepare_chat(chat(*said))) for said in (("the fox", "a"), ("the fox",))
    )
    assert begun[: len(asked)] == asked
    assert served.tokenizer.decode(list(begun[-1:])) == "a"


def test_continued_answer_has_the_space_that_it_goes_on_with(
    answerer: CompletionService, served: ServedModel
) -> None:
    prompt = answerer.prepare_chat(chat("the fox", "the quick", max_tokens=8))
    told = texts_of(answerer, prompt)[0]
    tokens = by_transformers(served.model, ids_of(prompt), 8)
    tokens = tokens[: tokens.index(1)] if 1 in tokens else tokens
    whole = served.tokenizer.decode([*ids_of(prompt), *tokens], skip_special_tokens=True)
    assert isinstance(whole, str)
    assert whole.endswith("the quick" + told)


def test_continued_answer_can_not_be_held_to_a_schema(answerer: CompletionService) -> None:
    request = chat("the fox", "{", response_format={"type": "json_object"})
    with pytest.raises(InvalidRequestError, match="is continued can't be held"):
        answerer.prepare_chat(request)
    answerer.prepare_chat(chat("the fox", "{", response_format={"type": "text"}))


def test_older_name_of_content_is_read(answerer: CompletionService) -> None:
    old = ChatRequest.model_validate(
        {"model": "tiny", "messages": [{"role": "user", "message": "the fox"}]}
    )
    assert ids_of(answerer.prepare_chat(old)) == ids_of(answerer.prepare_chat(chat("the fox")))


def test_adapter_is_refused_where_there_are_none(answerer: CompletionService) -> None:
    async def main() -> None:
        request = complete("the").model_copy(update={"model": "tiny:poet"})
        await answerer.respond(request)

    with pytest.raises(UnknownModelError, match="`tiny:poet` does not exist"):
        asyncio.run(main())


def test_choices_beyond_the_engines_capacity_are_invalid(served: ServedModel) -> None:
    stepper = BatchScheduler(served.model, num_slots=2, max_context=served.max_context)
    engine = TransformersEngine(stepper, max_waiting=1)
    service = CompletionService(served, engine, SamplingDefaults())

    async def respond(num_choices: int) -> int:
        request = complete("the", n=num_choices, max_tokens=2)
        async with aclosing(await service.respond(request)) as stream:
            return len({delta.index async for delta in stream.deltas})

    try:
        assert asyncio.run(respond(3)) == 3
        with pytest.raises(InvalidRequestError, match="n: got 4 choices, but at most 3") as caught:
            asyncio.run(respond(4))
    finally:
        engine.close()
    assert caught.value.param == "n"
