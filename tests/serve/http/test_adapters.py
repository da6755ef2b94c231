"""Adapters as OpenAI's client sees them: in the list, by name, and not there."""

from typing import Any

import openai
import pytest

from raytune_llama.serve.generation.output import OutputDelta, Stream
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.serve.protocol.completions import CompletionRequest
from tests.serve.adapters.conftest import Adapters, MakeAdapters, base_dir, make_adapters
from tests.serve.http.test_routes import Server

__all__ = ["base_dir", "make_adapters"]


class Here:
    """A model with adapters in this process."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def respond(self, request: ChatRequest | CompletionRequest) -> Stream[OutputDelta]:
        return await self._adapters.pool.respond(request)

    async def adapters(self) -> list[str]:
        return await self._adapters.pool.names()

    async def check(self) -> None:
        pass


def test_client_lists_adapters_and_chooses_one_by_name(make_adapters: MakeAdapters) -> None:
    adapters = make_adapters()
    adapters.write("poet", seed=1)
    adapters.write("broken", seed=2, manifest={"base": {"model.safetensors": "0" * 64}})
    (adapters.folder / "notes").mkdir()
    wanted = adapters.wanted("poet")
    server = Server({"tiny": Here(adapters)})
    asked: dict[str, Any] = {"prompt": "the quick", "temperature": 0, "max_tokens": 12}
    try:
        client = server.client()
        assert [m.id for m in client.models.list()] == ["tiny", "tiny:poet"]
        assert client.models.retrieve("tiny:poet").id == "tiny:poet"
        told = client.completions.create(model="tiny:poet", **asked)
        assert (told.choices[0].text, told.model) == (wanted, "tiny:poet")
        chunks = client.completions.create(model="tiny:poet", stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
        for name in ("tiny:none", "tiny:", "tiny:../poet", "tiny:notes", "none:poet", "none"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.completions.create(model=name, stream=True, **asked)
            assert caught.value.code == "model_not_found"
            assert "available" in caught.value.message.lower()
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("tiny:notes")
        with pytest.raises(
            openai.BadRequestError, match="is not the base that broken was trained on"
        ):
            client.completions.create(model="tiny:broken", **asked)
    finally:
        server.close()
