"""Asks an endpoint, or anything else that answers, and measures: pure asyncio, knows no Ray.

    async with HttpClient(url, bodies) as client:
        load = await closed_loop(client.ask, num_clients=16, num_requests=64)
    print(load.tokens_per_second, percentile(load.first_token_seconds, 99))

A closed loop has so many clients, each of which asks again when it was answered. An open loop asks
at given times whatever the answers do, as the world outside does.
"""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

NO_STATUS = 0
"""In place of a status: the connection failed, or the answer ended before its end."""

_DONE = "[DONE]"


@dataclass
class RequestResult:
    """What became of one request; all times in seconds from when it was to be sent."""

    status: int = NO_STATUS
    """Of HTTP; 200 only where the answer came whole."""

    first_token: float = math.nan
    """To the first text."""

    last_token: float = math.nan
    """To the last text."""

    seconds: float = 0.0
    """To the end."""

    num_tokens: int = 0
    """Generated, as the other side counts them; where it does not, its parts with text."""

    text: str = ""
    finish: str | None = None
    """Why the answer ended, as the other side says."""

    error: str = ""
    """Beginning of what was said beside another status than 200."""

    retry_after: str | None = None
    """Header of a refusal."""

    started: float = math.nan
    """When it was sent, on the clock of `time.perf_counter`."""

    @property
    def per_token(self) -> float:
        """Seconds for each token behind the first; not a number where there is none."""
        return (self.last_token - self.first_token) / (self.num_tokens - 1 or math.nan)


SendRequest = Callable[[int], Awaitable[RequestResult]]
"""Sends the request of a number and awaits its answer; what goes wrong there is in the outcome."""


@dataclass
class LoadResult:
    """What came of many requests."""

    outcomes: list[RequestResult] = field(default_factory=list)
    """In the order in which they were sent."""

    seconds: float = 0.0
    """From the first request to the last answer."""

    @property
    def answered(self) -> list[RequestResult]:
        """Those that came whole."""
        return [one for one in self.outcomes if one.status == 200]

    @property
    def statuses(self) -> dict[int, int]:
        """How many requests had each status."""
        return dict(sorted(Counter(one.status for one in self.outcomes).items()))

    @property
    def refused_share(self) -> float:
        """Part of the requests that were refused for load: 429 and 503."""
        refused = sum(one.status in {429, 503} for one in self.outcomes)
        return refused / max(1, len(self.outcomes))

    @property
    def num_failed(self) -> int:
        """Requests neither answered nor refused for load."""
        return sum(one.status not in {200, 429, 503} for one in self.outcomes)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of whole answers."""
        return sum(one.num_tokens for one in self.answered) / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Whole answers."""
        return len(self.answered) / self.seconds

    @property
    def first_token_seconds(self) -> list[float]:
        """Of each whole answer that has text."""
        return [one.first_token for one in self.answered if not math.isnan(one.first_token)]

    @property
    def per_token_seconds(self) -> list[float]:
        """Of each whole answer of at least two tokens."""
        return [one.per_token for one in self.answered if not math.isnan(one.per_token)]

    @property
    def request_seconds(self) -> list[float]:
        """Of each whole answer."""
        return [one.seconds for one in self.answered]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` % of the values do not exceed; NaN without values.

    The nearest rank: always a value that was measured.
    """
    if not values:
        return math.nan
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(1, rank) - 1]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return independent times within so many seconds, on average `rate` a second."""
    generator = random.Random(seed)
    times: list[float] = []
    now = generator.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += generator.expovariate(rate)
    return times


async def closed_loop(ask: SendRequest, *, num_clients: int, num_requests: int) -> LoadResult:
    """Let so many clients send the requests 0, 1, ... between them, each one after the other."""
    outcomes: dict[int, RequestResult] = {}
    numbers = iter(range(num_requests))

    async def client() -> None:
        for number in numbers:
            outcomes[number] = await ask(number)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    seconds = time.perf_counter() - started
    return LoadResult([outcomes[number] for number in sorted(outcomes)], seconds)


async def open_loop(ask: SendRequest, arrivals: Sequence[float]) -> LoadResult:
    """Send a request at each of the times, in seconds from now, and await all answers."""
    started = time.perf_counter()

    async def one(number: int, when: float) -> RequestResult:
        await asyncio.sleep(started + when - time.perf_counter())
        return await ask(number)

    outcomes = await asyncio.gather(*(one(n, when) for n, when in enumerate(arrivals)))
    return LoadResult(outcomes, time.perf_counter() - started)


def find_queued(load: LoadResult, num_slots: int) -> list[RequestResult]:
    """Return the whole answers that had to wait for a slot, in the order of their arrival.

    A request waits if, when it is sent, at least `num_slots` earlier ones that are answered whole
    have not ended.
    """
    answered = sorted(
        (one for one in load.answered if not math.isnan(one.first_token)),
        key=lambda one: one.started,
    )
    running: list[float] = []
    queued: list[RequestResult] = []
    for one in answered:
        running = [end for end in running if end > one.started]
        if len(running) >= num_slots:
            queued.append(one)
        running.append(one.started + one.seconds)
    return queued


def reordered_share(queued: Sequence[RequestResult], tie_seconds: float = 0.0) -> float:
    """Return the share of pairs that waited at the same time and were not served as they came.

    Args:
        queued: requests by arrival.
        tie_seconds: up to so much earlier, a later request's first token counts as simultaneous.

    Returns:
        Of the pairs of which the second arrived before the first one's first token: those whose
        first tokens came in the other order. Not a number without such pairs.
    """
    together = reordered = 0
    for number, first in enumerate(queued):
        token = first.started + first.first_token
        for second in queued[number + 1 :]:
            if second.started >= token:
                break
            together += 1
            reordered += second.started + second.first_token < token - tie_seconds
    return reordered / together if together else math.nan


class HttpSession:
    """Connections of a client, open within `async with`."""

    def __init__(self, timeout_seconds: float) -> None:
        """Prepare; a request fails after so many seconds."""
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the connections' pool, which has no bound."""
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


class HttpClient(HttpSession):
    """Sends streamed requests to an endpoint that speaks OpenAI's API."""

    def __init__(
        self,
        url: str,
        bodies: Sequence[dict[str, Any]],
        *,
        key: str | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        """Prepare to ask.

        Args:
            url: of the route, as `http://127.0.0.1:8000/v1/completions`.
            bodies: requests; the request of number n is the one at n modulo their count. All are
                streamed.
            key: API key.
            timeout_seconds: after which a request has failed.
        """
        self._url = url
        self._bodies = [json.dumps({**body, "stream": True}).encode() for body in bodies]
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        super().__init__(timeout_seconds)

    async def ask(self, number: int) -> RequestResult:
        """Send a request and read its answer; what goes wrong is in the outcome."""
        assert self._session is not None, "used outside of `async with`"
        outcome = RequestResult(started=time.perf_counter())
        body = self._bodies[number % len(self._bodies)]
        try:
            async with self._session.post(self._url, data=body, headers=self._headers) as answer:
                if answer.status == 200:
                    await read_stream(answer, outcome)
                else:
                    outcome.status = answer.status
                    outcome.error = (await answer.text())[:500]
                    outcome.retry_after = answer.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome.status, outcome.error = NO_STATUS, repr(error)
        outcome.seconds = time.perf_counter() - outcome.started
        return outcome


async def read_stream(answer: aiohttp.ClientResponse, outcome: RequestResult) -> None:
    """Read server-sent events to their end; the status is set where they have one."""
    num_parts, counted = 0, None
    async for line in answer.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip().decode()
        if data == _DONE:
            break
        event = json.loads(data)
        if "error" in event:
            outcome.error = data[:500]
            return
        counted = (event.get("usage") or {}).get("completion_tokens", counted)
        for text, finish in _choices(event):
            if text:
                outcome.last_token = time.perf_counter() - outcome.started
                if not num_parts:
                    outcome.first_token = outcome.last_token
                num_parts += 1
                outcome.text += text
            outcome.finish = finish or outcome.finish
    outcome.num_tokens = num_parts if counted is None else counted
    # Some servers send no end mark; an answer that is whole has a reason for its end.
    if outcome.finish is None:
        outcome.error = "the stream ended before the answer did"
    else:
        outcome.status = 200


def _choices(event: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    for choice in event.get("choices", ()):
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        yield text, choice.get("finish_reason")
