"""What every side of a benchmark starts from: a model, an adapter, a token store, a config.

All of it is made on the spot from seeds, and from the demo's text where that lies there.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytune_llama.config.settings import from_dict
from raytune_llama.data.batches.step_batches import read_steps
from raytune_llama.data.store.manifest import (
    MANIFEST_NAME,
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    SplitManifest,
    SplitName,
    fingerprint_of,
    token_dtype,
    write_manifest,
)
from raytune_llama.data.store.shards import ShardWriter
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.lora import attach_adapter
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.inputs import build_batch_plan, build_sources

REPOSITORY = Path(__file__).resolve().parents[2]
SEED = 1
RANDOM_DOCUMENT_TOKENS = (20, 400)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSize:
    """Sizes of a benchmark's model and of its steps."""

    vocabulary: int = 50_228
    hidden: int = 256
    intermediate: int = 688
    layers: int = 4
    heads: int = 4
    sequence_tokens: int = 512
    sequences_per_worker: int = 2
    num_workers: int = 2

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step over all workers."""
        return self.sequences_per_worker * self.num_workers

    def describe(self) -> str:
        """Return one line for the head of a benchmark's output."""
        return (
            f"LLaMA, random weights: hidden {self.hidden}, {self.layers} layers, vocabulary "
            f"{self.vocabulary:,}; {self.num_workers} processes x {self.sequences_per_worker} "
            f"sequences x {self.sequence_tokens} tokens a step, fp32"
        )


TINY = BenchmarkSize(hidden=32, intermediate=48, layers=1, sequence_tokens=32)
"""For trying out that a benchmark runs; its figures mean nothing."""


@dataclass(frozen=True)
class Material:
    """Directories that both sides read."""

    shape: BenchmarkSize
    model: Path
    adapter: Path
    store: Path
    text: str
    """What the token ids come from, for the output."""

    def config(self, run_dir: Path, *, zero_stage: int, num_steps: int) -> PretrainConfig:
        """Return the config of a run of our loop; nothing is saved or evaluated before its end.

        Stage 0 is our own data parallelism, `engine.strategy: ddp`.

        No warm-up: transformers and we count its steps from 0 and from 1. No dropout: the two
        draw it from different seeds. Both are in the adapter and here, for both sides.
        """
        shape = self.shape
        fields: dict[str, Any] = {
            "run_dir": str(run_dir),
            "model": {"path": str(self.model), "attention": "sdpa"},
            "data": {"sources": [{"path": "corpus.txt"}], "store_dir": str(self.store)},
            "adapter": str(self.adapter),
            "batch": {
                "sequence_tokens": shape.sequence_tokens,
                "sequences_per_step": shape.sequences_per_step,
                "micro_batch_sequences": shape.sequences_per_worker,
                "isolate_documents": False,
            },
            "optim": {"learning_rate": 2e-4, "weight_decay": 0.01, "max_grad_norm": 1.0},
            "schedule": {"kind": "cosine", "warmup_ratio": 0.0},
            "max_steps": num_steps,
            "seed": SEED,
            "engine": {
                "precision": "fp32",
                "strategy": "deepspeed" if zero_stage else "ddp",
                "zero_stage": zero_stage or None,
            },
            "scale": {"num_workers": shape.num_workers, "cpus_per_worker": 1, "max_failures": 1},
            "checkpoint": {"every_steps": 10**9, "keep_best": False},
            "eval": {"every_steps": None},
            "logging": {"every_steps": 10, "tensorboard": False},
        }
        return from_dict(PretrainConfig, fields)


def make_material(folder: Path, shape: BenchmarkSize, *, num_steps: int) -> Material:
    """Write a model, an adapter and a store that no run of `num_steps` sees twice."""
    model_dir, adapter_dir, store_dir = folder / "model", folder / "adapter", folder / "store"
    num_tokens = num_steps * shape.sequences_per_step * shape.sequence_tokens + 1
    demo_tokenizer = REPOSITORY / "demo" / "model"
    demo_text = REPOSITORY / "demo" / "corpus" / "peoples_daily.txt"
    if demo_tokenizer.is_dir() and demo_text.is_file():
        tokenizer: Any = load_tokenizer(demo_tokenizer)
        documents = _encode_lines(tokenizer, demo_text)
        text = (
            f"real Chinese text ({demo_text.name}) in the demo tokenizer's {len(tokenizer):,} ids"
        )
    else:
        tokenizer = _tiny_tokenizer()
        documents = _random_documents(shape.vocabulary)
        text = "random ids with Zipf's frequencies (make demo brings real text)"
    write_model(model_dir, shape)
    tokenizer.save_pretrained(model_dir)
    _write_adapter(adapter_dir, model_dir)
    _write_store(store_dir, documents, shape.vocabulary, num_tokens)
    return Material(shape, model_dir, adapter_dir, store_dir, text)


def write_model(path: Path, shape: BenchmarkSize) -> None:
    """Write a LLaMA of random weights."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2 * shape.sequence_tokens,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def _write_adapter(path: Path, model_dir: Path) -> None:
    """Write the adapter that both sides go on from: B zero, saved modules equal to the base's."""
    model = LlamaForCausalLM.from_pretrained(model_dir, local_files_only=True)
    lora = LoraConfig(rank=8, alpha=32.0, dropout=0.0, modules_to_save=("embed_tokens", "lm_head"))
    attach_adapter(model, lora, seed=SEED).save_pretrained(str(path))


def _encode_lines(tokenizer: Any, file: Path) -> Iterator[list[int]]:  # noqa: ANN401  # as loaded
    """Yield the ids of a text file line by line, each behind it the end-of-text id."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if text := line.strip():
                yield [*encode_text(tokenizer, [text])[0], tokenizer.eos_token_id]


def _random_documents(vocabulary: int) -> Iterator[list[int]]:
    generator = random.Random(SEED)
    ids = range(vocabulary)
    weights = [1 / (rank + 1) for rank in ids]
    while True:
        yield generator.choices(ids, weights, k=generator.randint(*RANDOM_DOCUMENT_TOKENS))


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")  # noqa: S106


def _write_store(
    path: Path, documents: Iterator[list[int]], vocabulary: int, num_tokens: int
) -> None:
    """Write documents, from the first on again where they end, until there are enough tokens."""
    dtype = token_dtype(vocabulary)
    path.mkdir()
    written = 0
    with ShardWriter(path / "train-00000.arrow", dtype, source=0) as writer:
        for number, ids in enumerate(documents):
            writer.write(ids, 2 * len(ids), 0, number)
            written += len(ids)
            if written >= num_tokens:
                break
    if written < num_tokens:
        raise ValueError(f"the text has {written} tokens, {num_tokens} are needed; use fewer steps")
    assert writer.shard is not None
    splits: dict[SplitName, SplitManifest] = {
        "train": SplitManifest.from_shards([writer.shard]),
        "validation": SplitManifest.from_shards([]),
    }
    inputs = {"shard": writer.shard.hash}
    manifest = Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of(inputs),
        inputs=inputs,
        token_dtype=dtype,
        splits=splits,
        rows=RowCounts(),
        quarantine=None,
        lengths=[],
    )
    write_manifest(Place.local(path / MANIFEST_NAME), manifest)


def read_sequences(config: PretrainConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all ids and labels of a run in the order in which the loop trains on them.

    Returns:
        Two arrays [steps x workers x sequences of a worker, tokens]. Step by step, the first
        worker's sequences stand before the second's: a sequential sampler over two processes
        hands them out as the loop does.
    """
    store = TokenStore.open(Path(config.data.store_dir))
    built = build_sources(config, store)
    plan = build_batch_plan(config, built)
    workers = config.scale.max_workers
    sources = [source.sequences for source in built]
    streams = [
        read_steps(sources, store.fingerprint, plan, rank=rank, world_size=workers)
        for rank in range(workers)
    ]
    parts = [
        part
        for step in zip(*streams, strict=True)
        for batch in step
        for part in batch.micro_batches
    ]
    ids = np.concatenate([part.ids_BT.numpy() for part in parts])
    labels = np.concatenate([part.labels_BT.numpy() for part in parts])
    return ids, labels


def write_json(path: Path, value: Any) -> Path:  # noqa: ANN401  # any JSON value
    """Write a JSON file; return its path."""
    path.write_text(json.dumps(value))
    return path
