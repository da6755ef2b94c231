"""Vectors of texts as OpenAI's own client sees them, over real HTTP on loopback."""

import asyncio
import base64
import json
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
import torch

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.protocol import Vectors
from raytune_llama.serve.errors import BusyError, InvalidRequestError
from raytune_llama.serve.generation.embeddings import EmbeddingService
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.generation.output import Stream
from raytune_llama.serve.protocol.embeddings import EmbeddingRequest
from tests.serve.conftest import ObservedScheduler
from tests.serve.http.test_routes import Server


class Here:
    """A model in this process."""

    def __init__(self, vectors: EmbeddingService) -> None:
        self._vectors = vectors

    async def embed(self, request: EmbeddingRequest) -> Stream[Vectors]:
        return await self._vectors.respond(request)

    async def adapters(self) -> list[str]:
        return []


class Busy:
    """A model with a full queue."""

    async def embed(self, _: EmbeddingRequest) -> Stream[Vectors]:
        async def refuse() -> AsyncGenerator[Vectors, None]:
            raise BusyError("9 requests are waiting already")
            yield

        return Stream(3, refuse())

    async def adapters(self) -> list[str]:
        return []


@pytest.fixture(scope="module")
def server(served: ServedModel, served_engine: TransformersEngine) -> Iterator[Server]:
    server = Server({"tiny": Here(EmbeddingService(served, served_engine)), "busy": Busy()})
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


TEXTS = ["the quick brown fox", "人民日报", "</s>", "x", "the lazy dog " * 15]


def wanted(served: ServedModel, text: str) -> np.ndarray:
    """Compute a vector by hand; control tokens in the text are text."""
    tokenizer = served.tokenizer
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    with torch.inference_mode():
        output = served.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    mean = output.hidden_states[-1][0].mean(0)
    return (mean / mean.norm()).numpy()


def test_each_text_has_its_own_item_in_order(client: openai.OpenAI, served: ServedModel) -> None:
    # The client asks for base64 where nothing is said.
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    assert [item.index for item in answer.data] == [0, 1, 2, 3, 4]
    for item, text in zip(answer.data, TEXTS, strict=True):
        assert len(item.embedding) == 32
        np.testing.assert_allclose(item.embedding, wanted(served, text), atol=1e-5)
    lengths = [len(ids) for ids in served.encode_texts(TEXTS)]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(lengths)
    assert answer.model == "tiny"


def test_forms_of_one_text_give_one_vector(client: openai.OpenAI, served: ServedModel) -> None:
    ids = served.encode_texts(TEXTS[:1])[0]
    inputs: list[Any] = [TEXTS[0], TEXTS[:1], ids, [ids]]
    for given in inputs:
        for form in ("float", "base64"):
            answer = client.embeddings.create(
                model="tiny", input=given, encoding_format=form, dimensions=32
            )
            (item,) = answer.data
            found: Any = item.embedding
            if form == "base64" and isinstance(found, str):
                found = np.frombuffer(base64.b64decode(found), dtype="<f4")
            np.testing.assert_allclose(found, wanted(served, TEXTS[0]), atol=1e-5)


def test_as_many_texts_as_may_be_come_back(client: openai.OpenAI) -> None:
    texts = [f"{number} fox" for number in range(2048)]
    answer = client.embeddings.create(model="tiny", input=texts)
    assert [item.index for item in answer.data] == list(range(2048))
    again = client.embeddings.create(model="tiny", input=texts[1234])
    np.testing.assert_allclose(answer.data[1234].embedding, again.data[0].embedding, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "status", "problem", "param"),
    [
        ({"model": "gpt-9"}, 404, "The model `gpt-9` does not exist", "model"),
        ({"model": "busy"}, 429, "9 requests are waiting", None),
        ({"input": ""}, 400, "input: must not be empty", "input"),
        ({"input": []}, 400, "input: got an empty list", "input"),
        ({"input": ["a", ""]}, 400, "input.1: must not be empty", "input.1"),
        ({"input": [[1], []]}, 400, "input.1: must not be empty", "input.1"),
        ({"input": ["a", [1]]}, 400, "input.1: expected all strings", "input.1"),
        ({"input": [["a"]]}, 400, "input.0.0: expected a token ID", "input.0.0"),
        ({"input": [1, True]}, 400, "input.1: expected a token ID", "input.1"),
        ({"input": [1, -1]}, 400, "input.1: expected a token ID", "input.1"),
        ({"input": [1, 2.5]}, 400, "input.1: expected a token ID", "input.1"),
        ({"input": {"text": "a"}}, 400, "expected a string", "input"),
        ({"input": ["a"] * 2049}, 400, "got 2049 items", "input"),
        ({"input": ["a", "the fox " * 99]}, 400, "wanted 1 to 128", "input.1"),
        ({"input": [[1, 2], [3, 400]]}, 400, "token id 400 is outside the vocabulary", "input.1"),
        ({"input": ["a"] * 3000 + [""]}, 400, "got 3001 items", "input"),
        ({"dimensions": 16}, 400, "embeddings of tiny have 32", "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format", "encoding_format"),
        (
            {"extra_body": {"truncate_prompt_tokens": 9}},
            400,
            "not supported",
            "truncate_prompt_tokens",
        ),
    ],
)
def test_refusal_says_what_is_wrong_and_where(
    client: openai.OpenAI, fields: dict[str, Any], status: int, problem: str, param: str | None
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(**{"model": "tiny", "input": "a", **fields})
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert problem in body["message"]
    assert body["param"] == param


def test_texts_with_too_many_tokens_together_are_refused(
    served: ServedModel, served_engine: TransformersEngine
) -> None:
    vectors = EmbeddingService(replace(served, max_context=1000), served_engine)
    fields = {"model": "tiny", "input": [[5] * 200] * 1500}
    assert len(vectors.tokenize(EmbeddingRequest.model_validate(fields))) == 1500
    fields["input"] = [[5] * 200] * 1501
    with pytest.raises(InvalidRequestError, match="300200 tokens in total"):
        vectors.tokenize(EmbeddingRequest.model_validate(fields))


def test_client_that_goes_away_ends_the_work(
    server: Server, scheduler: ObservedScheduler, served: ServedModel
) -> None:
    text = "the quick brown fox " * 8
    body = json.dumps({"model": "tiny", "input": [text] * 2048}).encode()
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    read = 0

    def count(*_: object) -> None:
        nonlocal read
        read += 1

    handle = served.model.base_model.register_forward_hook(count)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as one:
        one.sendall(head.encode() + body)
        while not read:
            time.sleep(0.001)
    deadline = time.monotonic() + 60
    while not scheduler.is_idle:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    handle.remove()
    num_passes = 2048 // (256 // len(served.encode_texts([text])[0]))
    assert read < num_passes / 2


def test_async_clients_get_their_own_vectors(server: Server, served: ServedModel) -> None:
    async def main() -> list[list[float]]:
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
        )
        answers = await asyncio.gather(
            *(client.embeddings.create(model="tiny", input=text) for text in TEXTS)
        )
        return [answer.data[0].embedding for answer in answers]

    for found, text in zip(asyncio.run(main()), TEXTS, strict=True):
        np.testing.assert_allclose(found, wanted(served, text), atol=1e-5)


def test_texts_far_beyond_the_context_are_refused_before_they_are_encoded(server: Server) -> None:
    long = "the quick brown fox " * 150_000
    begin = time.process_time()
    with pytest.raises(openai.BadRequestError, match="too long: 3000000 characters") as caught:
        server.client().embeddings.create(model="tiny", input=["x", long])
    assert caught.value.param == "input.1"
    # Encoded first, it would take seconds.
    assert time.process_time() - begin < 2


class Waiting:
    """A model that computes nothing; it counts the streams that are not closed."""

    def __init__(self) -> None:
        self.num_open = 0

    async def embed(self, _: EmbeddingRequest) -> Stream[Vectors]:
        self.num_open += 1
        return Stream(3, self._wait(), self._end)

    def _end(self) -> None:
        self.num_open -= 1

    async def _wait(self) -> AsyncGenerator[Vectors, None]:
        await asyncio.Event().wait()
        yield np.zeros((1, 2), dtype=np.float32)


def test_vectors_that_do_not_come_are_refused_in_time() -> None:
    waiting = Waiting()
    server = Server({"waiting": waiting}, limits=RequestLimits(queue_seconds=0.3))
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().embeddings.create(model="waiting", input="the fox")
        assert caught.value.status_code == 503
        assert waiting.num_open == 0
    finally:
        server.close()


def test_numbers_as_texts_are_no_numbers(client: openai.OpenAI) -> None:
    fields: Any = {"dimensions": "48"}
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="the fox", **fields)
