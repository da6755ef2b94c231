"""Promise: what a config names is found in one order, and every mistake is told before work."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.sources import check_sources, discover_files


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "sub/deep/d.txt", ".hidden.txt", ".git/e.txt"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}')
    return tmp_path / "corpus"


def names(*sources: SourceConfig) -> list[str]:
    return [file.name for file in discover_files(sources)]


def source(path: Path | str, **fields: Any) -> SourceConfig:  # noqa: ANN401
    return SourceConfig(path=str(path), **fields)


def test_discover_folder_lists_all_but_hidden_files_by_name(corpus: Path) -> None:
    assert names(source(corpus)) == ["a.txt", "b.txt", "sub/c.jsonl", "sub/deep/d.txt"]


def test_discover_glob_lists_matches_by_name(corpus: Path) -> None:
    assert names(source(corpus / "*.txt")) == ["a.txt", "b.txt"]
    assert names(source(corpus / "**" / "*.txt")) == ["a.txt", "b.txt", "sub/deep/d.txt"]


def test_discover_glob_reads_matched_folders_whole(corpus: Path) -> None:
    assert names(source(corpus / "s*")) == ["sub/c.jsonl", "sub/deep/d.txt"]


def test_discover_file_with_wildcard_in_its_name_is_that_file(corpus: Path) -> None:
    (corpus / "x[1].txt").write_text("x")
    assert names(source(corpus / "x[1].txt")) == ["x[1].txt"]


def test_discover_moved_folder_keeps_the_names(corpus: Path, tmp_path: Path) -> None:
    before = names(source(corpus))
    corpus.rename(tmp_path / "elsewhere")
    assert names(source(tmp_path / "elsewhere")) == before


def test_discover_several_sources_keep_their_order(corpus: Path) -> None:
    assert names(source(corpus / "b.txt"), source(corpus / "a.txt")) == ["b.txt", "a.txt"]


def test_discover_weight_and_name_do_not_change_what_is_read(corpus: Path) -> None:
    plain = discover_files((source(corpus),))
    assert discover_files((source(corpus, weight=2, name="other"),)) == plain


def test_discover_link_to_a_folder_above_ends(corpus: Path) -> None:
    (corpus / "sub" / "up").symlink_to(corpus)
    assert names(source(corpus)) == ["a.txt", "b.txt", "sub/c.jsonl", "sub/deep/d.txt"]


def test_discover_format_follows_suffix_unless_given(corpus: Path) -> None:
    (corpus / "upper.TXT").write_text("x")
    kinds = [file.options.format for file in discover_files((source(corpus / "*.TXT"),))]
    assert kinds == ["txt"]
    given = discover_files((source(corpus / "sub" / "c.jsonl", format="txt"),))
    assert given[0].options.format == "txt"


def test_discover_all_mistakes_are_reported_together(corpus: Path) -> None:
    (corpus / "notes.csv").write_text("x")
    sources = (
        source(corpus / "none-*"),
        source(corpus),
        source(corpus / "a.txt", text_field="body"),
        source(corpus / "sub" / "c.jsonl", document="file"),
        source("ftp://host/x.txt"),
    )
    with pytest.raises(ConfigError) as caught:
        discover_files(sources)
    starts = [problem.split(":")[0] for problem in caught.value.problems]
    assert starts == [
        "sources.0.path",
        "sources.1.format",
        "sources.2.path",  # they are in the folder of the second source
        "sources.2.text_field",
        "sources.3.path",
        "sources.3.document",
        "sources.4.path",
    ]


def test_discover_file_named_twice_is_refused(corpus: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sources\.1\.path: .*a\.txt is already part of sources\.0"
    ):
        discover_files((source(corpus), source(corpus / "a.txt")))


def test_check_sources_sound_corpus_has_no_problem(corpus: Path) -> None:
    assert check_sources((source(corpus),)) == []


def test_check_sources_empty_list_and_empty_files_are_told(tmp_path: Path) -> None:
    assert "empty list" in check_sources(())[0]
    (tmp_path / "a.txt").touch()
    assert "all 1 files are empty" in check_sources((source(tmp_path),))[0]


def test_check_sources_parquet_without_the_column_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    (problem,) = check_sources((source(tmp_path),))
    assert "a.parquet: no field 'text'; fields are body, id" in problem
    assert check_sources((source(tmp_path, text_field="body"),)) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_check_sources_unreadable_file_is_named(corpus: Path) -> None:
    (corpus / "a.txt").chmod(0)
    assert "a.txt cannot be read: Permission denied" in check_sources((source(corpus),))[0]
