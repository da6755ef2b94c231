"""The tokenizer.model of Meta's format, of two kinds: SentencePiece's and tiktoken's.

    found = find_tokenizer(directory)                       # Meta's directory
    write_tokenizer_files(found, folder, ...)               # into a model directory
    written = plan_tokenizer_model(model_directory)         # and back: bytes of a tokenizer.model

LLaMA 1 and 2 have a SentencePiece model, which is copied in both directions. LLaMA 3 has a file of
tiktoken's: a tokenizer.json with the same ids is built from it; back, it is built from the
tokenizer.json, so that a file that lies beside it cannot contradict it.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizerFast

from raytune_llama.config.errors import UserError
from raytune_llama.model.meta.llama3 import (
    CHAT_TEMPLATE,
    NUM_CONTROLS,
    Llama3Version,
    begin_token,
    control_tokens,
    end_tokens,
)
from raytune_llama.model.meta.tiktoken_file import (
    build_engine,
    dump_tiktoken,
    engine_ranks,
    is_tiktoken,
    parse_tiktoken,
)
from raytune_llama.model.tensors import LFS_POINTER
from raytune_llama.storage.files import read_json, write_json_atomic
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.tokenizer.reference import is_sentencepiece

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.model"
"""Name of the tokenizer's file in Meta's format; model directories with SentencePiece's have it."""

_ENGINE = "tokenizer.json"
_LLAMA3_TOKENIZER_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
_LLAMA3_TOKENS = 128000

LLAMA_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
}
"""Content of a tokenizer_config.json for the class that splits text as LLaMA's SentencePiece model
does."""


@dataclass(frozen=True)
class MetaTokenizer:
    """A tokenizer.model."""

    path: Path
    """The file; not read again."""
    content: bytes
    """Its bytes."""
    num_tokens: int
    """Number of its token ids, control tokens included."""
    ranks: Mapping[bytes, int] | None
    """Rank of each text token in a file of tiktoken's; None: it is a SentencePiece model."""

    @property
    def is_llama3(self) -> bool:
        """Whether it is the tokenizer of a LLaMA 3."""
        return self.ranks is not None


def find_tokenizer(source: Path) -> MetaTokenizer:
    """Read the tokenizer.model of a directory in Meta's format, or of its parent directory.

    Raises:
        ValueError: It is missing, damaged, a Git LFS pointer or of an unknown format.
    """
    for path in (source / TOKENIZER, source.parent / TOKENIZER):
        if path.is_file():
            return _read_tokenizer(path)
    raise UserError(
        f"source: neither {source} nor its parent directory has {TOKENIZER}; put it there"
    )


def _read_tokenizer(path: Path) -> MetaTokenizer:
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer, not the file; run git lfs pull there")
    if is_tiktoken(content):
        ranks = parse_tiktoken(content, f"source: {path}")
        return MetaTokenizer(path, content, len(ranks) + NUM_CONTROLS, ranks)
    if not is_sentencepiece(content):
        raise UserError(
            f"source: {path} is neither a SentencePiece model, of LLaMA 1 and 2, nor a file of "
            "tiktoken's, of LLaMA 3; it is damaged or another file, fetch it again"
        )
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(
            f"source: {path} is a damaged SentencePiece model ({error}); fetch it again"
        ) from None
    return MetaTokenizer(path, content, len(pieces), None)


def write_tokenizer_files(
    tokenizer: MetaTokenizer,
    folder: Path,
    *,
    version: Llama3Version,
    instruct: bool,
    context_tokens: int,
) -> None:
    """Write a tokenizer into a model directory.

    Args:
        tokenizer: The tokenizer in Meta's format.
        folder: The model directory; it must exist.
        version: Names of the control tokens, for LLaMA 3.
        instruct: Whether a text ends as a turn of a conversation, for LLaMA 3.
        context_tokens: Context length of the model.
    """
    if tokenizer.ranks is None:
        (folder / TOKENIZER).write_bytes(tokenizer.content)
        settings = LLAMA_TOKENIZER | {"model_max_length": context_tokens}
        write_json_atomic(folder / "tokenizer_config.json", settings)
        return
    engine = build_engine(tokenizer.ranks, control_tokens(version))
    PreTrainedTokenizerFast(
        tokenizer_object=engine,
        bos_token=begin_token(),
        eos_token=end_tokens(version, instruct=instruct)[0],
        chat_template=CHAT_TEMPLATE if instruct else None,
        model_max_length=context_tokens,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    loaded = load_tokenizer(folder)
    names = loaded.convert_ids_to_tokens(list(range(len(tokenizer.ranks), tokenizer.num_tokens)))
    assert names == control_tokens(version)
    assert engine_ranks(json.loads(loaded.backend_tokenizer.to_str()), "loaded") == tokenizer.ranks
    digest = hashlib.sha256(dump_tiktoken(tokenizer.ranks)).hexdigest()
    if len(tokenizer.ranks) == _LLAMA3_TOKENS and digest != _LLAMA3_TOKENIZER_SHA256:
        logger.warning(
            "%s has as many tokens as LLaMA 3's, but other ones than the file that Meta published: "
            "it is damaged, or of another model",
            tokenizer.path,
        )


def plan_tokenizer_model(source: Path, version: Llama3Version) -> MetaTokenizer | None:
    """Return the tokenizer.model for a model directory; None if it has no tokenizer.

    Args:
        source: Directory of a tokenizer.
        version: Whose names of control tokens Meta's code will give, if it is a LLaMA 3.

    Raises:
        ValueError: The tokenizer is neither a SentencePiece model nor that of a LLaMA 3.
    """
    path, engine = source / TOKENIZER, source / _ENGINE
    found = _read_tokenizer(path) if path.is_file() else None
    if not engine.is_file() or (found and not found.is_llama3):
        return found
    content = read_json(engine)
    if not isinstance(content, dict):
        raise UserError(f"source: {engine} is not a JSON object; restore it")
    ranks = engine_ranks(content, f"source: {engine}")
    _check_controls(content, ranks, version, engine)
    if found and found.ranks != ranks:
        raise UserError(
            f"source: {path} and {engine.name} are different tokenizers; delete the one that the "
            "model was not trained with"
        )
    return MetaTokenizer(engine, dump_tiktoken(ranks), len(ranks) + NUM_CONTROLS, ranks)


def _check_controls(
    content: Mapping[str, Any], ranks: Mapping[bytes, int], version: Llama3Version, engine: Path
) -> None:
    """Refuse control tokens other than those that Meta's code adds to a tokenizer.model."""
    wanted = {len(ranks) + place: name for place, name in enumerate(control_tokens(version))}
    found = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    other = [id_ for id_ in sorted(wanted.keys() | found) if wanted.get(id_) != found.get(id_)]
    if other:
        raise UserError(
            f"source: {engine} names the id {other[0]} {found.get(other[0])!r}, but Meta's code of "
            f"LLaMA {version} names it {wanted.get(other[0])!r}, and tokenizer.model has no place "
            "for other names; convert a model with Meta's control tokens"
        )
