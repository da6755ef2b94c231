"""Metrics and log lines of requests that were answered, refused, or left by their client."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.errors import BusyError, EngineError, InvalidRequestError
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.http.metrics import ServeMetrics
from tests.serve.http.recorded_metrics import RecordedMetrics
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_routes import Asked, Failing, Here, Server

REPOSITORY = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())


@pytest.fixture
def server(answerer: CompletionService) -> Iterator[Server]:
    one = Server(
        {
            "tiny": Here(answerer),
            "busy": Failing(BusyError("full"), after=0),
            "broken": Failing(EngineError("dead"), after=2),
            "held": Scripted("one", "two", held=True),
        }
    )
    yield one
    one.close()


def closed(server: Server) -> RecordedMetrics:
    """Return the metrics of a server once all its requests have ended."""
    server.close()
    return server.metrics


def test_tokens_and_times_are_counted_by_model(server: Server) -> None:
    client = server.client()
    told = client.completions.create(model="tiny", prompt="the quick", max_tokens=7, temperature=0)
    list(client.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True, n=2))
    assert told.usage is not None
    metrics = closed(server)
    values, observed = metrics.values, metrics.observations
    assert values["prompt_tokens", "tiny", ""] >= told.usage.prompt_tokens + 1
    assert 7 < values["completion_tokens", "tiny", ""] <= 7 + 6
    assert values["answers", "tiny", "", "ok"] == 2
    first = observed["time_to_first_token_seconds", "tiny", ""]
    whole = observed["request_seconds", "tiny", ""]
    assert [len(first), len(whole)] == [2, 2]
    assert all(0 < one < other for one, other in zip(first, whole, strict=True))
    assert len(observed["time_per_output_token_seconds", "tiny", ""]) >= 1
    assert values["http_requests", "/v1/completions", "200"] == 2
    assert values["requests_running", "tiny", ""] == 0
    assert values["requests_waiting", "tiny", ""] == 0


def test_open_request_is_counted_as_waiting_then_as_running(server: Server) -> None:
    with server.client().completions.create(model="held", prompt="a", stream=True) as stream:
        next(stream)
        assert server.metrics.observations["requests_waiting", "held", ""] == [1, 0]
        assert server.metrics.values["requests_running", "held", ""] == 1
    assert closed(server).observations["requests_running", "held", ""] == [1, 0]


def test_refusals_and_failures_are_counted_by_how_they_ended(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="busy", prompt="a")
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="broken", prompt="a")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x " * 500)
    for number in range(3):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=f"made-up-{number}", prompt="a")
    metrics = closed(server)
    assert metrics.values["answers", "busy", "", "busy"] == 1
    assert metrics.values["answers", "broken", "", "failed"] == 1
    assert metrics.values["answers", "tiny", "", "refused"] == 1
    assert metrics.values["http_requests", "/v1/completions", "404"] == 3
    assert not any("made-up" in value for value in metrics.tag_values)
    open_counts = [n for key, n in metrics.values.items() if key[0].startswith("requests_")]
    assert open_counts
    assert not any(open_counts)


def test_names_that_clients_make_up_are_no_tag_values(server: Server) -> None:
    for number in range(5):
        httpx2.get(f"{server.url}/no/{number}")
        httpx2.post(
            f"{server.url}/v1/completions",
            json={"model": f"tiny:adapter-{number}", "prompt": "a", "max_tokens": 1},
        )
    metrics = closed(server)
    assert metrics.values["http_requests", "other", "404"] == 5
    assert not any("adapter-" in value for value in metrics.tag_values)


def test_adapter_that_was_accepted_is_a_tag_value() -> None:
    server = Server({"tiny": Scripted("one", adapters=["poet"])})
    server.client().completions.create(model="tiny:poet", prompt="a")
    assert closed(server).values["answers", "tiny", "poet", "ok"] == 1


def test_a_client_that_leaves_is_counted_as_gone(server: Server) -> None:
    stream = server.client().completions.create(model="held", prompt="a", stream=True)
    next(stream)
    stream.close()
    values = closed(server).values
    assert values["answers", "held", "", "gone"] == 1
    assert values["requests_running", "held", ""] == 0


class Silent(Failing):
    """A model that never generates a token."""

    async def respond(self, _: Asked) -> Stream[OutputDelta]:
        async def wait() -> AsyncGenerator[OutputDelta, None]:
            await asyncio.Event().wait()
            yield OutputDelta(0, "", 0)

        return Stream(3, wait())


class Loading(Failing):
    """A model that never accepts a request."""

    async def respond(self, _: Asked) -> Stream[OutputDelta]:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("kind", [Silent, Loading])
def test_answers_that_do_not_come_in_time_are_counted_as_late(kind: type[Failing]) -> None:
    limits = RequestLimits(queue_seconds=0.2)
    server = Server({"silent": kind(EngineError(""), 0)}, limits=limits)
    with pytest.raises(openai.InternalServerError):
        server.client().completions.create(model="silent", prompt="a")
    values = closed(server).values
    assert values["answers", "silent", "", "late"] == 1
    assert values["requests_waiting", "silent", ""] == 0


class Refusing(Failing):
    """A model that raises an error instead of accepting a request."""

    async def respond(self, _: Asked) -> Stream[OutputDelta]:
        raise self._error


REFUSALS: list[tuple[dict[str, Any], int]] = [
    ({"model": "none"}, 404),
    ({"model": "busy"}, 429),
    ({"model": "busy", "stream": True}, 429),
    ({"model": "broken"}, 503),
    ({"model": "unfit"}, 400),
    ({"model": "busy", "messages": []}, 400),
    ({}, 401),
]


@pytest.mark.parametrize(("fields", "status"), REFUSALS)
def test_refused_request_is_logged_as_one_line_without_traceback(
    caplog: pytest.LogCaptureFixture, fields: dict[str, Any], status: int
) -> None:
    key, line = make_key()
    backends = {
        "busy": Failing(BusyError("full"), 0),
        "broken": Failing(EngineError("dead"), 0),
        "unfit": Refusing(InvalidRequestError("unfit"), 0),
    }
    server = Server(backends, ApiKeys((bytes.fromhex(line),)))
    caplog.set_level(logging.INFO)
    uvicorn = logging.getLogger("uvicorn")  # does not propagate
    uvicorn.addHandler(caplog.handler)
    asked = {"messages": [{"role": "user", "content": "a"}], **fields}
    headers = {} if status == 401 else {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=asked, headers=headers)
        server.close()
    finally:
        uvicorn.removeHandler(caplog.handler)
    assert answer.status_code == status
    records = [one for one in caplog.records if not one.name.startswith("http")]
    assert [one.getMessage() for one in records] == [f"POST /v1/chat/completions: status {status}"]
    assert [(one.levelno, one.exc_info) for one in records] == [(logging.INFO, None)]


def test_answered_request_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    server = Server({"tiny": Scripted("one")})
    caplog.set_level(logging.INFO)
    server.client().completions.create(model="tiny", prompt="a")
    server.close()
    assert not [one for one in caplog.records if one.name.startswith("raytune_llama")]


def test_dashboard_queries_every_metric_under_its_exported_name() -> None:
    text = (REPOSITORY / "serve" / "grafana.json").read_text(encoding="utf-8")
    dashboard = json.loads(text)
    queried = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\w*raytune_llama_\w+", target["expr"])
    }
    metrics = RecordedMetrics()
    ServeMetrics(metrics)
    assert queried == metrics.exported
    # Its variables too.
    assert set(re.findall(r"\w*raytune_llama_\w+", text)) == metrics.exported
