"""A LLaMA tokenizer grown by Chinese pieces, as Chinese-LLaMA's is: SentencePiece, byte fallback.

The base is the 32,000 pieces of Mistral's first tokenizer, from the pip package mistral-common,
which is downloaded and not installed; the pieces that are added are trained on the demo corpus.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

from raytune_llama.model.meta.tokenizer_files import LLAMA_TOKENIZER
from raytune_llama.vocabulary.config import PieceTraining
from raytune_llama.vocabulary.sentencepiece_merge import merge_pieces, train_pieces

from .corpus import CACHE, ROOT


def make_llama_tokenizer() -> Path:
    """Return a directory with a grown tokenizer.model; make it where it is not there yet."""
    folder = CACHE / "llama-zh"
    if not (folder / "tokenizer.model").exists():
        base = write_base(folder) / "tokenizer.model"
        texts = [file.read_text() for file in sorted((ROOT / "demo" / "corpus").glob("*.txt"))]
        merged = merge_pieces(base.read_bytes(), train_pieces(texts, PieceTraining()))
        base.write_bytes(merged.model)
    return folder


def write_base(folder: Path) -> Path:
    """Write the tokenizer of 32,000 pieces into a directory, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA_TOKENIZER))
    (folder / "tokenizer.model").write_bytes(_base_model())
    return folder


def _base_model() -> bytes:
    wheels = CACHE / "wheels"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    subprocess.run([*command, "mistral-common"], check=True)
    (wheel,) = wheels.glob("mistral_common-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/tokenizer.model.v1")]
        return archive.read(name)
