"""The endpoint as OpenAI's own client sees it, over real HTTP on loopback."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import openai
import pytest
import uvicorn
from starlette.types import ASGIApp

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.errors import BusyError, EngineError
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.http.metrics import ServeMetrics
from raytune_llama.serve.http.rate_limit import RateLimitClient
from raytune_llama.serve.http.routes import build_http_app
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.serve.protocol.completions import CompletionRequest
from tests.serve.conftest import ObservedScheduler
from tests.serve.http.recorded_metrics import RecordedMetrics

Asked = ChatRequest | CompletionRequest


class Here:
    """A model in this process."""

    def __init__(self, service: CompletionService) -> None:
        self._service = service

    async def respond(self, request: Asked) -> Stream[OutputDelta]:
        return await self._service.respond(request)

    async def adapters(self) -> list[str]:
        return []

    async def check(self) -> None:
        pass


class Failing:
    """A model that raises an error after some deltas; its health check does too."""

    def __init__(self, error: Exception, after: int) -> None:
        self._error, self._after = error, after

    async def respond(self, _: Asked) -> Stream[OutputDelta]:
        return Stream(3, self._fail())

    async def _fail(self) -> AsyncGenerator[OutputDelta, None]:
        for number in range(self._after):
            yield OutputDelta(0, f"{number} ", 1)
        raise self._error

    async def adapters(self) -> list[str]:
        return []

    async def check(self) -> None:
        raise self._error


class AppServer:
    """An ASGI application on uvicorn, in a thread, on a free port of loopback."""

    def __init__(self, build: Callable[[str], ASGIApp]) -> None:
        """Start serving.

        Args:
            build: returns the application that is served at a URL.
        """
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # Uvicorn's own records of requests are not shown.
        config = uvicorn.Config(build(self.url), log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)

    def client(self, key: str = "none", *, path: str = "") -> openai.OpenAI:
        """Return a client.

        Args:
            key: API key.
            path: path of the application.
        """
        return openai.OpenAI(base_url=f"{self.url}{path}/v1", api_key=key, max_retries=0)

    def close(self) -> None:
        """Wait until all responses have ended, and stop."""
        self._server.should_exit = True
        self._thread.join()


class Server(AppServer):
    """The application of models."""

    def __init__(
        self,
        backends: dict[str, Any],
        keys: ApiKeys | None = None,
        limits: RequestLimits | None = None,
        rate_limiter: RateLimitClient | None = None,
    ) -> None:
        self.metrics = RecordedMetrics()
        app = build_http_app(
            backends,
            keys or ApiKeys(),
            limits or RequestLimits(),
            metrics=ServeMetrics(self.metrics),
            rate_limiter=rate_limiter,
        )
        super().__init__(lambda _: app)

    def close(self) -> None:
        super().close()
        assert not self.metrics.problems


@pytest.fixture(scope="module")
def server(answerer: CompletionService) -> Iterator[Server]:
    server = Server(
        {
            "tiny": Here(answerer),
            "busy": Failing(BusyError("9 requests are waiting already"), 0),
            "broken": Failing(EngineError("the engine has failed"), 2),
        }
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


FOX: Any = [{"role": "user", "content": "the fox"}]


def test_client_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "busy", "broken"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("fields", [{}, {"n": 3, "seed": 5, "temperature": 1.2}])
def test_chat_streamed_is_the_chat_at_once(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": FOX, "max_tokens": 12, "temperature": 0}
    asked |= fields
    whole = client.chat.completions.create(**asked)
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    texts = [""] * len(whole.choices)
    finishes: dict[int, str | None] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            assert finishes.get(choice.index) is None, "a chunk behind the last"
            finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_streamed_is_the_completion_at_once(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "the 人",
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.completions.create(**asked, echo=True, logprobs=2)
    told = "".join(
        chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)
    )
    assert whole.choices[0].text == "the 人" + told
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.text_offset
    assert len("the 人") in logprobs.text_offset


def test_chat_logprobs_have_the_likeliest(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=FOX, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    for token in logprobs.content or []:
        assert [len(token.top_logprobs), token.top_logprobs[0].token] == [2, token.token]


SCHEMA: Any = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "word": {"enum": ["fox", "人民"]}},
    "required": ["good", "word"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("stream", [False, True])
def test_chat_with_a_schema_answers_in_its_form(
    client: openai.OpenAI, *, stream: bool, temperature: float
) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "said", "schema": SCHEMA}}
    asked: dict[str, Any] = {"model": "tiny", "messages": FOX, "response_format": form}
    asked |= {"temperature": temperature, "seed": 3, "n": 2, "max_tokens": 60, "stream": stream}
    answer = client.chat.completions.create(**asked)
    texts = ["", ""]
    for item in answer if stream else [answer]:
        for choice in item.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    for text in texts:
        found = json.loads(text)
        assert isinstance(found["good"], bool)
        assert found["word"] in ("fox", "人民")


def test_async_clients_at_a_time_get_what_they_get_alone(server: Server) -> None:
    texts = ["the fox", "the dog", "人民", "over 人", "lazy", "for index"]

    async def main() -> list[str | None]:
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
        )
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": text}],
                    max_tokens=10,
                    temperature=0,
                )
                for text in texts
            )
        )
        return [answer.choices[0].message.content for answer in answers]

    together = asyncio.run(main())
    client = server.client()
    for text, content in zip(texts, together, strict=True):
        alone = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": text}],
            max_tokens=10,
            temperature=0,
        )
        assert alone.choices[0].message.content == content


@pytest.mark.parametrize(
    ("fields", "status", "problem"),
    [
        ({"model": "gpt-9"}, 404, "The model `gpt-9` does not exist. Available models: `tiny`"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content: missing"),
        ({"messages": [{"role": "user", "content": "x " * 500}]}, 400, "is 128 tokens"),
        ({"n": 10**9}, 400, "n: "),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_logprobs": 3}, 400, "only allowed when logprobs=true"),
        ({"stop": ["x" * 257]}, 400, "stop.0"),
        ({"extra_body": {"best_of": 3}}, 400, "best_of"),
        ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nothing"}},
                }
            },
            400,
            "the schema can't be used",
        ),
        ({"model": "busy"}, 429, "9 requests are waiting"),
        ({"model": "busy", "stream": True}, 429, "9 requests are waiting"),
        ({"model": "broken"}, 503, "has failed"),
    ],
)
def test_refusal_has_its_status_and_openais_body(
    client: openai.OpenAI, fields: dict[str, Any], status: int, problem: str
) -> None:
    asked = {"model": "tiny", "messages": FOX, "max_tokens": 2, **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert problem in body["message"]
    assert set(body) == {"message", "type", "param", "code"}
    assert ("retry-after" in caught.value.response.headers) == (status in {429, 503})


def raw(port: int, head: str, body: bytes = b"") -> bytes:
    """Send bytes as they are; return the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
        one.sendall(head.encode() + b"\r\n\r\n" + body)
        received = b""
        while piece := one.recv(65536):
            received += piece
        return received


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[1]", b'"x"', b"null", b"[" * 100_000])
def test_body_that_is_no_request_is_a_400(server: Server, body: bytes) -> None:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    )
    answer = raw(server.port, head, body)
    assert answer.startswith(b"HTTP/1.1 400"), answer[:300]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_body_that_is_too_large_is_refused_by_its_length_or_as_it_comes(server: Server) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\n"
    assert raw(server.port, head + "Content-Length: 100000000").startswith(b"HTTP/1.1 413")
    piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    # One byte more than may be, and no end: the answer comes while the client still sends.
    pieces = piece * (RequestLimits().body_bytes // 2**20) + b"1\r\n \r\n"
    assert raw(server.port, head + "Transfer-Encoding: chunked", pieces).startswith(b"HTTP/1.1 413")


def test_stream_of_an_engine_that_fails_ends_with_an_error(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="broken", messages=FOX, stream=True)
    chunks = iter(stream)
    told = [next(chunks).choices[0].delta.content for _ in range(3)]
    assert told == ["", "0 ", "1 "]
    with pytest.raises(openai.APIError, match="has failed"):
        next(chunks)


def test_keys_guard_every_route_but_health(answerer: CompletionService) -> None:
    (key, line), (other, _) = make_key(), make_key()
    server = Server({"tiny": Here(answerer)}, ApiKeys((bytes.fromhex(line),)))
    try:
        assert [model.id for model in server.client(key).models.list()] == ["tiny"]
        for wrong in (other, "none", key[:-1]):
            with pytest.raises(openai.AuthenticationError):
                server.client(wrong).models.list()
            with pytest.raises(openai.AuthenticationError):
                server.client(wrong).chat.completions.create(model="tiny", messages=FOX)
        for path in ("/v1/models", "/openapi.json", "/nowhere"):
            head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close"
            assert raw(server.port, head).startswith(b"HTTP/1.1 401")
        head = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close"
        assert raw(server.port, head).startswith(b"HTTP/1.1 200")
    finally:
        server.close()


def test_client_that_goes_away_frees_what_it_held(
    server: Server, scheduler: ObservedScheduler
) -> None:
    client = server.client()
    for _ in range(20):
        stream = client.chat.completions.create(
            model="tiny", messages=FOX, stream=True, temperature=0
        )
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 60
    while not scheduler.is_idle:
        assert time.monotonic() < deadline
        time.sleep(0.05)
