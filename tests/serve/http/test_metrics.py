"""What `/metrics` tells of requests that went well, were refused, or whose client has gone."""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from raytune_llama.serve.config import KeyLimits, RequestLimits
from raytune_llama.serve.errors import BusyError, EngineError
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.http.metrics import ServeMetrics
from raytune_llama.serve.http.rate_limit import LocalRateLimitClient
from tests.serve.http.test_routes import Asked, Failing, Here, Server


@pytest.fixture
def server(answerer: CompletionService) -> Iterator[Server]:
    backends = {
        "tiny": Here(answerer),
        "busy": Failing(BusyError("full"), after=0),
        "broken": Failing(EngineError("dead"), after=2),
    }
    one = Server(backends)
    yield one
    one.close()


REPOSITORY = Path(__file__).resolve().parents[3]
LABELS = ("route", "status", "model", "adapter", "outcome", "le")


def metrics(server: Server) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their labels."""
    text = httpx2.get(f"http://127.0.0.1:{server.port}/metrics").text
    return {
        (
            sample.name.removeprefix("raytune_llama_"),
            *(sample.labels[label] for label in LABELS if label in sample.labels),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_tokens_and_times_are_counted_by_model(server: Server) -> None:
    client = server.client()
    told = client.completions.create(model="tiny", prompt="the quick", max_tokens=7, temperature=0)
    list(client.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True, n=2))
    assert told.usage is not None
    counted = metrics(server)
    assert counted["prompt_tokens_total", "tiny", ""] >= told.usage.prompt_tokens + 1
    assert 7 < counted["completion_tokens_total", "tiny", ""] <= 7 + 6
    assert counted["answers_total", "tiny", "", "ok"] == 2
    assert counted["time_to_first_token_seconds_count", "tiny", ""] == 2
    assert counted["time_per_output_token_seconds_count", "tiny", ""] >= 1
    assert counted["request_seconds_count", "tiny", ""] == 2
    assert counted["http_requests_total", "/v1/completions", "200"] == 2
    assert counted["requests_running", "tiny", ""] == 0
    assert counted["requests_waiting", "tiny", ""] == 0


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
    counted = metrics(server)
    assert counted["answers_total", "busy", "", "busy"] == 1
    assert counted["answers_total", "broken", "", "failed"] == 1
    assert counted["answers_total", "tiny", "", "refused"] == 1
    assert counted["http_requests_total", "/v1/completions", "404"] == 3
    assert not any("made-up" in part for key in counted for part in key)
    assert all(value == 0 for key, value in counted.items() if key[0].startswith("requests_"))


def test_what_callers_make_up_makes_no_labels(server: Server) -> None:
    for number in range(5):
        httpx2.get(f"http://127.0.0.1:{server.port}/no/{number}")
        httpx2.post(
            f"http://127.0.0.1:{server.port}/v1/completions",
            json={"model": f"tiny:adapter-{number}", "prompt": "a", "max_tokens": 1},
        )
    counted = metrics(server)
    assert counted["http_requests_total", "other", "404"] == 5
    assert not any("adapter-" in part for key in counted for part in key)


def test_a_client_that_leaves_is_counted_as_gone(server: Server) -> None:
    stream = server.client().completions.create(
        model="tiny", prompt="a", max_tokens=120, stream=True, temperature=1, seed=3
    )
    next(stream)
    stream.close()
    deadline = time.monotonic() + 30
    while ("answers_total", "tiny", "", "gone") not in metrics(server):
        assert time.monotonic() < deadline
    assert metrics(server)["requests_running", "tiny", ""] == 0


def test_a_key_that_asks_too_much_must_wait_and_others_need_not(
    answerer: CompletionService,
) -> None:
    key, line = make_key()
    other, other_line = make_key()
    meter = ServeMetrics()
    server = Server(
        {"tiny": Here(answerer)},
        ApiKeys((bytes.fromhex(line), bytes.fromhex(other_line))),
        metrics=meter,
        rate_limiter=LocalRateLimitClient(KeyLimits(requests_per_minute=2), meter),
    )
    try:
        for _ in range(2):
            server.client(key).completions.create(model="tiny", prompt="a", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client(key).completions.create(model="tiny", prompt="a", max_tokens=1)
        assert 0 < int(caught.value.response.headers["Retry-After"]) <= 30
        assert caught.value.code == "rate_limit_exceeded"
        server.client(other).completions.create(model="tiny", prompt="a", max_tokens=1)
        # Reading costs nothing.
        assert server.client(key).models.list().data
    finally:
        server.close()


class Silent(Failing):
    """A model that never says a word."""

    async def answer(self, request: Asked) -> AsyncGenerator[int | OutputDelta, None]:  # noqa: ARG002
        yield 3
        await asyncio.Event().wait()


def test_answers_that_do_not_come_in_time_are_counted_as_late() -> None:
    server = Server({"silent": Silent(EngineError(""), 0)}, limits=RequestLimits(queue_seconds=0.2))
    try:
        with pytest.raises(openai.InternalServerError):
            server.client().completions.create(model="silent", prompt="a")
        counted = metrics(server)
        assert counted["answers_total", "silent", "", "late"] == 1
        assert counted["requests_waiting", "silent", ""] == 0
    finally:
        server.close()


def test_the_dashboard_asks_for_what_is_told() -> None:
    dashboard = json.loads((REPOSITORY / "serve" / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"raytune_llama_\w+", target["expr"])
    }
    families = ServeMetrics().families()
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket",)}
    told = {f.name + suffix for f in families for suffix in suffixes[f.type]}
    assert asked == told
