"""Bits per byte of text are those that training's own evaluation gives, whoever shares the work."""

import math
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.config import DataConfig
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.evaluate.config import EvaluatedModelConfig, TextsConfig
from raytune_llama.evaluate.models import InProcessModel, load_model
from raytune_llama.evaluate.texts import combine_blocks, evaluate_block, plan_text_blocks
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.monitoring.metrics import EVAL_BITS_PER_BYTE, read_metrics
from tests.train.conftest import (
    build_config,
    make_texts,
    run_here,
    write_model,
    write_store,
)

NAMES = ("large", "small")


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    return [make_texts(150, seed=3), make_texts(12, seed=4)]


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    path = write_model(tmp_path_factory.mktemp("tied"))
    load_tokenizer(tokenizer_dir).save_pretrained(path)
    return path


def sources() -> list[dict[str, Any]]:
    return [{"path": f"{name}.txt", "name": name} for name in NAMES]


def store(folder: Path, tokenizer_dir: Path, texts: list[list[str]]) -> DataConfig:
    write_store(folder, tokenizer_dir, train=texts)
    return DataConfig(
        store_dir=str(folder), sources=tuple(SourceConfig(**source) for source in sources())
    )


def load(folder: Path) -> InProcessModel:
    config = EvaluatedModelConfig(path=str(folder))
    return load_model(config, field="models.0", scratch=folder, use_gpu=False)


@pytest.mark.parametrize("isolate", [True, False])
def test_text_scores_equal_those_of_training(
    tmp_path: Path,
    tied_dir: Path,
    tokenizer_dir: Path,
    texts: list[list[str]],
    isolate: bool,  # noqa: FBT001
) -> None:
    write_store(tmp_path / "trained", tokenizer_dir, train=texts, validation=texts)
    run = build_config(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tied_dir)},
            "data": {"sources": sources(), "store_dir": str(tmp_path / "trained")},
            "lora": {"rank": 4},
            "batch": {
                "sequence_tokens": 24,
                "sequences_per_step": 4,
                "isolate_documents": isolate,
            },
            "engine": {"precision": "fp32", "strategy": "ddp"},
            "eval": {"max_sequences": None},
            "optim": {"learning_rate": 0.01},
            "logging": {"tensorboard": False},
            "max_steps": 0,
        },
        {},
    )
    run_here(run)
    (record,) = [r for r in read_metrics(run.run_place) if EVAL_BITS_PER_BYTE in r]

    data = store(tmp_path / "store", tokenizer_dir, texts)
    config = TextsConfig(sources=data.sources, sequence_tokens=24, isolate_documents=isolate)
    blocks = plan_text_blocks(config, data, 128)
    assert len(blocks) > len(NAMES), "the large source has several blocks"
    model = load(tied_dir)
    scores = combine_blocks([evaluate_block(model, block) for block in reversed(blocks)])
    by_name = {score.name: score for score in scores}
    for name in NAMES:
        wanted = record[f"{EVAL_BITS_PER_BYTE}/{name}"]
        assert by_name[name].bits_per_byte == pytest.approx(wanted, rel=1e-6)
    nats = sum(math.log(score.perplexity) * score.num_tokens for score in scores)
    mean = nats / sum(score.num_tokens for score in scores)
    assert math.exp(mean) == pytest.approx(record["eval/perplexity"], rel=1e-6)


def test_sequences_longer_than_the_model_are_refused(
    tmp_path: Path, tokenizer_dir: Path, texts: list[list[str]]
) -> None:
    data = store(tmp_path / "store", tokenizer_dir, texts)
    with pytest.raises(ConfigError, match=r"texts\.sequence_tokens.*got 200.*128 positions"):
        plan_text_blocks(TextsConfig(sources=data.sources, sequence_tokens=200), data, 128)
