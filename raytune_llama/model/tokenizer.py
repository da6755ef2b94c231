"""Load a tokenizer, identify it by its content, and encode text that can hold no control token."""

import hashlib
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""The files that decide which ids a text gets; settings beside them do not."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local directory.

    Raises:
        ValueError: `path` holds no tokenizer file.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"tokenizer: {path} holds none of {', '.join(TOKENIZER_FILES)}; "
            "name a directory saved by a tokenizer's save_pretrained"
        )
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def tokenizer_sha256(path: Path) -> str:
    """Hash the names and bytes of the files that decide a tokenizer's ids."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = path / name
        if file.is_file():
            digest.update(f"{name}:{file.stat().st_size}:".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode texts as plain text: control tokens written in them stay text.

    Equals the tokenizer's own ids (without added special tokens) for texts in which no control
    token is written.
    """
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"]
