"""Promise: the log says what one document of each source is, and shows one."""

import gzip
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_llama.data.build.preparation import open_data
from raytune_llama.data.config import DataConfig
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.examples import log_documents
from raytune_llama.data.readers.sources import discover_files

NOVEL = "\n第一章\n\n" + "".join(f"{number:03} " + "新年的钟声" * 9 + "\n" for number in range(200))


def logged(caplog: pytest.LogCaptureFixture, *paths: Path, **fields: Any) -> list[str]:  # noqa: ANN401
    sources = tuple(SourceConfig(path=str(path), **fields) for path in paths)
    files = discover_files(sources)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log_documents(sources, files)
    return caplog.messages


@pytest.mark.parametrize(
    ("document", "num_characters", "shown"),
    [
        ("line", [3, 201, 49], "'第一章'"),
        ("blank_line", [3, 2, 5_001], "'第一章'"),
        ("file", [10_005], repr(NOVEL[:60])),
    ],
)
def test_log_shows_the_first_document_and_the_usual_length(
    document: str,
    num_characters: list[int],
    shown: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "novel.txt"
    path.write_text(NOVEL, encoding="utf-8")
    (line,) = logged(caplog, path, document=document)
    assert str(path) in line
    assert f"document: {document}" in line
    assert shown in line
    for number in num_characters:
        assert f" {number:,} " in line


def test_log_has_a_line_per_source_of_any_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a.txt").touch()
    (tmp_path / "1" / "b.txt.gz").write_bytes(gzip.compress(NOVEL.encode()))
    (tmp_path / "2.jsonl").write_text('{"text": "in a row"}\n')
    pq.write_table(pa.table({"text": ["in a column"]}), tmp_path / "3.parquet")
    lines = logged(caplog, *(tmp_path / name for name in ("1", "2.jsonl", "3.parquet")))
    assert len(lines) == 3
    for line, shown in zip(lines, ("第一章", "in a row", "in a column"), strict=True):
        assert shown in line


def test_file_that_cannot_be_read_is_left_to_the_build(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = gzip.compress(40 * NOVEL.encode(), compresslevel=0)
    (tmp_path / "a.txt.gz").write_bytes(data[: len(data) // 2])
    (line,) = logged(caplog, tmp_path / "a.txt.gz")
    assert f"{len(data) // 2:,} bytes" in line


def test_open_data_logs_the_documents_of_its_sources_once(
    tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(NOVEL, encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "a.txt"))
    with caplog.at_level(logging.INFO):
        open_data(DataConfig(store_dir=str(tmp_path / "store"), sources=(source,)), tokenizer_dir)
    assert len([line for line in caplog.messages if "document: line" in line]) == 1
