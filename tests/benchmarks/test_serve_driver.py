"""What measures the endpoint: loops that ask, and what they make of answers."""

import asyncio
import itertools
import json
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.serve_driver import (
    HttpClient,
    LoadResult,
    RequestResult,
    closed_loop,
    open_loop,
    percentile,
    poisson_arrivals,
)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1),
    st.floats(0.001, 100),
)
def test_percentile_is_the_smallest_value_that_so_many_do_not_exceed(
    values: list[float], percent: float
) -> None:
    found = percentile(values, percent)
    wanted = percent / 100 * len(values)
    assert found in values
    assert sum(value <= found for value in values) >= wanted
    assert sum(value < found for value in values) < wanted


def test_arrivals_come_at_the_rate_and_independently() -> None:
    times = poisson_arrivals(50, 200, seed=3)
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 200
    # The count of such times has the deviation of its root, 100; waits deviate by their mean.
    assert abs(len(times) - 10_000) < 400
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.stdev(waits) == pytest.approx(statistics.mean(waits), rel=0.05)
    assert times == poisson_arrivals(50, 200, seed=3)
    assert times != poisson_arrivals(50, 200, seed=4)


def test_closed_loop_keeps_so_many_clients_busy_and_asks_each_once() -> None:
    now = most = 0

    async def ask(number: int) -> RequestResult:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return RequestResult(status=200, num_tokens=number)

    load = asyncio.run(closed_loop(ask, num_clients=3, num_requests=10))
    assert most == 3
    assert [one.num_tokens for one in load.outcomes] == list(range(10))


def test_open_loop_sends_whether_or_not_others_were_answered() -> None:
    async def run() -> LoadResult:
        all_sent = asyncio.Event()
        sent: list[int] = []

        async def ask(number: int) -> RequestResult:
            sent.append(number)
            if len(sent) == 4:
                all_sent.set()
            await all_sent.wait()
            return RequestResult(status=200)

        async with asyncio.timeout(30):
            return await open_loop(ask, [0.0, 0.01, 0.02, 0.03])

    load = asyncio.run(run())
    assert len(load.answered) == 4
    assert load.seconds >= 0.03


def test_load_counts_whole_answers_only() -> None:
    whole = RequestResult(status=200, first_token=0.5, last_token=2.5, seconds=3.0, num_tokens=5)
    single = RequestResult(status=200, first_token=0.5, last_token=0.5, seconds=0.5, num_tokens=1)
    others = [RequestResult(status=status, num_tokens=9) for status in (429, 503, 0)]
    load = LoadResult([whole, single, *others], seconds=2.0)
    assert load.tokens_per_second == 3.0
    assert load.requests_per_second == 1.0
    assert load.per_token_seconds == [0.5]
    assert load.statuses == {0: 1, 200: 2, 429: 1, 503: 1}
    assert load.refused_share == 0.4
    assert load.num_failed == 1


@asynccontextmanager
async def endpoint() -> AsyncIterator[str]:
    """A server of which the route says what goes wrong."""

    def event(content: object) -> bytes:
        return b"data: " + json.dumps(content).encode() + b"\n\n"

    def text(content: str, finish: str | None = None) -> bytes:
        return event({"choices": [{"index": 0, "text": content, "finish_reason": finish}]})

    streams = {
        "whole": [
            text(""),
            text("one "),
            text("two", "length"),
            event({"choices": [], "usage": {"completion_tokens": 3}}),
            b"data: [DONE]\n\n",
        ],
        "chat": [
            event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
            event({"choices": [{"index": 0, "delta": {"content": "one"}}]}),
            event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
        ],
        "cut": [text("one "), text("two")],
        "failed": [text("one "), event({"error": {"message": "the engine has failed"}})],
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        kind = request.match_info["kind"]
        assert (await request.json())["stream"] is True
        if kind == "busy":
            return web.json_response({"error": {}}, status=429, headers={"Retry-After": "1"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for one in streams[kind]:
            await response.write(one)
        return response

    app = web.Application()
    app.router.add_post("/{kind}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def ask(kind: str) -> RequestResult:
    async def run() -> RequestResult:
        async with endpoint() as url, HttpClient(f"{url}/{kind}", [{"prompt": "x"}]) as client:
            return await client.ask(0)

    return asyncio.run(run())


def test_client_reads_a_whole_completion_and_its_count() -> None:
    outcome = ask("whole")
    assert (outcome.status, outcome.text, outcome.finish) == (200, "one two", "length")
    assert outcome.num_tokens == 3
    assert 0 < outcome.first_token <= outcome.last_token <= outcome.seconds


def test_client_counts_parts_where_the_server_counts_nothing() -> None:
    outcome = ask("chat")
    assert (outcome.status, outcome.text, outcome.finish) == (200, "one", "stop")
    assert outcome.num_tokens == 1


def test_client_tells_a_refusal_and_how_long_to_wait() -> None:
    outcome = ask("busy")
    assert (outcome.status, outcome.retry_after) == (429, "1")


@pytest.mark.parametrize("kind", ["cut", "failed"])
def test_client_takes_no_part_of_an_answer_for_the_whole(kind: str) -> None:
    outcome = ask(kind)
    assert outcome.status == 0
    assert outcome.error


def test_client_tells_that_nobody_listens() -> None:
    async def run() -> RequestResult:
        async with endpoint() as url:
            pass
        async with HttpClient(f"{url}/whole", [{}]) as client:
            return await client.ask(0)

    assert asyncio.run(run()).status == 0
