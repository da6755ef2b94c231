"""Addresses of models and routes: names of all kinds, slashes, HEAD, and pages of other origins."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import openai
import pytest

from raytune_llama.config.settings import ConfigError, load
from raytune_llama.serve.config import RequestLimits, ServeConfig
from raytune_llama.serve.http.keys import ApiKeys, make_key
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_routes import FOX, Server

NAMES = ["tiny", "org/model-7B", "a.b_c~d", "模型", "50%25", "what?", "#1", "a&b=c", "A+B", "..x"]
KEY, LINE = make_key()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits = RequestLimits(allow_origins=("https://example.org",))
    models = {name: Scripted("a", adapters=["poet"]) for name in NAMES}
    server = Server(models, ApiKeys((bytes.fromhex(LINE),)), limits)
    yield server
    server.close()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=server.url, headers=headers) as client:
        yield client


@pytest.mark.parametrize("name", [*NAMES, "tiny:poet", "org/model-7B:poet", "模型:poet"])
def test_model_of_any_name_works_on_every_route(server: Server, name: str) -> None:
    load(ServeConfig, [f"models=[{{path: x, name: '{name.partition(':')[0]}'}}]"])
    client = server.client(KEY)
    assert name in [model.id for model in client.models.list()]
    assert client.models.retrieve(name).id == name
    asked: dict[str, Any] = {"model": name, "max_tokens": 2}
    assert client.chat.completions.create(messages=FOX, **asked).model == name
    assert client.completions.create(prompt="a", **asked).model == name
    assert client.embeddings.create(model=name, input="a").model == name


@pytest.mark.parametrize("name", ["/a", "a/", "a//b", ".", "a/../b", "..", "a:b", "a b", ""])
def test_name_that_no_address_can_have_is_refused_in_the_config(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        load(ServeConfig, [f"models=[{{path: x, name: '{name}'}}]"])


def test_unknown_model_is_refused_with_those_that_exist(server: Server) -> None:
    client = server.client(KEY)
    for ask in (
        lambda: client.models.retrieve("gpt-9"),
        lambda: client.completions.create(model="gpt-9", prompt="a"),
        lambda: client.embeddings.create(model="gpt-9", input="a"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"
        assert "`gpt-9` does not exist" in caught.value.message
        assert "`tiny:poet`" in caught.value.message


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny", "/"])
def test_head_has_the_headers_of_get_and_no_body(http: httpx2.Client, path: str) -> None:
    whole, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers.get("content-type") == whole.headers.get("content-type")
    assert http.head("/nowhere").status_code == 404


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_slash_at_the_end_of_a_path_means_nothing(http: httpx2.Client, slashes: str) -> None:
    for path in ("/health", "/v1/models", "/v1/models/" + quote("org/model-7B")):
        assert http.get(path + slashes).content == http.get(path).content
    asked = {"model": "tiny", "messages": FOX}
    answer = http.post(f"/v1/chat/completions{slashes}", json=asked)
    assert answer.json()["choices"][0]["message"]["content"] == "a"


# As the official clients for JavaScript send them.
OPENAI_HEADERS = [
    *("authorization", "content-type", "openai-organization", "openai-project", "x-request-id"),
    *("x-stainless-arch", "x-stainless-lang", "x-stainless-os", "x-stainless-package-version"),
    *("x-stainless-retry-count", "x-stainless-runtime", "x-stainless-runtime-version"),
    *("x-stainless-timeout", "x-stainless-helper-method", "user-agent"),
]


@pytest.mark.parametrize(
    ("route", "method"), [("/v1/chat/completions", "POST"), ("/v1/models", "GET")]
)
def test_preflight_of_a_page_passes_where_its_origin_is_allowed(
    server: Server, route: str, method: str
) -> None:
    headers = {
        "Origin": "https://example.org",
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": ",".join(OPENAI_HEADERS),
    }
    with httpx2.Client(base_url=server.url) as page:
        answer = page.options(route, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        allowed = answer.headers["access-control-allow-headers"].lower().replace(" ", "")
        assert set(OPENAI_HEADERS) <= set(allowed.split(","))
        assert method in answer.headers["access-control-allow-methods"]
        # A refusal can be read by the page too.
        refused = page.get("/v1/models", headers={"Origin": "https://example.org"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://example.org"
        other = page.options(route, headers={**headers, "Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
