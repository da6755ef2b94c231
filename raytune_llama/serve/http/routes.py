"""OpenAI's API over HTTP: requests in, answers or streams of them out. Knows no model and no Ray.

Every route but `/health` and the chat page asks for a key where there are keys. What goes wrong is
told in OpenAI's form. A stream's first part is awaited before its status is sent, so that a refusal
has its own.
"""

import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from raytune_llama.serve.config import KeyLimits, Limits
from raytune_llama.serve.errors import BusyError, EngineError, UnknownModelError
from raytune_llama.serve.generation.output import Part
from raytune_llama.serve.http.bodies import build_route_class
from raytune_llama.serve.http.description import (
    FOR_A_MODEL,
    FOR_READING,
    STREAM,
    DescribedApp,
    refusals,
)
from raytune_llama.serve.http.embeddings import EmbeddingBackend, add_embeddings
from raytune_llama.serve.http.events import EventStream
from raytune_llama.serve.http.keys import Keys
from raytune_llama.serve.http.metrics import CountRequests, Meter, MeteredAnswers, exposition
from raytune_llama.serve.http.page import add_page
from raytune_llama.serve.http.rate_limit import Admission, Books, LocalBooks
from raytune_llama.serve.http.refusals import add_errors, answer_of, problem
from raytune_llama.serve.http.request_guard import Guard
from raytune_llama.serve.http.responses import Answer, ChatShape, CompletionShape, Counts, Shape
from raytune_llama.serve.http.timeouts import AnswerTimeoutError, within
from raytune_llama.serve.protocol.chat import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorAnswer,
    ErrorBody,
    ModelCard,
    ModelList,
)

logger = logging.getLogger(__name__)


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
    limits: Limits | None = None,
    *,
    meter: Meter | None = None,
    books: Books | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        backends: models by the names that requests use.
        keys: who may ask.
        limits: bounds on every request; None: the defaults.
        meter: what counts; None: one that is made here.
        books: what admits requests and adds counts up; None: this gateway stands alone, and no
            key is limited.
    """
    limits = limits or Limits()
    meter = meter or Meter()
    books = books or LocalBooks(KeyLimits(), meter)
    app = DescribedApp(title="raytune_llama", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.needs_keys = bool(keys.hashes)
    app.router.route_class = build_route_class(limits.json_depth)
    add_errors(app)
    _add_middleware(app, keys, limits, meter, books)
    _add_watching(app, backends, books)
    add_page(app)

    def backend_of(name: str) -> Backend:
        # What stands behind the colon is the backend's to know.
        base = name.partition(":")[0]
        if base not in backends:
            known = ", ".join(backends)
            raise UnknownModelError(f"no model {base!r}; there is {known}", "model")
        return backends[base]

    def counted(request: ChatRequest | CompletionRequest) -> AsyncGenerator[int | Part, None]:
        items = within(backend_of(request.model).answer(request), limits)
        return MeteredAnswers(meter, request.model).pass_on(items)

    _add_models(app, backends, backend_of)
    _add_answers(app, counted)
    add_embeddings(app, backend_of, limits)
    return app


def _add_models(
    app: FastAPI, backends: Mapping[str, Backend], backend_of: Callable[[str], Backend]
) -> None:
    """Add the routes that tell what there is."""
    created = int(time.time())

    @app.get("/v1/models", responses=refusals(*FOR_READING, 503))
    async def models() -> ModelList:
        """List the models."""
        return ModelList(
            data=[
                ModelCard(id=name, created=created)
                for base, backend in backends.items()
                for name in await _names(base, backend)
            ]
        )

    @app.get("/v1/models/{name}", responses=refusals(*FOR_READING, 404, 503))
    async def model(name: str) -> ModelCard:
        """Describe a model."""
        if name not in await _names(name.partition(":")[0], backend_of(name)):
            raise UnknownModelError(f"no model {name!r}; /v1/models lists all", "model")
        return ModelCard(id=name, created=created)


def _add_answers(
    app: FastAPI,
    counted: Callable[[ChatRequest | CompletionRequest], AsyncGenerator[int | Part, None]],
) -> None:
    """Add the routes that answer.

    Args:
        app: where they go.
        counted: asks the model that a request names.
    """
    answers = STREAM | refusals(*FOR_A_MODEL)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=answers)
    async def chat(request: ChatRequest) -> Response:
        """Answer a conversation."""
        return await _respond(counted(request), request, ChatShape(request))

    @app.post("/v1/completions", response_model=Completion, responses=answers)
    async def complete(request: CompletionRequest) -> Response:
        """Go on with a text."""
        echoed = request.prompt if request.echo and isinstance(request.prompt, str) else ""
        shape = CompletionShape(request, echoed)
        return await _respond(counted(request), request, shape)


def _add_middleware(app: FastAPI, keys: Keys, limits: Limits, meter: Meter, books: Books) -> None:
    """Add what stands before the routes; the last one added is the first one asked."""
    app.add_middleware(Admission, books=books, refuse=_wait)
    app.add_middleware(Guard, keys=keys, limits=limits)
    if limits.allow_origins:
        # Before the guard: browsers ask without a key whether they may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(CountRequests, meter=meter)


def _wait(seconds: float) -> JSONResponse:
    after = {"Retry-After": str(math.ceil(seconds))}
    text = "this key asks for more than it may"
    return answer_of(problem(429, text, code="rate_limit_exceeded", headers=after))


def _add_watching(app: FastAPI, backends: Mapping[str, Backend], books: Books) -> None:
    """Add the routes by which the endpoint is watched."""

    @app.get("/health", response_class=Response, responses=refusals(503))
    async def health() -> Response:
        """Say whether every model can answer."""
        for backend in backends.values():
            await backend.check()
        return Response(status_code=200)

    text = {"schema": {"type": "string"}}
    told: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": text}}}

    @app.get("/metrics", response_class=Response, responses=told | refusals(*FOR_READING))
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
    return EventStream(events)


async def _events(
    first: Part,
    items: AsyncGenerator[int | Part, None],
    request: ChatRequest | CompletionRequest,
    shape: Shape,
    counts: Counts,
) -> AsyncGenerator[bytes, None]:
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
        except (AnswerTimeoutError, BusyError, EngineError) as error:
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
