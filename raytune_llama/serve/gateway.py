"""The gateway of an endpoint with several models: forwards a request to the model that it names.

Each model is an application of its own at `/NAME`, which clients can use directly; the gateway at
`/` is for clients that know one URL and name the model in the body. It only forwards: keys, limits
and answers are those of the models, except that it checks a key before it reads a body.
"""

import asyncio
import json
import os
from collections.abc import Sequence
from typing import Any

import anyio
import httpx2
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from starlette.types import Send

from raytune_llama.logs import setup_logging
from raytune_llama.serve.config import GatewayConfig, RequestLimits
from raytune_llama.serve.errors import EngineError, UnknownModelError
from raytune_llama.serve.http.keys import (
    AcceptedKeys,
    ApiKeys,
    watch_keys,
)
from raytune_llama.serve.http.page import add_page
from raytune_llama.serve.http.refusals import add_error_handlers
from raytune_llama.serve.http.request_guard import add_request_guard, read_json
from raytune_llama.serve.proxy import check_exposure, proxy_host, proxy_url

GATEWAY_NAME = "gateway"
"""Name of the application and of its deployment."""

NUM_GATEWAYS = 2
"""Number of its processes; while one is replaced, the other serves."""

CONNECT_SECONDS = 10.0
"""Seconds to connect to the proxy in front of a model."""

# Of one connection, not of the request or response; and what the HTTP client sets itself.
_HOP_HEADERS = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"),
        *("upgrade", "host", "content-length", "expect"),
    }
)


def build_gateway_app(
    models: Sequence[str], base_url: str, keys: AcceptedKeys, limits: RequestLimits
) -> FastAPI:
    """Build the gateway's HTTP application.

    Args:
        models: names of the models; the application of each is at `BASE_URL/NAME`.
        base_url: URL of the proxy, such as `http://127.0.0.1:8000`.
        keys: accepted API keys, as those of the models.
        limits: limits of requests, as those of the models.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    add_error_handlers(app)
    add_request_guard(app, keys, limits)
    add_page(app)
    upstream = _Upstream(base_url)

    @app.get("/health")
    async def health(request: Request) -> Response:
        """Check that every model can serve requests."""
        responses = await upstream.fetch_all(models, "/health", request)
        return next((one for one in responses if one.status_code != 200), Response())

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        """List the models of all applications."""
        responses = await upstream.fetch_all(models, "/v1/models", request)
        for one in responses:
            if one.status_code != 200:
                return one
        listed = [json.loads(bytes(one.body)) for one in responses]
        data = [card for one in listed for card in one["data"]]
        return JSONResponse({**listed[0], "data": data})

    @app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
    async def forward(path: str, request: Request) -> Response:
        """Forward any other request to the model that it names."""
        name = path.removeprefix("v1/models/") if path.startswith("v1/models/") else None
        if request.method == "POST":
            name = _named_model(await request.body(), limits)
        # Without a name, any model's application refuses the request, in its own words.
        base = models[0] if name is None else name.partition(":")[0]
        if base not in models:
            raise UnknownModelError(base, models)
        return await upstream.forward(base, request)

    return app


def _named_model(body: bytes, limits: RequestLimits) -> str | None:
    """Return the model that a request body names; None if it names none."""
    try:
        value = read_json(body, limits.json_depth)
    except ValueError:
        return None
    name = value.get("model") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


class _Upstream:
    """The models' applications behind the proxy."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        # Responses have time limits in the models' applications.
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100),
            trust_env=False,
        )

    async def fetch_all(self, models: Sequence[str], path: str, request: Request) -> list[Response]:
        """Return the response of every model to a GET request."""

        async def fetch(name: str) -> Response:
            response = await self._send(name, path, request, b"")
            try:
                body = await response.aread()
            except httpx2.HTTPError as error:
                raise _unavailable(name) from error
            headers = _end_to_end(response.headers)
            headers.pop("content-encoding", None)  # decoded above
            return Response(body, response.status_code, headers)

        return list(await asyncio.gather(*map(fetch, models)))

    async def forward(self, name: str, request: Request) -> Response:
        """Return a model's response to a request, which is streamed."""
        response = await self._send(name, request.url.path, request, await request.body())
        return _ForwardedResponse(response)

    async def _send(self, name: str, path: str, request: Request, body: bytes) -> httpx2.Response:
        url = httpx2.URL(f"{self._base_url}/{name}{path}", query=request.url.query.encode())
        headers = _end_to_end(request.headers)
        built = self._client.build_request(request.method, url, headers=headers, content=body)
        try:
            return await self._client.send(built, stream=True)
        except httpx2.HTTPError as error:
            raise _unavailable(name) from error


def _unavailable(name: str) -> EngineError:
    return EngineError(f"The model `{name}` can't be reached. Please try again later.")


def _end_to_end(headers: Any) -> dict[str, str]:  # noqa: ANN401  # Starlette's or HTTPX's
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_HEADERS}


class _ForwardedResponse(StreamingResponse):
    """A response as it arrives; if the client disconnects, the model's work is canceled."""

    def __init__(self, response: httpx2.Response) -> None:
        headers = _end_to_end(response.headers)
        super().__init__(response.aiter_raw(), response.status_code, headers)
        self._response = response

    async def stream_response(self, send: Send) -> None:
        """Send the response, then close its connection to the model."""
        try:
            await super().stream_response(send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._response.aclose()


@serve.ingress()
class GatewayReplica:
    """The gateway as a Ray Serve deployment."""

    def __init__(
        self,
        config: GatewayConfig,
        built_with: ApiKeys,
        *bound: object,  # noqa: ARG002  # deploys them
    ) -> None:
        """Check who can reach it.

        Args:
            config: the models, keys and limits.
            built_with: keys in the environment of the process that has built the application.
            bound: other deployments of its application.
        """
        setup_logging()
        self._config = config
        self._keys = watch_keys(config.keys_file, os.environ, built_with)
        check_exposure(proxy_host(), self._keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application, which Ray Serve calls directly."""
        config = self._config
        return build_gateway_app(config.models, proxy_url(), self._keys, config.limits)
