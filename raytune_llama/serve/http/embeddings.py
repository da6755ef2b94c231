"""`POST /v1/embeddings`: texts in, vectors out."""

import base64
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Protocol

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.engine.protocol import Vectors
from raytune_llama.serve.http.description import MODEL_ERROR_STATUSES, describe_error_responses
from raytune_llama.serve.http.timeouts import enforce_timeouts
from raytune_llama.serve.protocol.embeddings import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
)

_CLIENT_GONE = 499
"""As nginx calls it; nobody is there to read it."""


class EmbeddingBackend(Protocol):
    """A model that makes vectors."""

    def embed(self, request: EmbeddingRequest) -> AsyncGenerator[int | Vectors, None]:
        """Yield the texts' number of tokens, then their vectors, some at a time, in order.

        Raises:
            RequestError: the request can't be answered; before the first item.
            BusyError: as many requests wait as may; before the first vectors.
            EngineError: the model has failed.
        """
        ...


def add_embeddings(
    app: FastAPI, backend_of: Callable[[str], EmbeddingBackend], limits: RequestLimits
) -> None:
    """Add the route.

    Args:
        app: where.
        backend_of: returns a model by its name, or raises what the client is told.
        limits: bounds on every request.
    """

    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingList,
        responses=describe_error_responses(*MODEL_ERROR_STATUSES),
    )
    async def embed(request: EmbeddingRequest, connection: Request) -> Response:
        """Make a vector of each text."""
        items = enforce_timeouts(backend_of(request.model).embed(request), limits)
        made: list[Vectors] = []
        async with aclosing(items):
            num_tokens = await anext(items)
            assert isinstance(num_tokens, int)
            async for vectors in items:
                assert not isinstance(vectors, int)
                made.append(vectors)
                if await connection.is_disconnected():
                    return Response(status_code=_CLIENT_GONE)
        pieces = _pieces(np.concatenate(made), num_tokens, request)
        return StreamingResponse(pieces, media_type="application/json")


def _pieces(vectors: Vectors, num_tokens: int, request: EmbeddingRequest) -> Iterator[bytes]:
    """Yield an `EmbeddingList` vector by vector: as one text it could have hundreds of megabytes.

    A plain iterator: it is run beside the event loop, which goes on.
    """
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    frame = EmbeddingList(data=[], model=request.model, usage=usage).model_dump()
    frame.pop("data")
    yield json.dumps(frame).encode()[:-1] + b', "data": ['
    for index, vector in enumerate(vectors):
        item = Embedding(index=index, embedding=_written(vector, request.encoding_format))
        yield (b", " if index else b"") + item.model_dump_json().encode()
    yield b"]}"


def _written(vector: Vectors, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
