"""Clients that come slowly, do not read, go away, or ask from a page; and what the logs keep."""

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncGenerator, Iterator

import openai
import pytest

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.serve.protocol.completions import CompletionRequest
from tests.serve.conftest import ObservedScheduler
from tests.serve.http.test_hostile import (
    ASKED,
    FEW_BYTES,
    MIB,
    error_of,
    post,
    rss_bytes,
    until,
)
from tests.serve.http.test_routes import FOX, Here, Server, raw

QUICK = RequestLimits(body_seconds=0.5, queue_seconds=0.5, request_seconds=1.5, send_seconds=0.5)


class Endless:
    """A model that generates the same without end; it counts the streams that are not closed."""

    def __init__(self, text: str, *, before: float = 0.0, between: float = 0.0) -> None:
        self._text, self._before, self._between = text, before, between
        self.num_open, self.num_said = 0, 0

    async def respond(self, _: ChatRequest | CompletionRequest) -> Stream[OutputDelta]:
        self.num_open += 1
        return Stream(3, self._generate(), self._end)

    def _end(self) -> None:
        self.num_open -= 1

    async def _generate(self) -> AsyncGenerator[OutputDelta, None]:
        await asyncio.sleep(self._before)
        while True:
            await asyncio.sleep(self._between)
            self.num_said += 1
            yield OutputDelta(0, self._text, 1)

    async def adapters(self) -> list[str]:
        return []

    async def check(self) -> None:
        pass


@pytest.fixture(scope="module")
def server(answerer: CompletionService) -> Iterator[Server]:
    server = Server({"tiny": Here(answerer)}, limits=FEW_BYTES)
    yield server
    server.close()


@pytest.fixture
def slow() -> Iterator[tuple[Server, dict[str, Endless]]]:
    models = {
        "waiting": Endless("x", before=3600),
        "endless": Endless("x", between=0.05),
        "flood": Endless("x" * MIB),
    }
    server = Server(models, limits=QUICK)
    yield server, models
    server.close()


def test_request_that_never_ends_is_refused_in_time(
    slow: tuple[Server, dict[str, Endless]],
) -> None:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 100"
    )
    answer = raw(slow[0].port, head, b"{")  # closed by the server, or this would time out
    assert "0.5 s" in error_of(answer, 408)["message"]


def test_answer_that_does_not_begin_is_refused_in_time(
    slow: tuple[Server, dict[str, Endless]],
) -> None:
    server, models = slow
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="No token generated within") as caught:
            server.client().chat.completions.create(model="waiting", messages=FOX, stream=stream)
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
    until(lambda: not models["waiting"].num_open)


def test_answer_that_does_not_end_is_ended_in_time(
    slow: tuple[Server, dict[str, Endless]],
) -> None:
    server, models = slow
    client = server.client()
    with pytest.raises(openai.InternalServerError, match="timed out after") as caught:
        client.chat.completions.create(model="endless", messages=FOX)
    assert caught.value.status_code == 504
    told: list[str | None] = []
    chunks = client.chat.completions.create(model="endless", messages=FOX, stream=True)
    with pytest.raises(openai.APIError, match="timed out after"):
        told.extend(chunk.choices[0].delta.content for chunk in chunks)
    assert told[1:] == ["x"] * (len(told) - 1)
    assert len(told) > 2
    until(lambda: not models["endless"].num_open)


def test_client_that_does_not_read_is_let_go(slow: tuple[Server, dict[str, Endless]]) -> None:
    server, models = slow
    body = json.dumps({"model": "flood", "messages": FOX, "stream": True})
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    flood, before = models["flood"], rss_bytes()
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    try:
        for client in clients:
            client.sendall((head + body).encode())
        until(lambda: flood.num_said > 0)
        until(lambda: not flood.num_open)
        # What fits between the two is all that was made: it waits for the client.
        assert flood.num_said < 4 * 20
        assert rss_bytes() - before < 200 * MIB
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_ends_its_answer(*, stream: bool) -> None:
    endless = Endless("x", between=0.05)
    server = Server({"endless": endless})  # whose limits are minutes
    body = json.dumps({"model": "endless", "messages": FOX, "stream": stream})
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall((head + body).encode())
            until(lambda: endless.num_said > 0)
        until(lambda: not endless.num_open, seconds=20)
    finally:
        server.close()


@pytest.mark.parametrize("num_clients", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_go_away_leave_nothing(
    server: Server, scheduler: ObservedScheduler, num_clients: int
) -> None:
    asked = {**ASKED, "max_tokens": 100, "stream": True, "n": 2}
    body = json.dumps(asked)
    request = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()

    def leave(number: int) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as one:
            one.sendall(request)
            assert one.recv(15) == b"HTTP/1.1 200 OK"
            if number % 2:  # reset rather than closed
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    for number in range(num_clients // 4):
        leave(number)
    until(lambda: scheduler.is_idle)
    before = rss_bytes()
    for number in range(num_clients):
        leave(number)
    until(lambda: scheduler.is_idle)
    assert rss_bytes() - before < 16 * MIB
    assert b" 200 " in post(server.port, json.dumps(ASKED).encode())[:20]


def test_keys_are_in_no_log(answerer: CompletionService, caplog: pytest.LogCaptureFixture) -> None:
    (key, line), (other, _) = make_key(), make_key()
    caplog.set_level(logging.DEBUG)
    server = Server({"tiny": Here(answerer)}, ApiKeys((bytes.fromhex(line),)), limits=QUICK)
    # Which keeps its records to itself, and is told to be quiet.
    servers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access")]
    for one in servers:
        one.addHandler(caplog.handler)
        one.setLevel(logging.DEBUG)
    try:
        server.client(key).chat.completions.create(**ASKED)
        for wrong in (other, key[:-1]):
            with pytest.raises(openai.AuthenticationError):
                server.client(wrong).chat.completions.create(**ASKED)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        error_of(raw(server.port, head + "Content-Length: 9", b"{"), 408)
        error_of(raw(server.port, head + "Content-Length: 1", b"{"), 400)
    finally:
        server.close()
        for one in servers:
            one.removeHandler(caplog.handler)
    clients = ("httpx", "httpcore", "openai")
    told = [
        record.getMessage() + str(record.exc_text or "") + str(record.args)
        for record in caplog.records
        if not record.name.startswith(clients)
    ]
    assert told
    for secret in (key, key[3:], other, other[3:]):
        assert not [text for text in told if secret in text]


def test_pages_may_ask_where_they_are_named_and_nowhere_else(answerer: CompletionService) -> None:
    keys = ApiKeys((bytes.fromhex(make_key()[1]),))
    preflight = (
        "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        "Access-Control-Request-Method: POST\r\n"
        "Access-Control-Request-Headers: authorization, content-type\r\nOrigin: "
    )
    page = "https://example.org"
    named = Server({"tiny": Here(answerer)}, keys, limits=RequestLimits(allow_origins=(page,)))
    closed = Server({"tiny": Here(answerer)}, keys)
    try:
        allowed = raw(named.port, preflight + page).lower()
        assert allowed.startswith(b"http/1.1 200")
        assert b"\r\naccess-control-allow-origin: https://example.org\r\n" in allowed
        for answer in (
            raw(named.port, preflight + "https://e.org"),
            raw(closed.port, preflight + page),
        ):
            assert b"access-control-allow-origin" not in answer.lower()
            assert answer[9:10] == b"4"
        # A page sees why it was refused.
        head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: {page}"
        refused = raw(named.port, head).lower()
        assert refused.startswith(b"http/1.1 401")
        assert b"access-control-allow-origin: https://example.org" in refused
    finally:
        named.close()
        closed.close()
