"""A tiny served model; nothing here needs Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raytune_llama.serve.config import SamplingDefaults, ServedModelConfig
from raytune_llama.serve.engine.embed import Embedder
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.model import ServedModel, load_served_model
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.train.conftest import write_model


class ObservedScheduler(BatchScheduler):
    """A scheduler that keeps the embedder that an engine has got from it."""

    embedder: Embedder

    def build_embedder(self) -> Embedder:
        self.embedder = super().build_embedder()
        return self.embedder

    @property
    def is_idle(self) -> bool:
        """Whether no sequence or job is running or waiting."""
        return not (self.num_running or self.num_waiting or self.embedder.jobs)


@pytest.fixture(scope="session")
def served_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A model directory: 410 rows, 400 ids, 128 positions."""
    path = write_model(tmp_path_factory.mktemp("served") / "tiny")
    load_tokenizer(tokenizer_dir).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def served(served_dir: Path) -> ServedModel:
    config = ServedModelConfig(path=str(served_dir), template="belle")
    return load_served_model(config, torch.device("cpu"))


@pytest.fixture(scope="session")
def scheduler(served: ServedModel) -> ObservedScheduler:
    """The scheduler of `served_engine`."""
    return ObservedScheduler(
        served.model,
        num_slots=4,
        max_context=served.max_context,
        num_tokens=len(served.tokenizer),
    )


@pytest.fixture(scope="session")
def served_engine(scheduler: ObservedScheduler) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(scheduler, max_waiting=32)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def answerer(served: ServedModel, served_engine: TransformersEngine) -> CompletionService:
    return CompletionService(served, served_engine, SamplingDefaults())
