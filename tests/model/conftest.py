"""Tiny real models, and a tokenizer in the two forms that LLaMA-family models come with."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
)
from transformers import LlamaConfig, LlamaForCausalLM

MakeModel = Callable[..., LlamaForCausalLM]

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Data stages meet only through directories, and nothing is silent.",
    "人民日报一九九八年一月一日。新年的钟声敲响了。",
)

NAMES_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
"""The tokenizer_config.json that makes a tokenizer.model LLaMA's."""


def llama_config(**fields: Any) -> LlamaConfig:  # noqa: ANN401
    """Settings of a LLaMA of two layers, with ten rows behind a tokenizer's 400 ids."""
    values = {
        "vocab_size": 410,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        # Larger than usual, so that what attention lets through shows.
        "initializer_range": 0.3,
    }
    return LlamaConfig(**(values | fields))


@pytest.fixture(scope="session")
def make_llama() -> MakeModel:
    """Build a LLaMA in evaluation mode; the same keywords give the same weights."""

    def make(*, seed: int = 0, **fields: Any) -> LlamaForCausalLM:  # noqa: ANN401
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(llama_config(**fields)).eval()

    return make


@pytest.fixture(scope="session")
def piece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model trained with LLaMA's own SentencePiece options."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=written,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture
def llama_tokenizer_dir(tmp_path: Path, piece_model: Path) -> Path:
    """A directory with only tokenizer.model and a tokenizer_config.json that names LLaMA's."""
    path = tmp_path / "llama-tokenizer"
    path.mkdir()
    shutil.copy(piece_model, path)
    (path / "tokenizer_config.json").write_text(json.dumps(NAMES_LLAMA))
    return path


TIED_PIECES = ("日报", "人民", "民日", "新年", "年的", "的新", "钟声", "声敲")
"""Pieces that overlap in text; those that come first there are not those that are listed first."""


@pytest.fixture
def merged_tokenizer_dir(llama_tokenizer_dir: Path) -> Path:
    """A vocabulary merged as the seeds' stack does it: new pieces behind, all with score 0."""
    file = llama_tokenizer_dir / "tokenizer.model"
    proto = ModelProto.FromString(file.read_bytes())
    known = {piece.piece for piece in proto.pieces}
    characters = sorted({*"".join(TIED_PIECES)} - known)
    for text in (*characters, *TIED_PIECES):
        if text not in known:
            proto.pieces.add(piece=text, score=0.0)
    file.write_bytes(proto.SerializeToString())
    return llama_tokenizer_dir
