"""The endpoint on Ray Serve: one model, its gateway, and what it refuses."""

import socket
from pathlib import Path
from typing import Any

import openai
import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import ServeConfig, ServedModelConfig
from raytune_llama.serve.gateway import check_exposure
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.http.keys import ApiKeys, make_key
from tests.serve.engine.test_scheduler import by_transformers


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, ApiKeys())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", "", None])  # noqa: S104
def test_other_addresses_need_keys(host: str | None) -> None:
    with pytest.raises(ConfigError, match="keys_file"):
        check_exposure(host, ApiKeys())
    check_exposure(host, ApiKeys((bytes.fromhex(make_key()[1]),)))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_endpoint_answers_as_the_model_and_streams(served_dir: Path, served: ServedModel) -> None:
    from ray import serve

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    model = ServedModelConfig(path=str(served_dir), template="belle")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build_app(ServeConfig(models=(model,))), name="llm")
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        )
        asked: dict[str, Any] = {"model": "tiny", "prompt": "the quick", "max_tokens": 9}
        asked["temperature"] = 0
        told = client.completions.create(**asked)
        ids = served.tokenizer.encode("the quick")
        tokens = by_transformers(served.model, ids, 9)
        tokens = tokens[: tokens.index(1)] if 1 in tokens else tokens
        assert told.choices[0].text == served.tokenizer.decode(tokens)
        streamed = client.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == told.choices[0].text
        with pytest.raises(openai.BadRequestError, match="is 128 tokens"):
            client.completions.create(model="tiny", prompt="x " * 500)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="none", prompt="x")
    finally:
        serve.shutdown()
