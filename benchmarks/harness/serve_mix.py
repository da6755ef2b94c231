"""A mix of requests: whole and streamed ones, clients that disconnect, and invalid ones."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from .endpoint import MODEL_NAME
from .serve_driver import NO_STATUS, HttpSession, RequestResult, read_stream
from .serve_material import Prompt

CLIENT_GONE = 499
"""In place of a status: the client has disconnected, as it was to, while its answer was running."""

REFUSED = frozenset({429})
"""Statuses of a refusal for load."""

_COMPLETIONS, _CHAT = "/completions", "/chat/completions"
_EVENTS_BEFORE_LEAVING = 2


@dataclass(frozen=True, eq=False)
class RequestKind:
    """A kind of request."""

    name: str
    route: str
    fields: dict[str, Any]
    """Fields of its body, besides model and prompt."""

    weight: int
    """Requests of this kind in a round of the mix."""

    expected: int = 200
    """Its status, if it is not refused for load."""

    body: bytes | None = None
    """Body that is sent in place of a JSON object."""

    @property
    def is_streamed(self) -> bool:
        """Whether its answer is a stream."""
        return self.fields.get("stream", False)


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_LONG = {**_STREAMED, "max_tokens": 64}
KINDS = (
    RequestKind("streamed completion", _COMPLETIONS, _STREAMED, 12),
    RequestKind("streamed chat", _CHAT, _STREAMED, 10),
    RequestKind("completion", _COMPLETIONS, {}, 6),
    RequestKind("chat", _CHAT, {}, 6),
    RequestKind("client disconnects", _COMPLETIONS, _LONG, 2, CLIENT_GONE),
    RequestKind("client disconnects, chat", _CHAT, _LONG, 1, CLIENT_GONE),
    RequestKind("invalid field", _COMPLETIONS, {"temperature": -1}, 1, 400),
    RequestKind("not JSON", _CHAT, {}, 1, 400, b'{"model": '),
    RequestKind("unknown model", _CHAT, {"model": "unknown"}, 1, 404),
)
"""Kinds of requests of a soak test."""


class MixedClient(HttpSession):
    """Sends requests of all kinds in an order drawn from a seed."""

    def __init__(
        self, url: str, prompts: Sequence[Prompt], *, num_new: int, seed: int, seconds: float
    ) -> None:
        """Prepare to ask.

        Args:
            url: base URL of the endpoint, as `http://127.0.0.1:8000/v1`.
            prompts: texts of the prompts and messages.
            num_new: new tokens of a request; an answer may end before.
            seed: of the order.
            seconds: after which a request has failed.
        """
        self._url, self._prompts, self._num_new = url, prompts, num_new
        self._order = [kind for kind in KINDS for _ in range(kind.weight)]
        random.Random(seed).shuffle(self._order)
        super().__init__(seconds)

    def kind_of(self, number: int) -> RequestKind:
        """Return the kind of the request of a number."""
        return self._order[number % len(self._order)]

    async def ask(self, number: int) -> RequestResult:
        """Send a request and read its answer; what goes wrong is in the outcome."""
        assert self._session is not None, "used outside of `async with`"
        kind = self.kind_of(number)
        outcome = RequestResult(started=time.perf_counter())
        try:
            async with self._session.post(
                self._url + kind.route,
                data=self._body(kind, number),
                headers={"Content-Type": "application/json"},
            ) as answer:
                await _read_answer(answer, kind, outcome)
        except (TimeoutError, aiohttp.ClientError, ValueError, LookupError) as error:
            outcome.status, outcome.error = NO_STATUS, repr(error)
        outcome.seconds = time.perf_counter() - outcome.started
        return outcome

    def _body(self, kind: RequestKind, number: int) -> bytes:
        if kind.body is not None:
            return kind.body
        text = self._prompts[number % len(self._prompts)].text
        prompt: dict[str, Any] = (
            {"messages": [{"role": "user", "content": text}]}
            if kind.route == _CHAT
            else {"prompt": text}
        )
        common = {"model": MODEL_NAME, "max_tokens": self._num_new, "seed": number}
        return json.dumps({**common, **prompt, **kind.fields}).encode()


async def _read_answer(
    answer: aiohttp.ClientResponse, kind: RequestKind, outcome: RequestResult
) -> None:
    """Read an answer, or as much of it as the client waits for."""
    if answer.status != 200:
        outcome.status = answer.status
        outcome.error = (await answer.text())[:500]
        outcome.retry_after = answer.headers.get("Retry-After")
    elif kind.expected == CLIENT_GONE:
        for _ in range(_EVENTS_BEFORE_LEAVING):
            if not (await answer.content.readuntil(b"\n\n")).startswith(b"data: {"):
                raise ValueError("the stream ended before its client left")
        answer.close()
        outcome.status = CLIENT_GONE
    elif kind.is_streamed:
        await read_stream(answer, outcome)
    else:
        told = await answer.json()
        outcome.finish = told["choices"][0]["finish_reason"]
        outcome.num_tokens = told["usage"]["completion_tokens"]
        outcome.status = 200 if outcome.finish else NO_STATUS
