"""A tiny real run: a LLaMA of a few thousand parameters, its tokenizer, and a store of real text.

Nothing here needs Ray: the store is written through its own writer.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.config.settings import ConfigError, from_dict, override
from raytune_llama.data.store.manifest import (
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    Shard,
    SplitManifest,
    fingerprint_of,
    write_manifest,
)
from raytune_llama.data.store.shards import ShardWriter
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig
from raytune_llama.train.loop import train
from raytune_llama.train.monitoring.metrics import LOSS, read_metrics
from raytune_llama.train.preflight import open_inputs
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.result import RunResult
from tests.train.group import Group

MakeConfig = Callable[..., PretrainConfig]

TEXT = "the store of a run holds every token once and nothing is lost 人民 日报 新年 钟声"
WORDS = TEXT.split()

# With DeepSpeed's default, tensors as small as these stay whole under ZeRO 3.
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def write_model(path: Path, *, tied: bool = True, rows: int = 410, seed: int = 0) -> Path:
    """Write a LLaMA of two layers; it has surplus rows behind the tokenizer's 400 ids."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # Larger than usual, so that what attention lets through shows in the loss.
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    path = write_model(tmp_path_factory.mktemp("tied"))
    load_tokenizer(tokenizer_dir).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def untied_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    path = write_model(tmp_path_factory.mktemp("untied"), tied=False)
    load_tokenizer(tokenizer_dir).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A token store of 120 training and 12 validation documents."""
    path = tmp_path_factory.mktemp("store")
    texts = make_texts(132, seed=0)
    write_store(path, tokenizer_dir, train=[texts[:120]], validation=[texts[120:]])
    return path


@pytest.fixture(scope="session")
def two_sources_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A token store of two sources: 90 and 30 training, 9 and 6 validation documents."""
    path = tmp_path_factory.mktemp("two_sources")
    large, small = make_texts(99, seed=1), make_texts(36, seed=2)
    write_store(
        path, tokenizer_dir, train=[large[:90], small[:30]], validation=[large[90:], small[30:]]
    )
    return path


def make_texts(count: int, *, seed: int) -> list[str]:
    """Return documents of 2 to 40 words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(2, 40))) for _ in range(count)]


def write_store(path: Path, tokenizer_dir: Path, **splits: list[list[str]]) -> None:
    """Write a token store; a split is a list of sources, which are lists of documents."""
    path.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(tokenizer_dir)
    listed: dict[Any, SplitManifest] = {}
    for name, sources in splits.items():
        shards: list[Shard] = []
        for source, texts in enumerate(sources):
            file = path / f"{name}-{source:05d}.arrow"
            with ShardWriter(file, "uint16", source=source) as writer:
                for row, (text, ids) in enumerate(
                    zip(texts, encode_text(tokenizer, texts), strict=True)
                ):
                    writer.write([0, *ids, 1], len(text.encode()), source, row)
            assert writer.shard is not None
            shards.append(writer.shard)
        listed[name] = SplitManifest.from_shards(shards)
    inputs = {"texts": splits}
    manifest = Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of(inputs),
        inputs=inputs,
        token_dtype="uint16",  # noqa: S106 - a type's name
        splits=listed,
        rows=RowCounts(),
        quarantine=None,
        lengths=[],
    )
    write_manifest(Place.local(path / "manifest.json"), manifest)


@pytest.fixture(scope="session")
def grown_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """The tokenizer with words of the texts as tokens: more ids than the models have rows."""
    path = tmp_path_factory.mktemp("grown")
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([word for word in WORDS if len(word) > 1 and word not in known])
    assert len(tokenizer) > 410
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def grown_store(tmp_path_factory: pytest.TempPathFactory, grown_tokenizer: Path) -> Path:
    """A token store of the grown tokenizer: 120 training and 12 validation documents."""
    path = tmp_path_factory.mktemp("grown_store")
    texts = make_texts(132, seed=0)
    write_store(path, grown_tokenizer, train=[texts[:120]], validation=[texts[120:]])
    return path


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Two processes with gloo between them, for the whole session."""
    group = Group(2, tmp_path_factory.mktemp("two"))
    yield group
    group.close()


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Three such processes."""
    group = Group(3, tmp_path_factory.mktemp("three"))
    yield group
    group.close()


@pytest.fixture
def make_config(tmp_path: Path, model_dir: Path, store_dir: Path) -> MakeConfig:
    """Build the config of a run of six steps; keywords replace its fields by dotted path."""

    def make(name: str = "run", **fields: Any) -> PretrainConfig:  # noqa: ANN401
        values: dict[str, Any] = {
            "run_dir": str(tmp_path / name),
            "model": {"path": str(model_dir)},
            "data": {"sources": [{"path": "corpus.txt"}], "store_dir": str(store_dir)},
            "lora": {"rank": 4, "dropout": 0.1, "modules_to_save": ["embed_tokens"]},
            "batch": {"sequence_tokens": 24, "sequences_per_step": 4, "micro_batch_sequences": 2},
            "optim": {"learning_rate": 0.01},
            "engine": {"precision": "fp32", "strategy": "ddp"},
            "checkpoint": {"every_steps": 2},
            "eval": {"every_steps": 3, "max_sequences": 8},
            "logging": {"tensorboard": False},
            "max_steps": 6,
        }
        return build_config(values, fields)

    return make


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Any]:
    """A source that is there."""
    (tmp_path / "corpus.txt").write_text("one line of text\n")
    return {"path": str(tmp_path / "corpus.txt")}


@pytest.fixture
def make(make_config: MakeConfig, source: dict[str, Any]) -> MakeConfig:
    """Make a config that passes all checks but for the fields given."""

    def made(name: str = "run", **fields: Any) -> PretrainConfig:  # noqa: ANN401
        return make_config(name, **{"data__sources": [source], **fields})

    return made


def problems_of(config: AnyTrainConfig) -> list[str]:
    """Return what the checks before a run find."""
    try:
        open_inputs(config)
    except ConfigError as error:
        return error.problems
    return []


def fields_of(problems: list[str]) -> list[str]:
    """Return the field that each problem names."""
    return [problem.partition(":")[0] for problem in problems]


def stage_fields(stage: int) -> dict[str, Any]:
    """Return the fields of a ZeRO stage; 0: of plain data parallelism."""
    if stage == 0:
        return {"engine__strategy": "ddp"}
    extra = {"engine__deepspeed": PARTITION_ALL} if stage == 3 else {}
    return {"engine__strategy": "deepspeed", "engine__zero_stage": stage, **extra}


def curve(config: AnyTrainConfig, name: str = LOSS) -> list[float]:
    """Return a metric over the run."""
    return [record[name] for record in read_metrics(config.run_place) if name in record]


def build_config(values: dict[str, Any], fields: dict[str, Any]) -> PretrainConfig:
    """Build a config from plain data, after setting fields in it by paths such as `lora__rank`."""
    for field, value in fields.items():
        *parents, last = field.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return from_dict(PretrainConfig, values)


def run_here(config: AnyTrainConfig, *, stop_after: int | None = None) -> RunResult:
    """Run the loop in this process, on one worker; ask it to stop after some steps."""
    asked = 0

    def stop_requested() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked > stop_after

    return train(config, ProcessGroup.single_process(), stop_requested)


@dataclass(frozen=True)
class Runs:
    """One run to its end, and one of the same config that was stopped after step 5."""

    config: PretrainConfig
    whole: Path
    stopped: Path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, store_dir: Path) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    config = from_dict(
        PretrainConfig,
        {
            "run_dir": str(folder / "whole"),
            "model": {"path": str(model_dir)},
            "data": {"sources": [{"path": "corpus.txt"}], "store_dir": str(store_dir)},
            "lora": {"rank": 4, "dropout": 0.1},
            "batch": {"sequence_tokens": 24, "sequences_per_step": 2},
            "optim": {"learning_rate": 0.01},
            "engine": {"precision": "fp32", "strategy": "ddp"},
            "checkpoint": {"every_steps": 2, "keep_last": 2, "keep_best": False},
            "logging": {"tensorboard": False},
            "max_steps": 6,
        },
    )
    run_here(config)
    stopped = override(config, {"run_dir": str(folder / "stopped")})
    run_here(stopped, stop_after=5)
    return Runs(config, folder / "whole", folder / "stopped")


def copy_run(runs: Runs, run_dir: Place) -> None:
    """Copy the stopped run to the directory of another."""
    for file in runs.stopped.rglob("*"):
        if file.is_file():
            (run_dir / file.relative_to(runs.stopped).as_posix()).upload(file)
