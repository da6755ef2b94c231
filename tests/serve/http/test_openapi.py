"""The OpenAPI document is what the endpoint does, as schemathesis tries it out."""

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.protocol import Vectors
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.embeddings import EmbeddingService
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.generation.output import Stream
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.protocol.embeddings import EmbeddingRequest
from tests.serve.http.test_routes import FOX, Here, Server

KEY, LINE = make_key()

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
"""All but `positive_data_acceptance`: a schema can't say that a model is served, nor that its
context has room."""


class Whole(Here):
    """A model that makes vectors too."""

    def __init__(self, answerer: CompletionService, vectors: EmbeddingService) -> None:
        super().__init__(answerer)
        self._vectors = vectors

    async def embed(self, request: EmbeddingRequest) -> Stream[Vectors]:
        return await self._vectors.respond(request)


@pytest.fixture(scope="module")
def guarded(
    answerer: CompletionService, served: ServedModel, served_engine: TransformersEngine
) -> Iterator[Server]:
    whole = Whole(answerer, EmbeddingService(served, served_engine))
    server = Server({"tiny": whole}, ApiKeys((bytes.fromhex(LINE),)))
    yield server
    server.close()


HEADERS = {"Authorization": f"Bearer {KEY}"}


def try_out(operation: schemathesis.APIOperation, mode: GenerationMode) -> set[int]:
    """Ask an operation of the document; return the statuses that it answered."""
    statuses: set[int] = set()

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            # Else hardly any would be for a model that there is, and of two names of a field one
            # alone may be given, which a schema can't say well.
            # Vectors have one size, which it doesn't say either.
            for name in ("max_completion_tokens", "dimensions"):
                case.body.pop(name, None)
            case.body |= {"model": "tiny"}
            case.body |= {"input": "the fox"} if "input" in case.body else {"max_tokens": 3}
            case.body |= {"messages": FOX} if "messages" in case.body else {}
        answer = case.call(headers=HEADERS, timeout=120)
        case.validate_response(answer, checks=CHECKS, headers=HEADERS)
        statuses.add(answer.status_code)

    try:
        ask()
    except Unsatisfiable:  # nothing about it can be wrong
        assert mode is GenerationMode.NEGATIVE
    return statuses


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_operation_answers_as_it_is_described(guarded: Server, mode: GenerationMode) -> None:
    url = f"http://127.0.0.1:{guarded.port}/openapi.json"
    described = schemathesis.openapi.from_url(url, headers=HEADERS)
    found: Any = described.get_all_operations()
    operations = [one.ok() for one in found]
    statuses = {operation.label: try_out(operation, mode) for operation in operations}
    if mode is GenerationMode.POSITIVE:
        assert all(200 in told or "{name}" in label for label, told in statuses.items()), statuses
    else:
        assert any(400 in told for told in statuses.values()), statuses


def test_document_names_what_goes_wrong_and_asks_for_keys(guarded: Server) -> None:
    url = f"http://127.0.0.1:{guarded.port}/openapi.json"
    assert httpx.get(url).status_code == 401
    document = httpx.get(url, headers={"Authorization": f"Bearer {KEY}"}).json()
    error = {"$ref": "#/components/schemas/ErrorResponse"}
    for path in ("/v1/chat/completions", "/v1/completions"):
        operation = document["paths"][path]["post"]
        assert operation["security"] == [{"key": []}]
        for status in ("400", "401", "404", "413", "429", "503"):
            assert operation["responses"][status]["content"]["application/json"]["schema"] == error
        assert "422" not in operation["responses"]
        assert "text/event-stream" in operation["responses"]["200"]["content"]
    assert "security" not in document["paths"]["/health"]["get"]
