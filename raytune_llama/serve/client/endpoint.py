"""A client for any OpenAI-compatible endpoint: lists models and streams chat completions.

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
    """The endpoint can't be reached, has failed or dropped the connection; retry later."""


class RequestRejectedError(UserError):
    """The endpoint rejected the request, for example for a wrong key or an unknown model."""


@dataclass(frozen=True)
class StreamEnd:
    """End of a streamed response."""

    finish_reason: str | None
    """Why generation ended, such as `stop` or `length`; None if the endpoint does not report it."""

    prompt_tokens: int | None
    """Number of prompt tokens; None if the endpoint does not report it."""

    completion_tokens: int | None
    """Number of completion tokens; None if the endpoint does not report it."""


class ChatClient:
    """Client of one endpoint. Errors contain its address, never the key."""

    def __init__(self, url: str, key: str | None, *, timeout_seconds: float = 300.0) -> None:
        """Create a client; it does not connect yet.

        Args:
            url: base URL of the API, up to `/v1`.
            key: API key sent with each request; None: no key.
            timeout_seconds: seconds without data from the endpoint after which a request fails.

        Raises:
            RequestRejectedError: the key can't be sent in a header.
        """
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise RequestRejectedError(
                "OPENAI_API_KEY contains a space or a character that no API key has; copy it again"
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
        """Return the names of the models, `model:adapter` included.

        Raises:
            EndpointError: there is no response, or none in OpenAI's format.
            RequestRejectedError: the endpoint rejected the request.
        """
        with self._translate_errors():
            response = self._http.get(f"{self._url}/models")
            self._check(response)
            try:
                return [str(card["id"]) for card in response.json()["data"]]
            except (ValueError, KeyError, TypeError) as error:
                text = f"{self._url}/models returned no model list in OpenAI's format"
                raise EndpointError(text) from error

    def stream(self, request: Mapping[str, Any]) -> Generator[str | StreamEnd]:
        """Yield the text of a chat completion as it arrives, then its end.

        Closing the generator cancels the request.

        Args:
            request: fields of `/chat/completions`; `stream` and `stream_options` are added.

        Raises:
            EndpointError: there is no response, or it was interrupted.
            RequestRejectedError: the endpoint rejected the request.
        """
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        with (
            self._translate_errors(),
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
                text = choice["delta"].get("content")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                shown = event.data[:_MAX_SHOWN]
                raise EndpointError(f"{self._url} sent an invalid chunk: {shown}") from error
            if text:
                yield text
        raise EndpointError(f"{self._url}: connection closed before the response was complete")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise transport errors as `EndpointError`."""
        try:
            yield
        except httpx2.ConnectError as error:
            raise EndpointError(f"{self._url} can't be reached: {error}") from error
        except httpx2.TimeoutException as error:
            raise EndpointError(f"{self._url}: request timed out ({error})") from error
        except httpx2.RequestError as error:
            raise EndpointError(f"{self._url}: connection lost: {error}") from error

    def _check(self, response: httpx2.Response) -> None:
        """Raise the error that a response's status means."""
        status = response.status_code
        if response.is_success:
            return
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            # Not in OpenAI's format, for example from a proxy.
            message = response.text.strip()[:_MAX_SHOWN] or response.reason_phrase
        text = f"{self._url} returned {status}: {message}"
        if status == 401:
            text += "\nset the environment variable OPENAI_API_KEY to an API key of this endpoint"
        wait = response.headers.get("retry-after")
        if wait:
            text += f"\ntry again {f'in {wait} s' if wait.isdecimal() else f'after {wait}'}"
        if 400 <= status < 500 and status != 429:
            raise RequestRejectedError(text)
        raise EndpointError(text)
