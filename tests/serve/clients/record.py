"""Writes the requests that the clients send to `../http/client_requests.json`.

    python -m tests.serve.clients.record [CLIENT ...]

Their programs run without the steps that expect an error, against the application in this process;
records of clients that are not named are kept. What the application refuses is printed with its
response, and what fails in a program with its output: exit status 1.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.http.metrics import ServeMetrics
from raytune_llama.serve.http.routes import build_http_app
from tests.conftest import train_tokenizer
from tests.serve.clients.environments import CLIENTS, HERE, Client, choose, install, variables
from tests.serve.http.recorded_metrics import RecordedMetrics
from tests.serve.http.test_routes import AppServer
from tests.serve.tiny_chat import NAME, write_tiny_chat

FILE = HERE.parent / "http" / "client_requests.json"

RECORDED_HEADERS = ("accept", "content-type", "user-agent")
MAX_ALIKE = 2
"""Of requests that differ in nothing but texts, ids and numbers, so many are kept."""


@dataclass
class Exchange:
    """A request and what it got."""

    method: str
    path: str
    headers: dict[str, str]
    sent: bytearray = field(default_factory=bytearray)
    status: int = 0
    got: bytearray = field(default_factory=bytearray)

    def as_record(self, client: Client) -> dict[str, Any]:
        """Return what the file says of the request."""
        return {
            "client": client.name,
            "version": f"{client.package} {client.version}",
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
            "body": json.loads(self.sent) if self.sent else None,
        }


class Recorder:
    """An application that notes what another one receives and sends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.exchanges: list[Exchange] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        kept = {name: headers[name] for name in RECORDED_HEADERS if name in headers}
        exchange = Exchange(scope["method"], scope["path"], kept)
        # lm-eval tries whether there are routes of vLLM, and does without them.
        if exchange.path.startswith("/v1/"):
            self.exchanges.append(exchange)

        async def receive_noted() -> Message:
            message = await receive()
            exchange.sent += message.get("body", b"")
            return message

        async def send_noted(message: Message) -> None:
            exchange.status = message.get("status", exchange.status)
            exchange.got += message.get("body", b"")
            await send(message)

        await self._app(scope, receive_noted, send_noted)


def shape_of(value: Any) -> Any:
    """Return a JSON value without its texts, ids and numbers, to find requests that are alike."""
    if isinstance(value, str) and " " not in value:
        return value  # a role, a type, a name
    if isinstance(value, dict):
        return {name: shape_of(one) for name, one in value.items()}
    if isinstance(value, list):
        shapes = [shape_of(one) for one in value]
        return [shape for number, shape in enumerate(shapes) if shape not in shapes[:number]]
    return type(value).__name__


def run_program(client: Client, url: str, model_dir: str, key: str, recorder: Recorder) -> bool:
    """Run a client's program; return whether everything it asked was answered."""
    recorder.exchanges.clear()
    given = ["--url", f"{url}/v1", "--model", NAME, "--model-dir", model_dir, "--without-errors"]
    done = subprocess.run(
        [*client.command(), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=variables(key),
    )
    sys.stdout.write(f"== {client.name} {client.version}\n{done.stdout}\n")
    refused = [one for one in recorder.exchanges if one.status != 200]
    for one in refused:
        request = json.dumps(one.as_record(client), ensure_ascii=False)
        sys.stdout.write(f"REFUSED {one.status} {request}\n  -> {one.got.decode()}\n")
    return done.returncode == 0 and not refused


def records_of(client: Client, exchanges: list[Exchange]) -> list[dict[str, Any]]:
    """Return the records of a client's requests, few of those that are alike."""
    records: list[dict[str, Any]] = []
    shapes: list[Any] = []
    for one in exchanges:
        made = one.as_record(client)
        shape = [made["method"], made["path"], shape_of(made["body"])]
        if shapes.count(shape) < MAX_ALIKE and made not in records:
            records.append(made)
            shapes.append(shape)
    return records


def run(clients: list[Client]) -> int:
    """Record the requests of clients; return the exit status."""
    install(clients)
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []
    key, line = make_key()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_tiny_chat(folder, train_tokenizer(folder / "tokenizer"))
        model = config.models[0]
        app = build_http_app(
            {NAME: LoadedModel(model, config)},
            ApiKeys((bytes.fromhex(line),)),
            config.limits,
            metrics=ServeMetrics(RecordedMetrics()),
        )
        recorder = Recorder(app)
        server = AppServer(lambda _: recorder)
        are_good: list[bool] = []
        try:
            for client in clients:
                are_good.append(run_program(client, server.url, model.path, key, recorder))
                known = [one for one in known if one["client"] != client.name]
                known += records_of(client, recorder.exchanges)
        finally:
            server.close()
    order = [client.name for client in CLIENTS]
    known.sort(key=lambda one: order.index(one["client"]))
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in known)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return int(not all(are_good))


if __name__ == "__main__":
    sys.exit(run(choose(sys.argv[1:])))
