"""The gateway in front of several models' applications, all on one real server on loopback."""

import json
import socket
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.errors import BusyError, EngineError
from raytune_llama.serve.gateway import build_gateway_app
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.http.metrics import ServeMetrics
from raytune_llama.serve.http.routes import build_http_app
from tests.serve.http.recorded_metrics import RecordedMetrics
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_hostile import until
from tests.serve.http.test_routes import FOX, AppServer, Failing


@dataclass
class Endpoint:
    """A gateway at `/` and the application of each model at `/NAME`."""

    server: AppServer
    models: dict[str, Any]
    metrics: dict[str, RecordedMetrics]

    @property
    def url(self) -> str:
        return self.server.url

    def post(self, path: str, **options: Any) -> httpx2.Response:  # noqa: ANN401
        return httpx2.post(f"{self.url}{path}", timeout=60, **options)


def serve(
    models: dict[str, Any], keys: ApiKeys | None = None, limits: RequestLimits | None = None
) -> Endpoint:
    keys, limits = keys or ApiKeys(), limits or RequestLimits()
    metrics = {name: RecordedMetrics() for name in models}

    def build(url: str) -> Starlette:
        apps = {
            name: build_http_app({name: model}, keys, limits, metrics=ServeMetrics(metrics[name]))
            for name, model in models.items()
        }
        mounts = [Mount(f"/{name}", app) for name, app in apps.items()]
        return Starlette(
            routes=[*mounts, Mount("/", build_gateway_app(tuple(models), url, keys, limits))]
        )

    return Endpoint(AppServer(build), models, metrics)


@pytest.fixture(scope="module")
def shared() -> Iterator[Endpoint]:
    endpoint = serve(
        {
            "one": Scripted("first ", "model"),
            "two": Scripted("second ", "model", adapters=["poet", "cook"]),
            "held": Scripted("a ", "b ", "c", held=True),
            "busy": Failing(BusyError("9 requests are waiting"), 0),
            "failing": Failing(EngineError("the engine has failed"), 2),
            "org/base": Scripted("third", adapters=["poet"]),
        }
    )
    yield endpoint
    endpoint.server.close()


@pytest.fixture
def endpoint(shared: Endpoint) -> Endpoint:
    """The shared endpoint; its models have not seen a request yet."""
    for name in ("one", "two", "held"):
        shared.models[name].asked.clear()
        shared.models[name].embedded.clear()
    return shared


@pytest.fixture
def client(endpoint: Endpoint) -> openai.OpenAI:
    return endpoint.server.client()


def read_error(answer: httpx2.Response) -> dict[str, Any]:
    """Return the error of a response in OpenAI's format."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_gateway_listing_joins_models_and_adapters_in_order(client: openai.OpenAI) -> None:
    listed = client.models.list()
    assert [card.id for card in listed] == [
        *("one", "two", "two:poet", "two:cook", "held", "busy", "failing"),
        *("org/base", "org/base:poet"),
    ]
    assert listed.object == "list"


@pytest.mark.parametrize("name", ["one", "two", "two:poet", "org/base", "org/base:poet"])
def test_gateway_retrieves_a_model_or_adapter_by_name(client: openai.OpenAI, name: str) -> None:
    assert client.models.retrieve(name).id == name


@pytest.mark.parametrize("name", ["none", "two:none", "none:poet", "org", "org/base/x"])
def test_gateway_unknown_name_is_not_found(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve(name)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["two", "two:poet"])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_gateway_request_reaches_only_the_named_model(
    endpoint: Endpoint, client: openai.OpenAI, name: str, kind: str
) -> None:
    if kind == "chat":
        chat = client.chat.completions.create(model=name, messages=FOX, temperature=0.5)
        text, model = chat.choices[0].message.content, chat.model
    else:
        completion = client.completions.create(model=name, prompt="x", temperature=0.5)
        text, model = completion.choices[0].text, completion.model
    assert (text, model) == ("second model", name)
    (asked,) = endpoint.models["two"].asked
    assert (asked.model, asked.temperature) == (name, 0.5)
    assert not endpoint.models["one"].asked


def test_gateway_embeddings_come_from_the_named_model(
    endpoint: Endpoint, client: openai.OpenAI
) -> None:
    answer = client.embeddings.create(model="two", input=["a", "b"])
    assert [item.embedding for item in answer.data] == [[0.0, 1.0]] * 2
    assert len(endpoint.models["two"].embedded) == 1
    assert not endpoint.models["one"].embedded


def test_gateway_stream_arrives_while_it_is_generated(
    endpoint: Endpoint, client: openai.OpenAI
) -> None:
    chunks = client.chat.completions.create(model="held", messages=FOX, stream=True)
    # The first chunk has no text; the second piece is not generated yet.
    received = [next(chunks).choices[0].delta.content for _ in range(2)]
    assert received == ["", "a "]
    for piece in ("b ", "c"):
        endpoint.models["held"].let()
        assert next(chunks).choices[0].delta.content == piece
    assert not list(chunks)
    assert chunks.response.headers["content-type"].startswith("text/event-stream")


def test_gateway_completion_stream_is_the_models(client: openai.OpenAI) -> None:
    chunks = client.completions.create(model="one", prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "first model"


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings"])
def test_gateway_unknown_model_is_refused_as_by_a_model(endpoint: Endpoint, path: str) -> None:
    answer = endpoint.post(f"/v1/{path}", json={"model": "none:x", "prompt": "a"})
    assert answer.status_code == 404
    error = read_error(answer)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "`none` does not exist. Available models: `one`, `two`, `held`" in error["message"]


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"\xff", b"[]", b"null", b'"one"', b"{}", b'{"model": 1}', b"[" * 100_000),
        b'{"model": "two", "model": "two"}',
        b'{"model": "two", "temperature": NaN}',
    ],
)
@pytest.mark.parametrize("headers", [JSON, {}])
def test_gateway_body_without_a_model_gets_the_models_own_refusal(
    endpoint: Endpoint, body: bytes, headers: dict[str, str]
) -> None:
    answer, direct = (
        endpoint.post(f"{path}/v1/chat/completions", content=body, headers=headers)
        for path in ("", "/one")
    )
    assert answer.status_code == direct.status_code == 400
    assert answer.json() == direct.json()
    assert read_error(answer)["type"] == "invalid_request_error"
    assert not endpoint.models["one"].asked


def test_gateway_busy_refusal_is_passed_on_unchanged(endpoint: Endpoint) -> None:
    asked = {"model": "busy", "messages": FOX, "stream": True}
    answer, direct = (
        endpoint.post(f"{path}/v1/chat/completions", json=asked) for path in ("", "/busy")
    )
    assert answer.status_code == direct.status_code == 429
    assert answer.content == direct.content
    assert read_error(answer)["code"] == "rate_limit_exceeded"
    assert answer.headers["retry-after"] == direct.headers["retry-after"]
    assert int(answer.headers["retry-after"]) >= 1


def test_gateway_stream_of_a_failing_model_ends_with_its_error(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model="failing", messages=FOX, stream=True)
    assert [next(chunks).choices[0].delta.content for _ in range(3)] == ["", "0 ", "1 "]
    with pytest.raises(openai.APIError, match="the engine has failed"):
        next(chunks)


@pytest.mark.parametrize("stream", [True, False])
def test_gateway_client_that_disconnects_ends_the_models_work(
    endpoint: Endpoint, *, stream: bool
) -> None:
    held = endpoint.models["held"]
    body = json.dumps({"model": "held", "messages": FOX, "stream": stream})
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", endpoint.server.port), timeout=60) as one:
        one.sendall((head + body).encode())
        until(lambda: held.num_running == 1)
        if stream:
            assert one.recv(15) == b"HTTP/1.1 200 OK"
    until(lambda: held.num_running == 0)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/one", "/health", "/openapi.json"])
def test_gateway_get_of_an_unreachable_model_is_unavailable(path: str) -> None:
    with unreachable() as server:
        answer = httpx2.get(f"{server.url}{path}", timeout=60)
    assert answer.status_code == 503
    assert read_error(answer)["message"].startswith("The model `one` can't be reached")
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_gateway_request_to_an_unreachable_model_is_unavailable(*, stream: bool) -> None:
    with unreachable() as server, pytest.raises(openai.InternalServerError) as caught:
        server.client().chat.completions.create(model="one", messages=FOX, stream=stream)
    assert caught.value.status_code == 503
    assert caught.value.type == "server_error"


@dataclass
class unreachable:  # noqa: N801  # a context manager
    """A gateway without its models: nobody listens at their port."""

    bound: socket.socket = field(default_factory=socket.socket)

    def __enter__(self) -> AppServer:
        self.bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{self.bound.getsockname()[1]}"
        app = build_gateway_app(["one"], url, ApiKeys(), RequestLimits())
        self.server = AppServer(lambda _: app)
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.bound.close()


def test_gateway_stream_cut_by_the_model_is_cut_for_the_client() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b'data: {"choices": []}\n\n'
        raise ConnectionError("the replica has died")

    async def model(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(events())(scope, receive, send)

    upstream = AppServer(lambda _: model)
    app = build_gateway_app(["one"], upstream.url, ApiKeys(), RequestLimits())
    gateway = AppServer(lambda _: app)
    try:
        with pytest.raises((httpx2.RemoteProtocolError, openai.APIConnectionError)):
            list(gateway.client().completions.create(model="one", prompt="a", stream=True))
    finally:
        gateway.close()
        upstream.close()


@pytest.mark.parametrize(("broken", "status"), [(False, 200), (True, 503)])
def test_gateway_health_is_that_of_all_models(*, broken: bool, status: int) -> None:
    last = Failing(EngineError("the engine has failed"), 0) if broken else Scripted()
    endpoint = serve({"one": Scripted(), "two": Scripted(), "last": last})
    try:
        answer = httpx2.get(f"{endpoint.url}/health", timeout=60)
    finally:
        endpoint.server.close()
    assert answer.status_code == status
    if broken:
        assert read_error(answer)["message"] == "the engine has failed"


def test_gateway_key_is_required_and_passed_on() -> None:
    (key, line), (other, _) = make_key(), make_key()
    endpoint = serve({"one": Scripted("x"), "two": Scripted("y")}, ApiKeys((bytes.fromhex(line),)))
    try:
        for path in ("", "/two"):
            client = endpoint.server.client(key, path=path)
            assert client.models.list().data[-1].id == "two"
            answer = client.chat.completions.create(model="two", messages=FOX)
            assert answer.choices[0].message.content == "y"
            for wrong in (other, "none"):
                client = endpoint.server.client(wrong, path=path)
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
                with pytest.raises(openai.AuthenticationError):
                    client.chat.completions.create(model="two", messages=FOX)
        assert len(endpoint.models["two"].asked) == 2
    finally:
        endpoint.server.close()


def test_gateway_without_a_key_reads_no_body() -> None:
    endpoint = serve({"one": Scripted("x")}, ApiKeys((bytes.fromhex(make_key()[1]),)))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", endpoint.server.port), timeout=60) as one:
            one.sendall(head.encode())
            assert one.recv(12) == b"HTTP/1.1 401"
    finally:
        endpoint.server.close()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *[(f"{prefix}{path}", 200) for prefix in ("", "/one") for path in ("/", "/health")],
        *[
            (f"{prefix}{path}", 401)
            for prefix in ("", "/one")
            for path in ("/v1/models", "/v1/models/one", "/openapi.json", "/nowhere", "//health")
        ],
        ("/health/x", 401),
        ("/none/health", 401),
        ("/one/one/health", 401),
        ("/one/v1/models/one/health", 401),
    ],
)
def test_public_paths_are_relative_to_the_application(
    guarded: Endpoint, path: str, status: int
) -> None:
    assert httpx2.get(f"{guarded.url}{path}", timeout=60).status_code == status


@pytest.fixture(scope="module")
def guarded() -> Iterator[Endpoint]:
    endpoint = serve({"one": Scripted("x")}, ApiKeys((bytes.fromhex(make_key()[1]),)))
    yield endpoint
    endpoint.server.close()


def test_models_application_at_its_path_serves_only_that_model(endpoint: Endpoint) -> None:
    client = endpoint.server.client(path="/two")
    assert [card.id for card in client.models.list()] == ["two", "two:poet", "two:cook"]
    answer = client.chat.completions.create(model="two:poet", messages=FOX)
    assert answer.choices[0].message.content == "second model"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="one", messages=FOX)


def test_model_whose_name_is_a_path_answers_at_it_and_at_the_gateway(endpoint: Endpoint) -> None:
    for path in ("", "/org/base"):
        client = endpoint.server.client(path=path)
        assert client.models.retrieve("org/base:poet").id == "org/base:poet"
        answer = client.chat.completions.create(model="org/base:poet", messages=FOX)
        assert answer.choices[0].message.content == "third"


def test_models_metrics_name_the_route_without_its_path() -> None:
    endpoint = serve({"two": Scripted("x")})
    for path in ("", "/two"):
        endpoint.server.client(path=path).completions.create(model="two", prompt="a")
    endpoint.server.close()
    values = endpoint.metrics["two"].values
    assert values["http_requests", "/v1/completions", "200"] == 2
    assert ("http_requests", "other", "200") not in values


def test_gateway_page_of_an_allowed_origin_may_send_requests() -> None:
    (key, line), page = make_key(), "https://example.org"
    keys, limits = ApiKeys((bytes.fromhex(line),)), RequestLimits(allow_origins=(page,))
    endpoint = serve({"one": Scripted("x")}, keys, limits)
    asked = {"model": "one", "prompt": "a"}
    try:
        for path in ("", "/one"):
            url = f"{endpoint.url}{path}/v1/completions"
            # Browsers send this one without a key.
            preflight = {"Origin": page, "Access-Control-Request-Method": "POST"}
            answers = [httpx2.options(url, headers=preflight, timeout=60)]
            for headers in ({"Authorization": f"Bearer {key}"}, {}):
                headers["Origin"] = page
                answers.append(httpx2.post(url, headers=headers, json=asked, timeout=60))
            assert [answer.status_code for answer in answers] == [200, 200, 401]
            for answer in answers:
                assert answer.headers.get_list("access-control-allow-origin") == [page]
    finally:
        endpoint.server.close()
