"""Route `POST /v1/embeddings`: embedding vectors of texts."""

import base64
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.engine.protocol import Vectors
from raytune_llama.serve.generation.output import Stream
from raytune_llama.serve.http.description import MODEL_ERROR_STATUSES, describe_error_responses
from raytune_llama.serve.http.metrics import RequestRecorder, ServeMetrics
from raytune_llama.serve.http.stream import ObservedStream
from raytune_llama.serve.protocol.embeddings import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
)

_CLIENT_GONE = 499
"""nginx's status for a closed client connection; it reaches only the metrics."""


class EmbeddingBackend(Protocol):
    """A model that computes embeddings."""

    async def embed(self, request: EmbeddingRequest) -> Stream[Vectors]:
        """Return the stream of vectors, in batches and in input order.

        The first batch raises BusyError if too many requests are queued; any raises EngineError if
        the model has failed.

        Raises:
            InvalidRequestError: the request is invalid.
        """
        ...


def add_embeddings(
    app: FastAPI,
    backend_of: Callable[[EmbeddingRequest], Awaitable[EmbeddingBackend]],
    limits: RequestLimits,
    metrics: ServeMetrics,
) -> None:
    """Register the route.

    Args:
        app: application to extend.
        backend_of: returns the backend of a request's model, or raises the client's error.
        limits: limits of every request.
        metrics: metrics to update.
    """

    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingList,
        responses=describe_error_responses(*MODEL_ERROR_STATUSES),
    )
    async def embed(request: EmbeddingRequest, connection: Request) -> Response:
        """Create an embedding vector for each input text."""
        opening = (await backend_of(request)).embed(request)
        recorder = RequestRecorder(metrics, request.model)
        batches: list[Vectors] = []
        async with await ObservedStream.open(opening, limits, recorder) as stream:
            async for vectors in stream:
                batches.append(vectors)
                if await connection.is_disconnected():
                    return Response(status_code=_CLIENT_GONE)
        chunks = _encode_list(np.concatenate(batches), stream.num_prompt_tokens, request)
        return StreamingResponse(chunks, media_type="application/json")


def _encode_list(vectors: Vectors, num_tokens: int, request: EmbeddingRequest) -> Iterator[bytes]:
    """Yield an `EmbeddingList` vector by vector: as one string it could be hundreds of megabytes.

    A plain iterator: Starlette runs it in a thread, so that the event loop is not blocked.
    """
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    frame = EmbeddingList(data=[], model=request.model, usage=usage).model_dump()
    frame.pop("data")
    yield json.dumps(frame).encode()[:-1] + b', "data": ['
    for index, vector in enumerate(vectors):
        item = Embedding(index=index, embedding=_encode_vector(vector, request.encoding_format))
        yield (b", " if index else b"") + item.model_dump_json().encode()
    yield b"]}"


def _encode_vector(vector: Vectors, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
