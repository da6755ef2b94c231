"""One model behind both engines, over real HTTP: vLLM is the real package (`make test-vllm`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig
from raytune_llama.serve.engine.choice import find_vllm
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.serve.http.test_routes import Server

ENGINES = ("transformers", "vllm")

NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(find_vllm() is None, reason="vllm is not installed: make test-vllm"),
]
"""Marks of every test here."""

NUM_SLOTS, NUM_WAITING = 4, 28
MAX_RANK = 8


@dataclass(frozen=True)
class Served:
    """A model that each engine serves, under the engine's name."""

    client: openai.OpenAI
    base: Path
    """Its directory."""

    adapters: Path
    """Its directory of adapters."""


def write_contract_model(path: Path, tokenizer_dir: Path) -> Path:
    """Write a LLaMA with rows beyond its tokenizer's 400 ids, and heads as large as vLLM needs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=410,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    load_tokenizer(tokenizer_dir).save_pretrained(path)
    return path


def load(base: Path, engine: str, *, adapters: Path | None = None, num_slots: int) -> LoadedModel:
    """Load a model with one of the engines, under the engine's name."""
    model = ServedModelConfig(
        path=str(base),
        name=engine,
        template="belle",
        adapters_dir=None if adapters is None else str(adapters),
        max_adapters=2,
        max_adapter_rank=MAX_RANK,
    )
    replicas = ReplicaConfig(engine=engine, slots=num_slots, waiting=NUM_WAITING)  # type: ignore[arg-type]
    return LoadedModel(model, ServeConfig(models=(model,), replicas=replicas))


def close(server: Server, loaded: Mapping[str, LoadedModel]) -> None:
    """Stop the engines while the event loop of the server still runs, then the server."""
    for one in loaded.values():
        one.close()
    server.close()


@pytest.fixture(scope="session")
def contract_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return write_contract_model(tmp_path_factory.mktemp("contract") / "tiny", tokenizer_dir)


@pytest.fixture(scope="session")
def both(contract_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The model behind both engines."""
    adapters = tmp_path_factory.mktemp("contract-adapters")
    loaded = {
        engine: load(contract_dir, engine, adapters=adapters, num_slots=NUM_SLOTS)
        for engine in ENGINES
    }
    server = Server(dict(loaded))
    yield Served(server.client(), contract_dir, adapters)
    close(server, loaded)
