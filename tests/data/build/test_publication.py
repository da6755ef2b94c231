"""Promise: what became of the rows is logged in words, with counts and the columns' names."""

import logging
from pathlib import Path

import pytest

from raytune_llama.config.settings import from_dict
from raytune_llama.data.build.publication import check_counts
from raytune_llama.data.build.units import BuildPlan
from raytune_llama.data.config import DataConfig
from raytune_llama.data.store.manifest import (
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    SplitManifest,
)
from raytune_llama.storage.place import Place


def test_check_counts_of_text_names_columns_and_reasons_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = {"path": "rows.jsonl", "text_aliases": ["content", "body"]}
    data = {"sources": [source, {"path": "a.txt"}], "store_dir": str(tmp_path / "store")}
    config = from_dict(DataConfig, data)
    split = SplitManifest(documents=6, tokens=60, text_bytes=200, shards=[])
    empty = SplitManifest.from_shards([])
    skipped = {"blank": 3, "no_tokens": 1, "exact_duplicate": 2, "near_duplicate": 0}
    manifest = Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint="",
        inputs={},
        token_dtype="uint16",  # noqa: S106 - a type's name
        splits={"train": split, "validation": empty},
        rows=RowCounts(total=12, documents=6, skipped=skipped, aliased=5),
        quarantine=None,
        lengths=[],
    )
    place = Place.local(tmp_path)
    plan = BuildPlan(
        work_dir=place,
        store_dir=place,
        files=[],
        bos_id=None,
        eos_id=None,
        dtype="uint16",
        validation_fraction=0.0,
    )
    check_counts(manifest, plan, config)
    left_out, read = caplog.messages
    for words in ("6 of 12 rows", "3 blank", "1 without a token", "2 exact duplicate"):
        assert words in left_out
    assert "near" not in left_out
    for words in ("5 texts", "'content' or 'body'", "'text'"):
        assert words in read
