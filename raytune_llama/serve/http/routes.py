"""OpenAI's API over HTTP: the application of a replica, its routes and middleware.

Needs neither torch nor Ray. If API keys are configured, every route but `/health` and the chat page
requires one. Errors have OpenAI's format. A stream's first delta is awaited before its status is
sent, so that an error has a status of its own.
"""

import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.errors import BusyError, EngineError, UnknownModelError
from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.http.description import (
    MODEL_ERROR_STATUSES,
    READ_ERROR_STATUSES,
    STREAM,
    DescribedApp,
    describe_error_responses,
)
from raytune_llama.serve.http.embeddings import EmbeddingBackend, add_embeddings
from raytune_llama.serve.http.keys import AcceptedKeys
from raytune_llama.serve.http.metrics import HttpMetricsMiddleware, RequestRecorder, ServeMetrics
from raytune_llama.serve.http.page import add_page
from raytune_llama.serve.http.rate_limit import RateLimitClient, RateLimitMiddleware
from raytune_llama.serve.http.refusals import (
    add_error_handlers,
    build_api_error,
    build_error_response,
)
from raytune_llama.serve.http.request_guard import (
    FieldPolicy,
    add_request_guard,
    build_route_class,
)
from raytune_llama.serve.http.responses import (
    ChatResponseBuilder,
    ChoiceAccumulator,
    CompletionResponseBuilder,
    ResponseBuilder,
    TokenCounts,
)
from raytune_llama.serve.http.responses_api import add_responses
from raytune_llama.serve.http.stream import EventStream, ObservedStream, RequestTimeoutError
from raytune_llama.serve.protocol.chat import (
    ChatCompletion,
    ChatRequest,
    ErrorBody,
    ErrorResponse,
    ModelCard,
    ModelList,
)
from raytune_llama.serve.protocol.completions import Completion, CompletionRequest
from raytune_llama.serve.protocol.embeddings import EmbeddingRequest

logger = logging.getLogger(__name__)


ModelRequest = ChatRequest | CompletionRequest | EmbeddingRequest
"""A request that names a model."""


class ModelBackend(EmbeddingBackend, Protocol):
    """A model that generates text and computes embeddings."""

    async def respond(self, request: ChatRequest | CompletionRequest) -> Stream[OutputDelta]:
        """Return the stream of a request's answers, whose deltas are those of all choices.

        The first delta raises BusyError if too many requests are queued; any raises EngineError if
        the model has failed.

        Raises:
            InvalidRequestError: the request is invalid.
            BusyError: too many requests are queued.
            EngineError: the model has failed.
        """
        ...

    async def adapters(self) -> Sequence[str]:
        """Return the names of the model's adapters, as in `model:adapter`.

        Raises:
            EngineError: they can't be listed.
        """
        ...

    async def check(self) -> None:
        """Raise EngineError if the model can't serve requests."""
        ...


def build_http_app(
    backends: Mapping[str, ModelBackend],
    keys: AcceptedKeys,
    limits: RequestLimits,
    *,
    metrics: ServeMetrics,
    rate_limiter: RateLimitClient | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        backends: models by their names in requests.
        keys: accepted API keys.
        limits: limits of every request.
        metrics: metrics to update.
        rate_limiter: admits requests; None: no limits.
    """
    app = DescribedApp(title="raytune_llama", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.needs_keys = keys.is_required
    app.router.route_class = build_route_class(limits.json_depth)
    add_error_handlers(app)
    _add_middleware(app, keys, limits, metrics, rate_limiter)
    _add_health(app, backends)
    add_page(app)

    policy = FieldPolicy(metrics, is_strict=limits.strict_requests)

    async def backend_of(request: ModelRequest) -> ModelBackend:
        policy.check(request)
        return await _find_backend(backends, request.model)

    async def open_stream(request: ChatRequest | CompletionRequest) -> ObservedStream[OutputDelta]:
        opening = (await backend_of(request)).respond(request)
        return await ObservedStream.open(opening, limits, RequestRecorder(metrics, request.model))

    _add_models(app, backends)
    _add_answers(app, open_stream)
    add_responses(app, open_stream, policy)
    add_embeddings(app, backend_of, limits, metrics)
    return app


async def _find_backend(backends: Mapping[str, ModelBackend], name: str) -> ModelBackend:
    """Return the backend of a model; the part of its name after a colon is the backend's.

    Raises:
        UnknownModelError: there is none.
    """
    base = name.partition(":")[0]
    if base not in backends:
        raise await _unknown_model(backends, name)
    return backends[base]


async def _unknown_model(backends: Mapping[str, ModelBackend], name: str) -> UnknownModelError:
    try:
        known = [one for base, backend in backends.items() for one in await _names(base, backend)]
    except EngineError:  # its adapters can't be listed
        known = list(backends)
    return UnknownModelError(name, known)


def _add_models(app: FastAPI, backends: Mapping[str, ModelBackend]) -> None:
    """Register the routes that list and describe the models."""
    created = int(time.time())

    @app.get("/v1/models", responses=describe_error_responses(*READ_ERROR_STATUSES, 503))
    async def models() -> ModelList:
        """List the available models, adapters included."""
        return ModelList(
            data=[
                ModelCard(id=name, created=created)
                for base, backend in backends.items()
                for name in await _names(base, backend)
            ]
        )

    @app.get(
        # Names may contain slashes.
        "/v1/models/{name:path}",
        responses=describe_error_responses(*READ_ERROR_STATUSES, 404, 503),
    )
    async def model(name: str) -> ModelCard:
        """Retrieve a model by its name."""
        backend = await _find_backend(backends, name)
        if name not in await _names(name.partition(":")[0], backend):
            raise await _unknown_model(backends, name)
        return ModelCard(id=name, created=created)


def _add_answers(
    app: FastAPI,
    open_stream: Callable[
        [ChatRequest | CompletionRequest], Coroutine[Any, Any, ObservedStream[OutputDelta]]
    ],
) -> None:
    """Register the routes that generate text.

    Args:
        app: application to extend.
        open_stream: sends a request to its model.
    """
    responses = STREAM | describe_error_responses(*MODEL_ERROR_STATUSES)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=responses)
    async def chat(request: ChatRequest) -> Response:
        """Create a model response for a conversation."""
        return await _respond(await open_stream(request), request, ChatResponseBuilder(request))

    @app.post("/v1/completions", response_model=Completion, responses=responses)
    async def complete(request: CompletionRequest) -> Response:
        """Create a completion of a prompt."""
        builder = CompletionResponseBuilder(request)
        return await _respond(await open_stream(request), request, builder)


def _add_middleware(
    app: FastAPI,
    keys: AcceptedKeys,
    limits: RequestLimits,
    metrics: ServeMetrics,
    rate_limiter: RateLimitClient | None,
) -> None:
    """Register the middleware; the last one added is the first to see a request."""
    if rate_limiter is not None:
        app.add_middleware(
            RateLimitMiddleware, rate_limiter=rate_limiter, reject=_build_rate_limit_response
        )
    add_request_guard(app, keys, limits)
    app.add_middleware(HttpMetricsMiddleware, metrics=metrics)


def _build_rate_limit_response(seconds: float) -> JSONResponse:
    wait = math.ceil(seconds)
    message = f"Rate limit exceeded for this API key. Please try again in {wait}s."
    headers = {"Retry-After": str(wait)}
    return build_error_response(
        build_api_error(429, message, code="rate_limit_exceeded", headers=headers)
    )


def _add_health(app: FastAPI, backends: Mapping[str, ModelBackend]) -> None:
    """Register the route for health checks."""

    @app.get("/health", response_class=Response, responses=describe_error_responses(503))
    async def health() -> Response:
        """Check that every model can serve requests."""
        for backend in backends.values():
            await backend.check()
        return Response(status_code=200)


async def _names(base: str, backend: ModelBackend) -> list[str]:
    """Return the names of a model and of its adapters in requests."""
    return [base, *(f"{base}:{name}" for name in await backend.adapters())]


async def _respond(
    stream: ObservedStream[OutputDelta],
    request: ChatRequest | CompletionRequest,
    builder: ResponseBuilder,
) -> Response:
    counts = TokenCounts(prompt=stream.num_prompt_tokens)
    if not request.stream:
        choices = [ChoiceAccumulator() for _ in range(request.num_choices)]
        async with stream:
            async for delta in stream:
                choices[delta.index].add(delta)
                counts.completion += delta.num_tokens
        return _json(builder.build_response(choices, counts))
    first = await stream.read_first()
    return EventStream(_events(first, stream, request, builder, counts), stream)


async def _events(
    first: OutputDelta,
    stream: ObservedStream[OutputDelta],
    request: ChatRequest | CompletionRequest,
    builder: ResponseBuilder,
    counts: TokenCounts,
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events."""
    for chunk in builder.build_first_chunks(request.num_choices):
        yield _event(chunk)
    counts.completion += first.num_tokens
    yield _event(builder.build_chunk(first))
    try:
        async for delta in stream:
            counts.completion += delta.num_tokens
            # Deltas without any change for the client are not sent.
            if delta.text or delta.calls or delta.tokens or delta.finish_reason:
                yield _event(builder.build_chunk(delta))
    except (RequestTimeoutError, BusyError, EngineError) as error:
        # The status has already been sent.
        yield _event(ErrorResponse(error=ErrorBody(message=str(error), type="server_error")))
        return
    if request.includes_usage:
        yield _event(builder.build_usage_chunk(counts))
    yield b"data: [DONE]\n\n"


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_none=False).encode() + b"\n\n"


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")
