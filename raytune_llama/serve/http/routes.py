"""OpenAI's API over HTTP: requests in, answers or streams of them out. Knows no model and no Ray.

Every route but `/health` and the chat page asks for a key where there are keys. What goes wrong is
told in OpenAI's form. A stream's first part is awaited before its status is sent, so that a refusal
has its own.
"""

import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_llama.serve.config import KeyLimits
from raytune_llama.serve.errors import BusyError, EngineError, RequestError, UnknownModelError
from raytune_llama.serve.http.admission import ANYBODY, KEY_NAME, Admission, Books, LocalBooks
from raytune_llama.serve.http.embeddings import EmbeddingBackend, add_embeddings
from raytune_llama.serve.http.keys import Keys
from raytune_llama.serve.http.meter import CountRequests, Meter, MeteredAnswers, exposition
from raytune_llama.serve.http.page import add_page
from raytune_llama.serve.http.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorAnswer,
    ErrorBody,
    ModelCard,
    ModelList,
)
from raytune_llama.serve.http.shapes import Answer, ChatShape, CompletionShape, Counts, Shape
from raytune_llama.serve.parts import Part

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
"""Of a request; larger ones are refused as they arrive."""

RETRY_SECONDS = 1
"""What a client that was refused for load is told to wait."""

OPEN_PATHS = frozenset({"/", "/health"})
"""Routes that need no key."""


class Backend(EmbeddingBackend, Protocol):
    """A model that answers."""

    def answer(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[int | Part, None]:
        """Yield the prompt's number of tokens, then the parts of all answers.

        Raises:
            RequestError: the request can't be answered; before the first item.
            BusyError: as many requests wait as may; before the first part.
            EngineError: the model has failed.
        """
        ...

    async def adapters(self) -> Sequence[str]:
        """Return the names of the adapters that may stand behind the model's and a colon.

        Raises:
            EngineError: they can't be listed.
        """
        ...

    async def check(self) -> None:
        """Raise EngineError where the model can't answer."""
        ...


def build_http(
    backends: Mapping[str, Backend],
    keys: Keys,
    *,
    meter: Meter | None = None,
    books: Books | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        backends: models by the names that requests use.
        keys: who may ask.
        meter: what counts; None: one that is made here.
        books: what admits requests and adds counts up; None: this gateway stands alone, and no
            key is limited.
    """
    meter = meter or Meter()
    books = books or LocalBooks(KeyLimits(), meter)
    app = FastAPI(title="raytune_llama", docs_url=None, redoc_url=None)
    created = int(time.time())
    _add_errors(app)
    _add_watching(app, backends, books)
    # The last one added is the first one asked.
    app.add_middleware(Admission, books=books, refuse=_wait)
    app.add_middleware(_Guard, keys=keys)
    app.add_middleware(CountRequests, meter=meter)
    add_page(app)

    def backend_of(name: str) -> Backend:
        # What stands behind the colon is the backend's to know.
        base = name.partition(":")[0]
        if base not in backends:
            known = ", ".join(backends)
            raise UnknownModelError(f"no model {base!r}; there is {known}", "model")
        return backends[base]

    def counted(request: ChatRequest | CompletionRequest) -> AsyncGenerator[int | Part, None]:
        answers = backend_of(request.model).answer(request)
        return MeteredAnswers(meter, request.model).pass_on(answers)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """List the models."""
        return ModelList(
            data=[
                ModelCard(id=name, created=created)
                for base, backend in backends.items()
                for name in await _names(base, backend)
            ]
        )

    @app.get("/v1/models/{name}")
    async def model(name: str) -> ModelCard:
        """Describe a model."""
        if name not in await _names(name.partition(":")[0], backend_of(name)):
            raise UnknownModelError(f"no model {name!r}; /v1/models lists all", "model")
        return ModelCard(id=name, created=created)

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat(request: ChatRequest) -> Response:
        """Answer a conversation."""
        return await _respond(counted(request), request, ChatShape(request))

    @app.post("/v1/completions", response_model=Completion)
    async def complete(request: CompletionRequest) -> Response:
        """Go on with a text."""
        echoed = request.prompt if request.echo and isinstance(request.prompt, str) else ""
        shape = CompletionShape(request, echoed)
        return await _respond(counted(request), request, shape)

    add_embeddings(app, backend_of)
    return app


def _add_watching(app: FastAPI, backends: Mapping[str, Backend], books: Books) -> None:
    """Add the routes by which the endpoint is watched."""

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Say whether every model can answer."""
        for backend in backends.values():
            await backend.check()
        return Response(status_code=200)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Tell what all gateways have counted, as Prometheus reads it."""
        return Response(exposition(await books.families()), media_type=CONTENT_TYPE_LATEST)


async def _names(base: str, backend: Backend) -> list[str]:
    """Return what requests may call a model, with its adapters."""
    return [base, *(f"{base}:{name}" for name in await backend.adapters())]


async def _respond(
    items: AsyncGenerator[int | Part, None],
    request: ChatRequest | CompletionRequest,
    shape: Shape,
) -> Response:
    counts = Counts(prompt=_prompt_tokens(await anext(items)))
    if not request.stream:
        answers = [Answer() for _ in range(request.n)]
        async with aclosing(items):
            async for item in items:
                part = _part(item)
                answers[part.index].add(part)
                counts.completion += part.num_tokens
        return _json(shape.whole(answers, counts))
    # Refusals for load come with the first part, and must have their own status.
    first = _part(await anext(items))
    events = _events(first, items, request, shape, counts)
    return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)


_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _events(
    first: Part,
    items: AsyncGenerator[int | Part, None],
    request: ChatRequest | CompletionRequest,
    shape: Shape,
    counts: Counts,
) -> AsyncIterator[bytes]:
    """Yield server-sent events; closing them ends the answers."""
    async with aclosing(items):
        for chunk in shape.begin(request.n):
            yield _event(chunk)
        counts.completion += first.num_tokens
        yield _event(shape.part(first))
        try:
            async for item in items:
                part = _part(item)
                counts.completion += part.num_tokens
                # What changes nothing for the client is not sent.
                if part.text or part.calls or part.tokens or part.finish:
                    yield _event(shape.part(part))
        except EngineError as error:
            # The status is sent already.
            yield _event(ErrorAnswer(error=ErrorBody(message=str(error), type="server_error")))
            return
        if request.stream_options is not None and request.stream_options.include_usage:
            yield _event(shape.end(counts))
        yield b"data: [DONE]\n\n"


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_none=False).encode() + b"\n\n"


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _prompt_tokens(item: int | Part) -> int:
    assert isinstance(item, int)
    return item


def _part(item: int | Part) -> Part:
    assert isinstance(item, Part)
    return item


class _Refusal(HTTPException):
    """A status with OpenAI's body."""

    def __init__(
        self, status: int, body: ErrorBody, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, body.message, headers)
        self.body = body


_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def _problem(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> _Refusal:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in {429, 503} else None
    body = ErrorBody(message=message, type=kind, param=param, code=code)
    return _Refusal(status, body, headers)


def _answer_of(refusal: _Refusal) -> JSONResponse:
    content = ErrorAnswer(error=refusal.body).model_dump()
    return JSONResponse(content, refusal.status_code, headers=refusal.headers)


def _add_errors(app: FastAPI) -> None:
    """Let whatever goes wrong be told in OpenAI's form."""

    def on(kind: type[Exception], make: Callable[[Any], _Refusal]) -> None:
        async def handle(_: Request, error: Exception) -> JSONResponse:
            return _answer_of(make(error))

        app.add_exception_handler(kind, handle)

    def of_validation(error: RequestValidationError) -> _Refusal:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part != "body"]
        text = "; ".join(
            f"{'.'.join(str(part) for part in one['loc'] if part != 'body') or 'body'}: "
            f"{one['msg'].removeprefix('Value error, ')}"
            for one in error.errors()[:8]
        )
        return _problem(400, text, ".".join(path) or None)

    def of_status(error: HTTPException) -> _Refusal:
        return error if isinstance(error, _Refusal) else _problem(error.status_code, error.detail)

    on(RequestValidationError, of_validation)
    on(HTTPException, of_status)
    on(RequestError, lambda error: _problem(400, error.message, error.param))
    on(
        UnknownModelError,
        lambda error: _problem(404, error.message, error.param, "model_not_found"),
    )
    on(BusyError, lambda error: _problem(429, str(error), code="rate_limit_exceeded"))
    on(EngineError, lambda error: _problem(503, str(error)))


class _Guard:
    """Refuses requests without a key, and bodies that are too large, as they arrive.

    Written as plain ASGI: FastAPI's own kind of middleware hides from a stream that its client has
    gone.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        refusal = None
        name = self._name(headers)
        scope[KEY_NAME] = name or ANYBODY
        if scope["path"] not in OPEN_PATHS and self._keys.hashes and name is None:
            refusal = _problem(401, "wanted Authorization: Bearer KEY", code="invalid_api_key")
        elif not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            refusal = _too_large()
        if refusal is not None:
            await _answer_of(refusal)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise _too_large()
            return message

        await self._app(scope, counted, send)

    def _name(self, headers: Headers) -> str | None:
        """Return the name of the key that a request came with; None: of none that is known."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        name = self._keys.find(key.strip())
        return name if scheme.lower() == "bearer" else None


def _wait(seconds: float) -> JSONResponse:
    refusal = _problem(429, "this key asks for more than it may", code="rate_limit_exceeded")
    return JSONResponse(
        ErrorAnswer(error=refusal.body).model_dump(),
        refusal.status_code,
        headers={"Retry-After": str(math.ceil(seconds))},
    )


def _too_large() -> _Refusal:
    return _problem(413, f"a request has at most {MAX_BODY_BYTES} bytes")
