"""A LLaMA tokenizer grown by Chinese pieces, as Chinese-LLaMA's is: SentencePiece, byte fallback.

The base is the 32,000 pieces of Mistral's first tokenizer, from the pip package mistral-common,
which is downloaded and not installed; the pieces that are added are trained on the demo corpus.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]  # made when it is imported
)

from raytune_llama.model.from_meta import LLAMA_TOKENIZER

from .corpus import CACHE, ROOT

NUM_NEW_PIECES = 20_000


def make_llama_tokenizer() -> Path:
    """Return a directory with a grown tokenizer.model; make it where it is not there yet."""
    folder = CACHE / "llama-zh"
    if (folder / "tokenizer.model").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    base = ModelProto.FromString(_base_model())
    added = ModelProto.FromString(_train_pieces())
    known = {piece.piece for piece in base.pieces}
    # Unique scores below the base's last one: equal scores are resolved in more than one way.
    score = min(piece.score for piece in base.pieces)
    for piece in added.pieces:
        if piece.type == ModelProto.SentencePiece.NORMAL and piece.piece not in known:
            score -= 1
            base.pieces.add(piece=piece.piece, score=score)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA_TOKENIZER))
    (folder / "tokenizer.model").write_bytes(base.SerializeToString())
    return folder


def _base_model() -> bytes:
    wheels = CACHE / "wheels"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    subprocess.run([*command, "mistral-common"], check=True)
    (wheel,) = wheels.glob("mistral_common-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/tokenizer.model.v1")]
        return archive.read(name)


def _train_pieces() -> bytes:
    prefix = CACHE / "chinese"
    files = sorted(map(str, (ROOT / "demo" / "corpus").glob("*.txt")))
    sentencepiece.SentencePieceTrainer.train(
        input=files,
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=NUM_NEW_PIECES,
        character_coverage=0.9995,
        num_threads=2,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()
