"""Load a tokenizer, identify it by its content, and encode text that can hold no control token."""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""A directory with one of these holds a tokenizer; settings lie beside it."""

ENGINE_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""The parts of a tokenizer's engine that decide which ids a text gets."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local directory.

    Raises:
        ValueError: `path` holds no tokenizer file, or not all that says how text is split.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"tokenizer: {path} holds none of {', '.join(TOKENIZER_FILES)}; "
            "name a directory saved by a tokenizer's save_pretrained"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    # Only tokenizer.json holds the normalization; without it a class has to know it. The generic
    # class knows none, and gives LLaMA's tokenizer.model other ids without a word.
    if type(tokenizer) is PreTrainedTokenizerFast and not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"tokenizer: {path} has no tokenizer.json and its tokenizer_config.json names no "
            "class that knows how text is split; write there the model's, for LLaMA "
            '{"tokenizer_class": "LlamaTokenizer"}'
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(  # noqa: TRY004  # the directory is wrong, not an argument's type
            f"tokenizer: {path} is a {type(tokenizer).__name__}, which has no tokenizer.json form; "
            "name a directory with a tokenizer.json"
        )
    return tokenizer


def tokenizer_sha256(path: Path) -> str:
    """Hash what decides the ids of documents: the engine as it is loaded, and which ids end them.

    The engine and not the files: settings in tokenizer_config.json change ids too, and a tokenizer
    that is only saved again keeps its hash.
    """
    tokenizer = load_tokenizer(path)
    engine = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {name: engine[name] for name in ENGINE_PARTS}
    content |= {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode texts as plain text: control tokens written in them stay text.

    Equals the tokenizer's own ids (without added special tokens) for texts in which no control
    token is written.
    """
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"]
