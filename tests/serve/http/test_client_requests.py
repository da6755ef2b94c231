"""Requests as the clients of other projects send them, recorded by `clients/record.py`.

The clients themselves are not needed here: `make test-clients` runs their programs.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.http.keys import ApiKeys, make_key
from tests.serve.clients.environments import CLIENTS
from tests.serve.http.test_routes import Server
from tests.serve.tiny_chat import write_tiny_chat

FILE = Path(__file__).with_name("client_requests.json")
RECORDS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
KEY, LINE = make_key()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Iterator[Server]:
    config = write_tiny_chat(tmp_path_factory.mktemp("clients"), tokenizer_dir)
    num_threads = torch.get_num_threads()
    model = LoadedModel(config.models[0], config)
    server = Server(
        {config.models[0].served_name: model}, ApiKeys((bytes.fromhex(LINE),)), config.limits
    )
    yield server
    server.close()
    torch.set_num_threads(num_threads)


def name_of(record: dict[str, Any]) -> str:
    return f"{record['client']}-{record['path'].removeprefix('/v1/')}"


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """Return the data of a stream's events."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if "data: " in line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_request_of_a_client_is_answered(server: Server, record: dict[str, Any]) -> None:
    # The bodies as they are: their fields, and nothing but them.
    body = None if record["body"] is None else json.dumps(record["body"]).encode()
    response = httpx2.request(
        record["method"],
        f"{server.url}{record['path']}",
        headers={**record["headers"], "Authorization": f"Bearer {KEY}"},
        content=body,
        timeout=120,
    )
    assert response.status_code == 200, response.text
    if record["body"] is not None and record["body"].get("stream"):
        events = events_of(response)
        assert events
        assert not [event for event in events if event.get("error")]
    else:
        assert "error" not in response.json() or response.json()["error"] is None


def test_requests_are_those_of_every_client_and_route() -> None:
    assert {record["client"] for record in RECORDS} == {client.name for client in CLIENTS}
    routes = {record["path"].removeprefix("/v1/") for record in RECORDS}
    assert routes >= {"chat/completions", "completions", "embeddings", "responses", "models"}
