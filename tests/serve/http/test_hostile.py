"""What strangers send: each gets its status and OpenAI's body, and the server goes on as before."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.http.keys import ApiKeys, make_key
from tests.serve.conftest import ObservedScheduler
from tests.serve.http.test_routes import FOX, Here, Server, raw

MIB = 2**20
FEW_BYTES = RequestLimits(body_bytes=2 * MIB)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(answerer: CompletionService) -> Iterator[Server]:
    server = Server({"tiny": Here(answerer)}, limits=FEW_BYTES)
    yield server
    server.close()


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    """Return the error of an answer as it came over the wire."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:400]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def post(port: int, body: bytes, more: str = "Content-Type: application/json\r\n") -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return raw(port, f"{head}{more}Content-Length: {len(body)}", body)


ASKED: dict[str, Any] = {"model": "tiny", "messages": FOX, "max_tokens": 2, "temperature": 0}


def with_text(inserted: str) -> bytes:
    """Return a request that could be answered but for one more field."""
    return (json.dumps(ASKED)[:-1] + ", " + inserted + "}").encode()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "body"),
        (b"{", "Could not parse the JSON body"),
        (b'{"model": "tiny"} {}', "Could not parse the JSON body"),
        (b'{"model": "t\xffny"}', "not UTF-8"),
        (json.dumps(ASKED).encode("utf-16"), "not UTF-8"),
        (json.dumps(ASKED).encode("utf-32-le"), "Could not parse the JSON body"),
        (with_text('"temperature": NaN'), "NaN"),
        (with_text('"temperature": -Infinity'), "-Infinity"),
        (with_text('"temperature": 1e999'), "too large"),
        (with_text('"seed": ' + "9" * 400), "seed"),
        (with_text('"seed": ' + "9" * 5000), "digits"),
        (with_text('"model": "other"'), "duplicate key 'model'"),
        (with_text('"metadata": {"a": "1", "a": "2"}'), "duplicate key 'a'"),
        (with_text('"user": "\\ud800"'), "surrogate"),
        (with_text('"n": "3"'), "n: "),
        (with_text('"n": 1e9'), "n: "),
        (with_text('"n": 1000000000'), "n: "),
        (with_text('"stream": "yes"'), "stream"),
        (with_text('"max_completion_tokens": 1000000000'), "max_completion_tokens"),
        (b'{"model": "tiny", "messages": "hello"}', "messages"),
        (b'{"model": "tiny", "messages": {"role": "user"}}', "messages"),
        (b'{"model": ["tiny"], "messages": []}', "model"),
        (b"[" * 100_000, "100000 levels deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "100000 levels deep"),
        (with_text('"metadata": ' + "[" * 64 + "]" * 64), "65 levels deep"),
        (b'"' + b'\\"' * (MIB // 2), "Could not parse the JSON body"),
        (b"\0" * 100_000, "Could not parse the JSON body"),
    ],
)
def test_body_that_can_be_no_request_is_refused(server: Server, body: bytes, problem: str) -> None:
    begin = time.monotonic()
    error = error_of(post(server.port, body), 400)
    assert problem in error["message"]
    assert len(error["message"]) < 4096
    assert error["type"] == "invalid_request_error"
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "kind",
    ["", "Content-Type: text/plain\r\n", "Content-Type: application/json; charset=utf-16\r\n"],
)
def test_body_of_another_type_is_refused(server: Server, kind: str) -> None:
    error = error_of(post(server.port, json.dumps(ASKED).encode(), kind), 400)
    assert error["code"] == "unsupported_content_type"


@pytest.mark.parametrize(
    ("path", "fields", "told"),
    [
        ("completions", {"prompt": "the fox " * 200_000}, "1600000 characters"),
        ("completions", {"prompt": [5] * 500_000}, "500000 tokens"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x" * 1_900_000}]},
            "1900000 characters",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "fox"}] * 4000},
            "12000 characters",
        ),
    ],
)
def test_prompt_far_beyond_the_context_is_refused_before_it_is_encoded(
    server: Server, path: str, fields: dict[str, Any], told: str
) -> None:
    # Encoding takes a second for a megabyte, in which nobody else is answered.
    url = f"http://127.0.0.1:{server.port}/v1/{path}"
    answer = httpx.post(url, json={"model": "tiny", **fields}, timeout=60)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert told in message
    assert "is 128 tokens" in message


def test_content_in_the_older_name_is_the_same(server: Server) -> None:
    other = {**ASKED, "messages": [{"role": "user", "message": "the fox"}]}
    texts = [
        json.loads(post(server.port, json.dumps(asked).encode()).partition(b"\r\n\r\n")[2])
        for asked in (ASKED, other)
    ]
    assert texts[0]["choices"] == texts[1]["choices"]
    assert texts[0]["usage"] == texts[1]["usage"]


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "GET"])
def test_other_methods_are_told_which_there_are(server: Server, method: str) -> None:
    head = f"{method} /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close"
    answer = raw(server.port, head)
    assert answer.startswith(b"HTTP/1.1 405"), answer[:300]
    assert b"\r\nallow: POST" in answer.partition(b"\r\n\r\n")[0]
    if method != "HEAD":
        error_of(answer, 405)


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/nowhere/", "/docs", "/v1/models/../../etc/passwd", "/v1/%00", "//"]
)
def test_unknown_routes_are_not_there(server: Server, path: str) -> None:
    error_of(raw(server.port, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close"), 404)


def test_header_bombs_are_refused(server: Server) -> None:
    head = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    many = "".join(f"x-{number}: {'y' * 100}\r\n" for number in range(1000)).strip()
    assert b" 431 " in raw(server.port, head + many)[:20]
    assert b" 431 " in raw(server.port, head + "cookie: " + "y" * 70_000)[:20]
    # Beyond 64 KiB of path the server's own parser gives up.
    assert (
        b" 431 "
        in raw(server.port, head.replace("els", "els?x=" + "y" * 60_000) + "z: " + "y" * 9000)[:20]
    )


def test_keys_that_are_none_are_refused(answerer: CompletionService) -> None:
    key, line = make_key()
    server = Server({"tiny": Here(answerer)}, ApiKeys((bytes.fromhex(line),)))
    try:
        for value in ("", "Bearer", "Bearer ", f"Basic {key}", key, f"Bearer {key} x", "Bearer ké"):
            one = f"Authorization: {value}".encode("latin-1")
            for path in (b"/v1/models", b"/openapi.json", b"/nowhere"):
                head = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + one
                error = error_of(sent(server, head), 401)
                assert error["code"] == "invalid_api_key"
        head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: "
        error_of(sent(server, head + b"Bearer \xff\xfe\x80"), 401)
        assert b" 200 " in sent(server, head + f"Bearer {key}".encode())[:20]
        for path in (b"/openapi.json", b"/nowhere"):
            known = head.replace(b"/v1/models", path) + f"bearer {key}".encode()
            assert sent(server, known)[9:12] == (b"200" if b"json" in path else b"404")
    finally:
        server.close()


def sent(server: Server, head: bytes) -> bytes:
    """Send a request's first lines as bytes; return the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as one:
        one.sendall(head + b"\r\n\r\n")
        received = b""
        while piece := one.recv(65536):
            received += piece
        return received


def test_large_body_is_refused_to_a_client_that_sends_it_all(server: Server) -> None:
    body = b'{"model": "' + b"x" * (100 * MIB) + b'"}'
    before = rss_bytes()
    for content in (body, iter([body[at : at + MIB] for at in range(0, len(body), MIB)])):
        answer = httpx.post(
            f"http://127.0.0.1:{server.port}/v1/chat/completions",
            content=content,
            headers={"Content-Type": "application/json"},
            timeout=120,
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"
    # The client's own copies of the pieces are the most of it.
    assert rss_bytes() - before < 150 * MIB


def rss_bytes() -> int:
    """Return the memory that this process has, in which the server runs too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 30, "9" * 5000, "5, 6"])
def test_length_that_is_none_is_refused(server: Server, length: str) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    answer = raw(server.port, f"{head}Content-Length: {length}", b"{}")
    assert answer[9:12] in {b"400", b"413"}, answer[:300]


def test_length_that_lies_harms_nobody_else(server: Server, scheduler: ObservedScheduler) -> None:
    body = json.dumps(ASKED).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: "
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as longer:
        longer.sendall(f"{head}{len(body) + 100}\r\n\r\n".encode() + body)
    # Shorter: the rest of the body is no second request.
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as shorter:
        shorter.sendall(f"{head}10\r\n\r\n".encode() + body)
        assert shorter.recv(12) == b"HTTP/1.1 400"
    assert b" 200 " in post(server.port, body)[:20]
    until(lambda: scheduler.is_idle)
