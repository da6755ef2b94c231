"""OpenAI's API over HTTP: requests in, answers or streams of them out. Knows no model and no Ray.

Every route but `/health` asks for a key where there are keys. What goes wrong is told in OpenAI's
form. A stream's first part is awaited before its status is sent, so that a refusal has its own.
"""

import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from raytune_llama.serve.answers import Part
from raytune_llama.serve.engine.base import BusyError, EngineError
from raytune_llama.serve.http.bodies import build_route_class
from raytune_llama.serve.http.description import (
    FOR_A_MODEL,
    FOR_READING,
    STREAM,
    DescribedApp,
    refusals,
)
from raytune_llama.serve.http.events import EventStream
from raytune_llama.serve.http.guard import Guard
from raytune_llama.serve.http.keys import Keys
from raytune_llama.serve.http.limits import AnswerTimeoutError, Limits, within
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
from raytune_llama.serve.http.refusals import add_errors, problem
from raytune_llama.serve.http.shapes import Answer, ChatShape, CompletionShape, Counts, Shape

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """A model that answers."""

    def answer(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[int | Part, None]:
        """Yield the prompt's number of tokens, then the parts of all answers.

        Raises:
            RequestError: the request can't be answered; before the first item.
            BusyError: as many requests wait as may; before the first part.
            EngineError: the model has failed.
        """
        ...

    async def check(self) -> None:
        """Raise EngineError where the model can't answer."""
        ...


def build_http(
    backends: Mapping[str, Backend], keys: Keys, limits: Limits | None = None
) -> FastAPI:
    """Build the application.

    Args:
        backends: models by the names that requests use.
        keys: who may ask.
        limits: bounds on every request; None: the defaults.
    """
    limits = limits or Limits()
    app = DescribedApp(title="raytune_llama", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.needs_keys = bool(keys.hashes)
    app.router.route_class = build_route_class(limits.json_depth)
    created = int(time.time())
    add_errors(app)
    app.add_middleware(Guard, keys=keys, limits=limits)
    if limits.allow_origins:
        # Before the guard: browsers ask without a key whether they may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )

    answers = STREAM | refusals(*FOR_A_MODEL)

    def backend_of(name: str) -> Backend:
        if name not in backends:
            known = ", ".join(backends)
            raise problem(404, f"no model {name!r}; there is {known}", "model", "model_not_found")
        return backends[name]

    @app.get("/health", response_class=Response, responses=refusals(503))
    async def health() -> Response:
        """Say whether every model can answer."""
        for backend in backends.values():
            await backend.check()
        return Response(status_code=200)

    @app.get("/v1/models", responses=refusals(*FOR_READING))
    async def models() -> ModelList:
        """List the models."""
        return ModelList(data=[ModelCard(id=name, created=created) for name in backends])

    @app.get("/v1/models/{name}", responses=refusals(*FOR_READING, 404))
    async def model(name: str) -> ModelCard:
        """Describe a model."""
        backend_of(name)
        return ModelCard(id=name, created=created)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=answers)
    async def chat(request: ChatRequest) -> Response:
        """Answer a conversation."""
        return await _respond(backend_of(request.model), request, ChatShape(request), limits)

    @app.post("/v1/completions", response_model=Completion, responses=answers)
    async def complete(request: CompletionRequest) -> Response:
        """Go on with a text."""
        echoed = request.prompt if request.echo and isinstance(request.prompt, str) else ""
        shape = CompletionShape(request, echoed)
        return await _respond(backend_of(request.model), request, shape, limits)

    return app


async def _respond(
    backend: Backend, request: ChatRequest | CompletionRequest, shape: Shape, limits: Limits
) -> Response:
    items = within(backend.answer(request), limits)
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
                if part.text or part.tokens or part.finish:
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
