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

from raytune_llama.serve.config import KeyLimits, RequestLimits
from raytune_llama.serve.errors import BusyError, EngineError, UnknownModelError
from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.http.bodies import build_route_class
from raytune_llama.serve.http.description import (
    MODEL_ERROR_STATUSES,
    READ_ERROR_STATUSES,
    STREAM,
    DescribedApp,
    describe_error_responses,
)
from raytune_llama.serve.http.embeddings import EmbeddingBackend, add_embeddings
from raytune_llama.serve.http.events import EventStream
from raytune_llama.serve.http.keys import ApiKeys
from raytune_llama.serve.http.metrics import (
    HttpMetricsMiddleware,
    RequestMetricsRecorder,
    ServeMetrics,
    render_exposition,
)
from raytune_llama.serve.http.page import add_page
from raytune_llama.serve.http.rate_limit import (
    LocalRateLimitClient,
    RateLimitClient,
    RateLimitMiddleware,
)
from raytune_llama.serve.http.refusals import (
    add_error_handlers,
    build_api_error,
    build_error_response,
)
from raytune_llama.serve.http.request_guard import RequestGuardMiddleware
from raytune_llama.serve.http.responses import (
    ChatResponseBuilder,
    ChoiceAccumulator,
    CompletionResponseBuilder,
    ResponseBuilder,
    TokenCounts,
)
from raytune_llama.serve.http.timeouts import RequestTimeoutError, enforce_timeouts
from raytune_llama.serve.protocol.chat import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ErrorResponse,
    ModelCard,
    ModelList,
)

logger = logging.getLogger(__name__)


class ModelBackend(EmbeddingBackend, Protocol):
    """A model that answers."""

    def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | OutputDelta, None]:
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


def build_http_app(
    backends: Mapping[str, ModelBackend],
    keys: ApiKeys,
    limits: RequestLimits | None = None,
    *,
    meter: ServeMetrics | None = None,
    books: RateLimitClient | None = None,
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
    limits = limits or RequestLimits()
    meter = meter or ServeMetrics()
    books = books or LocalRateLimitClient(KeyLimits(), meter)
    app = DescribedApp(title="raytune_llama", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.needs_keys = bool(keys.hashes)
    app.router.route_class = build_route_class(limits.json_depth)
    add_error_handlers(app)
    _add_middleware(app, keys, limits, meter, books)
    _add_monitoring(app, backends, books)
    add_page(app)

    def backend_of(name: str) -> ModelBackend:
        # What stands behind the colon is the backend's to know.
        base = name.partition(":")[0]
        if base not in backends:
            known = ", ".join(backends)
            raise UnknownModelError(f"no model {base!r}; there is {known}", "model")
        return backends[base]

    def counted(
        request: ChatRequest | CompletionRequest,
    ) -> AsyncGenerator[int | OutputDelta, None]:
        items = enforce_timeouts(backend_of(request.model).answer(request), limits)
        return RequestMetricsRecorder(meter, request.model).record(items)

    _add_models(app, backends, backend_of)
    _add_answers(app, counted)
    add_embeddings(app, backend_of, limits)
    return app


def _add_models(
    app: FastAPI, backends: Mapping[str, ModelBackend], backend_of: Callable[[str], ModelBackend]
) -> None:
    """Add the routes that tell what there is."""
    created = int(time.time())

    @app.get("/v1/models", responses=describe_error_responses(*READ_ERROR_STATUSES, 503))
    async def models() -> ModelList:
        """List the models."""
        return ModelList(
            data=[
                ModelCard(id=name, created=created)
                for base, backend in backends.items()
                for name in await _names(base, backend)
            ]
        )

    @app.get(
        "/v1/models/{name}", responses=describe_error_responses(*READ_ERROR_STATUSES, 404, 503)
    )
    async def model(name: str) -> ModelCard:
        """Describe a model."""
        if name not in await _names(name.partition(":")[0], backend_of(name)):
            raise UnknownModelError(f"no model {name!r}; /v1/models lists all", "model")
        return ModelCard(id=name, created=created)


def _add_answers(
    app: FastAPI,
    counted: Callable[[ChatRequest | CompletionRequest], AsyncGenerator[int | OutputDelta, None]],
) -> None:
    """Add the routes that answer.

    Args:
        app: where they go.
        counted: asks the model that a request names.
    """
    answers = STREAM | describe_error_responses(*MODEL_ERROR_STATUSES)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=answers)
    async def chat(request: ChatRequest) -> Response:
        """Answer a conversation."""
        return await _respond(counted(request), request, ChatResponseBuilder(request))

    @app.post("/v1/completions", response_model=Completion, responses=answers)
    async def complete(request: CompletionRequest) -> Response:
        """Go on with a text."""
        echoed = request.prompt if request.echo and isinstance(request.prompt, str) else ""
        shape = CompletionResponseBuilder(request, echoed)
        return await _respond(counted(request), request, shape)


def _add_middleware(
    app: FastAPI, keys: ApiKeys, limits: RequestLimits, meter: ServeMetrics, books: RateLimitClient
) -> None:
    """Add what stands before the routes; the last one added is the first one asked."""
    app.add_middleware(RateLimitMiddleware, books=books, refuse=_build_rate_limit_response)
    app.add_middleware(RequestGuardMiddleware, keys=keys, limits=limits)
    if limits.allow_origins:
        # Before the guard: browsers ask without a key whether they may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(HttpMetricsMiddleware, meter=meter)


def _build_rate_limit_response(seconds: float) -> JSONResponse:
    after = {"Retry-After": str(math.ceil(seconds))}
    text = "this key asks for more than it may"
    return build_error_response(
        build_api_error(429, text, code="rate_limit_exceeded", headers=after)
    )


def _add_monitoring(
    app: FastAPI, backends: Mapping[str, ModelBackend], books: RateLimitClient
) -> None:
    """Add the routes by which the endpoint is watched."""

    @app.get("/health", response_class=Response, responses=describe_error_responses(503))
    async def health() -> Response:
        """Say whether every model can answer."""
        for backend in backends.values():
            await backend.check()
        return Response(status_code=200)

    text = {"schema": {"type": "string"}}
    told: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": text}}}

    @app.get(
        "/metrics",
        response_class=Response,
        responses=told | describe_error_responses(*READ_ERROR_STATUSES),
    )
    async def metrics() -> Response:
        """Tell what all gateways have counted, as Prometheus reads it."""
        return Response(render_exposition(await books.families()), media_type=CONTENT_TYPE_LATEST)


async def _names(base: str, backend: ModelBackend) -> list[str]:
    """Return what requests may call a model, with its adapters."""
    return [base, *(f"{base}:{name}" for name in await backend.adapters())]


async def _respond(
    items: AsyncGenerator[int | OutputDelta, None],
    request: ChatRequest | CompletionRequest,
    shape: ResponseBuilder,
) -> Response:
    counts = TokenCounts(prompt=_prompt_tokens(await anext(items)))
    if not request.stream:
        answers = [ChoiceAccumulator() for _ in range(request.n)]
        async with aclosing(items):
            async for item in items:
                part = _part(item)
                answers[part.index].add(part)
                counts.completion += part.num_tokens
        return _json(shape.build_response(answers, counts))
    # Refusals for load come with the first part, and must have their own status.
    first = _part(await anext(items))
    events = _events(first, items, request, shape, counts)
    return EventStream(events)


async def _events(
    first: OutputDelta,
    items: AsyncGenerator[int | OutputDelta, None],
    request: ChatRequest | CompletionRequest,
    shape: ResponseBuilder,
    counts: TokenCounts,
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events; closing them ends the answers."""
    async with aclosing(items):
        for chunk in shape.build_first_chunks(request.n):
            yield _event(chunk)
        counts.completion += first.num_tokens
        yield _event(shape.build_chunk(first))
        try:
            async for item in items:
                part = _part(item)
                counts.completion += part.num_tokens
                # What changes nothing for the client is not sent.
                if part.text or part.calls or part.tokens or part.finish_reason:
                    yield _event(shape.build_chunk(part))
        except (RequestTimeoutError, BusyError, EngineError) as error:
            # The status is sent already.
            yield _event(ErrorResponse(error=ErrorBody(message=str(error), type="server_error")))
            return
        if request.stream_options is not None and request.stream_options.include_usage:
            yield _event(shape.build_usage_chunk(counts))
        yield b"data: [DONE]\n\n"


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_none=False).encode() + b"\n\n"


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _prompt_tokens(item: int | OutputDelta) -> int:
    assert isinstance(item, int)
    return item


def _part(item: int | OutputDelta) -> OutputDelta:
    assert isinstance(item, OutputDelta)
    return item
