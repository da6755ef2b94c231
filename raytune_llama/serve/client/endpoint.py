"""A client of any OpenAI endpoint: lists its models, and streams answers of chats.

with closing(ChatClient("http://127.0.0.1:8000/v1", key=None)) as client:
for item in client.stream({"model": "merged", "messages": [...]}):
...
"""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from raytune_llama.config.errors import UserError

CONNECT_SECONDS = 10.0
_MAX_SHOWN = 300


class EndpointError(Exception):
    """The endpoint can't be reached, has failed, or has broken off an answer; try again later."""


class RequestRejectedError(UserError):
    """The endpoint refuses what it is asked, as with a wrong key or an unknown model."""


@dataclass(frozen=True)
class StreamEnd:
    """What is told behind an answer's text."""

    finish_reason: str | None
    """Why it has ended: `stop`, `length`; None: the endpoint does not say."""

    prompt_tokens: int | None
    """None: the endpoint does not count."""

    completion_tokens: int | None
    """None: the endpoint does not count."""


class ChatClient:
    """Asks one endpoint. Errors name its address, never the key."""

    def __init__(self, url: str, key: str | None, *, timeout_seconds: float = 300.0) -> None:
        """Make a client; nothing is asked yet.

        Args:
            url: of the API, up to `/v1`.
            key: sent with each request; None: none is.
            timeout_seconds: silence of the endpoint after which a request has failed.

        Raises:
            RefusedError: the key can't be sent in a header.
        """
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise RequestRejectedError(
                "OPENAI_API_KEY has a space or a sign that no key has; copy it again"
            )
        self._url = url.rstrip("/")
        self._http = httpx2.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds)),
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def list_models(self) -> list[str]:
        """Return the names of the models, `model:adapter` among them.

        Raises:
            EndpointError: there is no answer, or none in OpenAI's form.
            RefusedError: the endpoint refuses to tell.
        """
        with self._told():
            response = self._http.get(f"{self._url}/models")
            self._check(response)
            try:
                return [str(card["id"]) for card in response.json()["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise EndpointError(f"{self._url}/models is no list of OpenAI's form") from error

    def stream(self, request: Mapping[str, Any]) -> Generator[str | StreamEnd]:
        """Yield the pieces of a chat's answer as they come, and its end.

        A caller that closes the iterator ends the request.

        Args:
            request: fields of `/chat/completions`; those of streams are added.

        Raises:
            EndpointError: there is no answer, or it is broken off.
            RefusedError: the endpoint refuses the request.
        """
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        with (
            self._told(),
            self._http.stream("POST", f"{self._url}/chat/completions", json=body) as response,
        ):
            if not response.is_success:
                response.read()
            self._check(response)
            yield from self._read(response)

    def _read(self, response: httpx2.Response) -> Iterator[str | StreamEnd]:
        finish: str | None = None
        usage: Mapping[str, int] = {}
        for event in httpx2.EventSource(response):
            if event.data == "[DONE]":
                counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
                yield StreamEnd(finish, *counts)
                return
            try:
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise EndpointError(f"{self._url}: {chunk['error']['message']}")
                usage = chunk.get("usage") or usage
                choice: dict[str, Any] = (chunk["choices"] or [{"delta": {}}])[0]
                finish = choice.get("finish_reason") or finish
                piece = choice["delta"].get("content")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                shown = event.data[:_MAX_SHOWN]
                raise EndpointError(f"{self._url} sent no chunk of an answer: {shown}") from error
            if piece:
                yield piece
        raise EndpointError(f"{self._url}: the connection ended before the answer did")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Put what goes wrong on the way in words."""
        try:
            yield
        except httpx2.ConnectError as error:
            raise EndpointError(f"{self._url} can't be reached: {error}") from error
        except httpx2.TimeoutException as error:
            raise EndpointError(f"{self._url} is silent for too long ({error})") from error
        except httpx2.RequestError as error:
            raise EndpointError(f"{self._url}: the answer broke off: {error}") from error

    def _check(self, response: httpx2.Response) -> None:
        """Raise what a status means."""
        status = response.status_code
        if response.is_success:
            return
        try:
            said = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            # Not OpenAI's form, as from a proxy in between.
            said = response.text.strip()[:_MAX_SHOWN] or response.reason_phrase
        text = f"{self._url} answers {status}: {said}"
        if status == 401:
            text += "\nset the environment variable OPENAI_API_KEY to a key of this endpoint"
        wait = response.headers.get("retry-after")
        if wait:
            text += f"\ntry again {f'in {wait} s' if wait.isdecimal() else f'after {wait}'}"
        if 400 <= status < 500 and status != 429:
            raise RequestRejectedError(text)
        raise EndpointError(text)
