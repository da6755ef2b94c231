"""Promise: a preview shows the very tokens of the store, with their boundaries."""

import json
import re
from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.build.preview import render_preview
from raytune_llama.data.config import DataConfig
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer

TEXTS = ["the quick brown fox", "人民日报\n新年", "\U0001f600 </s>"]


def config(tmp_path: Path) -> DataConfig:
    rows = "\n".join(json.dumps({"text": text}) for text in [*TEXTS, "", "one more"])
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.txt").write_text("a line\n")
    sources = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.txt")]
    return from_dict(DataConfig, {"sources": sources, "store_dir": str(tmp_path / "store")})


def test_preview_pieces_put_together_are_the_documents(tmp_path: Path, tokenizer_dir: Path) -> None:
    lines = render_preview(config(tmp_path), tokenizer_dir, num_documents=3, color=False).split(
        "\n"
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    bos, eos = f"[{tokenizer.bos_token}]", f"[{tokenizer.eos_token}]"
    for number, text in enumerate([*TEXTS, "a line"]):
        head, shown = lines[3 * number], lines[3 * number + 1]
        ids = encode_text(tokenizer, [text])[0]
        assert f"{len(text.encode())} bytes, {len(ids) + 2} tokens" in head
        pieces = shown.split("|")
        assert (pieces[0], pieces[-1]) == (bos, eos)
        assert "".join(piece.rstrip(".") for piece in pieces[1:-1]) == text.replace("\n", "\\n")
        dots = sum(len(piece) - len(piece.rstrip(".")) for piece in pieces[1:-1])
        assert len(pieces) - 2 + dots == len(ids)
    assert not (tmp_path / "store").exists()


def test_preview_in_color_has_the_same_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    plain = render_preview(config(tmp_path), tokenizer_dir, num_documents=1, color=False)
    color = render_preview(config(tmp_path), tokenizer_dir, num_documents=1, color=True)
    assert "\x1b[" in color
    unboxed = re.sub(r"\[(</?s>)\]", r"\1", plain.replace("|", ""))
    assert re.sub("\x1b" + r"\[[0-9;]*m", "", color) == unboxed


def test_preview_of_a_config_with_mistakes_names_them(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "b.txt").write_text("x")
    bad = from_dict(
        DataConfig,
        {"sources": [{"path": str(tmp_path / "none")}], "store_dir": str(tmp_path / "store")},
    )
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path"):
        render_preview(bad, tokenizer_dir, num_documents=1, color=False)
