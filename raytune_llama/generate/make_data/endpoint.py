"""Requests to an OpenAI-compatible endpoint, repeated while the cause of a failure may pass.

    async with Endpoint(config, key) as endpoint:
        reply = await endpoint.ask(prompt, model)

Rate limits (429), server errors (5xx), time-outs and lost connections are repeated after a delay
that grows, or that the server asks for. Any other refusal ends the job. So does an endpoint from
which nothing has ever come: it is most likely the wrong address, or not running.
"""

import asyncio
import email.utils
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import httpx2
import openai
from pydantic import BaseModel, ValidationError

from raytune_llama.config.errors import UserError
from raytune_llama.generate.make_data.config import MakeDataConfig

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
_LIST_SECONDS = 30.0
_REFUSED_STATUSES = ("400", "422")
"""Statuses of a prompt that is refused, as by a content filter, or of a mistake in the config."""

_REPEATED_STATUSES = (408, 409, 429)
_MAX_SHOWN = 300


@dataclass(frozen=True)
class Delays:
    """Delays before a request is repeated, in seconds; each is shortened at random by up to half.

    What the header Retry-After asks for is neither shortened nor limited.
    """

    first_seconds: float = 1.0
    """Delay before the second try; it doubles from try to try."""

    max_seconds: float = 60.0
    """Longest delay."""

    def choose(self, num_tries: int) -> float:
        """Return the delay after a number of tries."""
        longest = min(self.max_seconds, self.first_seconds * 2.0 ** min(num_tries - 1, 60))
        return longest * random.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Reply:
    """Answer to one request."""

    text: str | None
    """Text of the message; None if it has none, such as a refusal, or if the endpoint gave no
    answer in all tries."""

    failure: str | None = None
    """Why there is no text; None if there is one."""

    finish_reason: str | None = None
    """Why generation ended, such as `stop` or `length`; None if the endpoint does not report it."""

    model: str | None = None
    """Model that the endpoint names as the author."""

    prompt_tokens: int | None = None
    """Number of prompt tokens; None if the endpoint does not report it."""

    completion_tokens: int | None = None
    """Number of completion tokens; None if the endpoint does not report it."""

    retries: Mapping[str, int] = field(default_factory=dict)
    """Number of failed tries before the answer, by cause."""


@dataclass(frozen=True)
class _Failure:
    """A failed try, and whether the next one may succeed."""

    cause: str
    words: str
    is_final: bool
    delay_seconds: float | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message | None = None
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    """What is read of a chat completion; the client's own class accepts any types."""

    choices: list[_Choice]
    model: str | None = None
    usage: _Usage | None = None


class _Model(BaseModel):
    id: str


class _ModelList(BaseModel):
    data: list[_Model]


class Endpoint:
    """Client of one endpoint, within an `async with` block. Messages never contain the key."""

    def __init__(
        self, config: MakeDataConfig, key: str | None, delays: Delays | None = None
    ) -> None:
        """Create a client; it does not connect yet.

        Args:
            config: Config of the job.
            key: API key; None: no key is sent.
            delays: Delays before a request is repeated; None: the defaults.
        """
        self._config = config
        self._delays = delays or Delays()
        self._num_answers = 0
        # The client requires a key.
        self._headers = {} if key else {"Authorization": openai.Omit()}
        timeout = config.timeout_seconds
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=key or "none",
            max_retries=0,  # its own retries are neither counted nor logged
            timeout=httpx2.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def find_model(self) -> str:
        """Return the model in the config, or the endpoint's only one.

        Raises:
            UserError: The endpoint does not list its models, or has none or several.
        """
        if self._config.model is not None:
            return self._config.model
        url = self._config.base_url
        try:
            listed = await self._client.models.with_raw_response.list(
                extra_headers=self._headers, timeout=_LIST_SECONDS
            )
            names = [model.id for model in _ModelList.model_validate_json(listed.content).data]
        except openai.APIStatusError as error:
            raise UserError(f"base_url: {url}: {_status_failure(error).words}") from error
        except openai.APIConnectionError as error:
            raise UserError(f"base_url: {url} cannot be reached: {_describe(error)}") from error
        except ValidationError as error:
            words = "lists no models in OpenAI's format; check it, or set model to a name"
            raise UserError(f"base_url: {url} {words}") from error
        if len(names) != 1:
            some = ", ".join(names[:20]) or "none"
            raise UserError(f"model: the models of {url} are {some}; set model to one of them")
        return names[0]

    async def ask(self, number: int, text: str, model: str) -> Reply:
        """Send a prompt and return the answer.

        Args:
            number: Number of the request, for messages.
            text: The user's message.
            model: Name of the model.

        Raises:
            UserError: The endpoint refuses the first request, or none of the tries was answered and
                neither was any other request in the meantime.
        """
        retries: Counter[str] = Counter()
        before = self._num_answers
        for num_tries in range(1, self._config.max_tries + 1):
            tried = await self._try_once(text, model)
            if isinstance(tried, _Completion):
                self._num_answers += 1
                return _reply(tried, retries)
            if tried.cause in _REFUSED_STATUSES and self._num_answers:
                # Of others it has not refused the same parameters: it is this prompt.
                return Reply(None, failure=tried.words, retries=dict(retries))
            if tried.is_final or (tried.cause != "429" and not self._has_answered(tried)):
                raise UserError(f"{self._config.base_url}: {tried.words}")
            retries[tried.cause] += 1
            if num_tries < self._config.max_tries:
                delay = tried.delay_seconds or self._delays.choose(num_tries)
                logger.warning(
                    "request %d: %s; try %d of %d in %.1f s",
                    *(number, tried.words, num_tries + 1, self._config.max_tries, delay),
                )
                await asyncio.sleep(delay)
            elif self._num_answers == before:
                raise UserError(
                    f"{self._config.base_url}: no request was answered in {num_tries} tries; the "
                    f"last failure: {tried.words}"
                )
            else:
                failure = f"no answer in {num_tries} tries: {tried.words}"
                return Reply(None, failure, retries=retries)
        raise AssertionError("the last try returns or raises")

    def _has_answered(self, failure: _Failure) -> bool:
        """Whether anything has come from the endpoint that shows it to be one."""
        is_reached = failure.cause not in {"connection", "invalid_response"}
        return is_reached or self._num_answers > 0

    async def _try_once(self, text: str, model: str) -> _Completion | _Failure:
        sampling = self._config.sampling
        given = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        parameters: dict[str, Any] = {
            name: value for name, value in given.items() if value is not None
        }
        try:
            answer = await self._client.chat.completions.with_raw_response.create(
                model=model,
                messages=[{"role": "user", "content": text}],
                extra_body=dict(sampling.extra_body) or None,
                extra_headers=self._headers,
                **parameters,
            )
        except openai.APIStatusError as error:
            return _status_failure(error)
        except openai.APITimeoutError:
            seconds = self._config.timeout_seconds
            return _Failure("time_out", f"no data for {seconds:g} s", is_final=False)
        except openai.APIConnectionError as error:
            return _Failure("connection", f"no connection: {_describe(error)}", is_final=False)
        try:
            return _Completion.model_validate_json(answer.content)
        except ValidationError:
            shown = answer.content[:_MAX_SHOWN].decode(errors="replace")
            words = f"answered with no chat completion in OpenAI's format: {shown!r}"
            return _Failure("invalid_response", words, is_final=False)


def _reply(answer: _Completion, retries: Mapping[str, int]) -> Reply:
    choice = answer.choices[0] if answer.choices else _Choice()
    message, usage = choice.message or _Message(), answer.usage or _Usage()
    text, failure = message.content, None
    if text is None or not text.strip():
        refusal = f", refusal: {message.refusal}" if message.refusal else ""
        text, failure = None, f"no text (finish_reason {choice.finish_reason}{refusal})"
    return Reply(
        text=text,
        failure=failure,
        finish_reason=choice.finish_reason,
        model=answer.model,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        retries=dict(retries),
    )


def _status_failure(error: openai.APIStatusError) -> _Failure:
    status = error.status_code
    words = f"answered {status}: {_describe(error)}"
    # Not a limit per minute: the account has no credit.
    is_repeated = (status in _REPEATED_STATUSES or status >= 500) and (
        error.code != "insufficient_quota"
    )
    if status == 401:
        words += "; set the environment variable of api_key_variable to a key of this endpoint"
    if status == 404:
        words += "; check base_url and model"
    delay = _retry_after(error.response.headers)
    return _Failure(str(status), words, is_final=not is_repeated, delay_seconds=delay)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the delay that a server asks for, in seconds; None if it does not."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    date = email.utils.parsedate_tz(text)
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _describe(error: Exception) -> str:
    """Return an error in the endpoint's own words, or those of the network."""
    if isinstance(error, openai.APIStatusError):
        body = error.body
        words = body.get("message") if isinstance(body, dict) else None
        text = str(words or error.response.text.strip() or error.response.reason_phrase)
        return text[:_MAX_SHOWN]
    return f"{error.__cause__ or error}"[:_MAX_SHOWN] or type(error.__cause__ or error).__name__
