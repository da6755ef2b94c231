"""A store in which each document holds a token of its own, and models that this token breaks."""

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from raytune_llama.data.store.token_store import open_store
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.inputs import build_batch_plan, build_sources
from tests.train.conftest import WORDS, write_model, write_store

MARKS = "ABCDEFGHIJKMNOQRSTVWXYZ#$%&*<>@_~"
"""Each is a token by itself, and none of the text or of what a run proves itself with."""

CROPS = {"batch__packing": "crops", "lora__modules_to_save": []}
"""Fields of a run whose sequences are documents, and whose embeddings are frozen."""


def write_marked_store(path: Path, tokenizer_dir: Path) -> None:
    """Write a store whose n-th training document ends with the n-th mark."""
    generator = random.Random(5)
    texts = [f"{' '.join(generator.choices(WORDS, k=4))} {mark}" for mark in MARKS]
    plain = [" ".join(generator.choices(WORDS, k=8)) for _ in range(4)]
    write_store(path, tokenizer_dir, train=[texts], validation=[plain])


def write_broken_model(path: Path, tokenizer_dir: Path, marks: str) -> Path:
    """Write a model that makes the loss of each text with one of the marks not a number."""
    write_model(path, tied=False)
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for mark in marks:
        (id_,) = encode_text(tokenizer, [mark])[0]
        tensors["model.embed_tokens.weight"][id_] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def mark_at(config: PretrainConfig, position: int) -> str:
    """Return the mark of the document at a position of a run."""
    store = open_store(config.data)
    plan = build_batch_plan(config, build_sources(config, store))
    return MARKS[plan.sample(position, store.fingerprint).index]
