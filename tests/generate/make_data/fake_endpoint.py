"""An OpenAI-compatible endpoint on loopback that answers, or misbehaves, as a test says."""

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

MODEL = "teacher"


@dataclass(frozen=True)
class Answer:
    """What the endpoint does with a request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: Literal["reset", "hang", "cut"] | None = None


@dataclass(frozen=True)
class Call:
    """A request that the endpoint has received."""

    number: int
    """From 1, in the order of arrival, retries included."""
    body: dict[str, Any]
    authorization: str | None
    time: float

    @property
    def prompt(self) -> str:
        return self.body["messages"][0]["content"]


def completion(text: str | None, finish: str | None = "stop", *, usage: bool = True) -> Answer:
    content = {
        "id": "c",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text},
            }
        ],
    }
    if usage:
        content["usage"] = {"prompt_tokens": 100, "completion_tokens": 50}
    return Answer(body=json.dumps(content).encode())


def error(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    body = {"error": {"message": message, "type": "t", "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps(body).encode(), named)


def make_rows(number: int, num_rows: int = 3) -> list[dict[str, str]]:
    """Rows that are like no others: words of random letters, drawn by a number."""
    draws = random.Random(number)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def text() -> str:
        return " ".join("".join(draws.choices(letters, k=7)) for _ in range(8))

    return [{"instruction": text(), "input": "", "output": text()} for _ in range(num_rows)]


def as_json(rows: object) -> str:
    return json.dumps(rows, ensure_ascii=False)


def answer_rows(call: Call) -> Answer:
    """Three new rows for every call."""
    return completion(as_json(make_rows(call.number)))


class FakeEndpoint(ThreadingHTTPServer):
    """The endpoint, within a `with` block."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Call], Answer] = answer_rows) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.calls: list[Call] = []
        self.is_closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closing.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def record(self, body: dict[str, Any], authorization: str | None) -> Call:
        with self._lock:
            call = Call(len(self.calls) + 1, body, authorization, time.monotonic())
            self.calls.append(call)
        return call

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing to say: clients go away as they like."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeEndpoint  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name)
        pass

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
        self._send(Answer(body=json.dumps(models).encode()))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        call = self.server.record(body, self.headers["authorization"])
        answer = self.server.answer(call)
        if answer.fault == "hang":
            self.server.is_closing.wait()
            self.close_connection = True
        elif answer.fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        else:
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"content-type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(answer.body)))
        self.end_headers()
        is_cut = answer.fault == "cut"
        self.wfile.write(answer.body[: len(answer.body) // 2] if is_cut else answer.body)
        self.close_connection = self.close_connection or is_cut
