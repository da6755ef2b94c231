"""Promise: what holds no data in a folder is skipped by name; nothing that may be data is."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.build.chat_corpus import open_chat_corpus
from raytune_llama.data.config import ChatDataConfig, ConvertDataConfig
from raytune_llama.data.conversion import convert_data
from raytune_llama.data.readers.config import ConversationSource, SourceConfig
from raytune_llama.data.readers.conversations import (
    find_conversation_files,
    starts_with_conversation,
)
from raytune_llama.data.readers.sources import check_sources, discover_files
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_tokenizer

SIDE_FILES = [
    "README.md",
    "README_zh.md",
    "readme.txt",
    "README",
    "LICENSE",
    "LICENSE-MIT",
    "license.txt",
    "NOTICE",
    "CITATION.cff",
    "notes.md",
    "Thumbs.db",
    "desktop.ini",
    "train.csv.bak",
    "data.jsonl.md5",
    "_SUCCESS",
    "train.jsonl~",
]
METADATA: dict[str, Any] = {
    "dataset_infos.json": {"default": {"features": {"text": {}}, "splits": {"train": {}}}},
    "dataset_info.json": {"alpaca_zh": {"hf_hub_url": "x/y"}},
    "dataset_dict.json": {"splits": ["train"]},
    "state.json": {"_data_files": [{"filename": "data.arrow"}], "_split": "train"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "sub/b.jsonl"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x", "instruction": "x", "output": "y"}\n')
    return tmp_path / "corpus"


def names(path: Path, **fields: Any) -> list[str]:  # noqa: ANN401
    return [file.name for file in discover_files((SourceConfig(path=str(path), **fields),))]


@pytest.mark.parametrize("name", [*SIDE_FILES, *METADATA])
def test_side_file_in_a_folder_or_glob_is_skipped(name: str, folder: Path) -> None:
    (folder / name).write_text(json.dumps(METADATA.get(name, "x")))
    assert names(folder) == names(folder / "**" / "*") == ["a.jsonl", "sub/b.jsonl"]
    found = find_conversation_files((ConversationSource(path=str(folder)),))
    assert [file.name for file in found] == ["a.jsonl", "sub/b.jsonl"]


def test_side_files_are_logged_in_one_line_per_source(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in SIDE_FILES:
        (folder / name).write_text("x")
    with caplog.at_level(logging.INFO):
        discover_files((SourceConfig(path=str(folder)),))
    (line,) = caplog.messages
    assert str(folder) in line
    assert str(len(SIDE_FILES)) in line
    assert "CITATION.cff, LICENSE" in line


def test_side_files_are_logged_once_by_what_looks_at_the_files_twice(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "README.md").write_text("x")
    sources = (ConversationSource(path=str(folder)),)
    with caplog.at_level(logging.INFO):
        starts_with_conversation(sources)
        convert_data(
            ConvertDataConfig(
                sources=sources, target=str(tmp_path / "out"), ignore_fields=("text",)
            )
        )
    assert len([line for line in caplog.messages if "README.md" in line]) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("readme.jsonl", '{"text": "x"}\n'),
        ("state.json", '[{"text": "x"}]'),
        ("dataset_info.json", '{"text": "x", "features": "y"}\n{"text": "x"}\n'),
        ("dataset_infos.json", '{"text": "x"}'),
        ("changes.txt", "x"),
        ("notice_board.txt", "x"),
        ("bak.txt", "x"),
    ],
)
def test_file_that_may_have_rows_is_never_skipped(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    assert name in names(folder)


def test_side_file_that_is_named_is_read(folder: Path) -> None:
    (folder / "README.txt").write_text("x")
    assert names(folder / "README.txt") == ["README.txt"]
    (folder / "notes.md").write_text("x")
    assert names(folder / "notes.md", format="txt") == ["notes.md"]


def test_documentation_is_data_where_all_files_are_declared_text(folder: Path) -> None:
    for name in ("notes.md", "README", "Thumbs.db"):
        (folder / name).write_text("x")
    assert names(folder, format="txt") == ["README", "a.jsonl", "notes.md", "sub/b.jsonl"]


def test_folder_of_nothing_but_side_files_is_refused_by_their_names(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text("x")
    (problem,) = check_sources((SourceConfig(path=str(tmp_path)),))
    assert problem.startswith(f"sources.0.path: {tmp_path} has no data, only LICENSE, README.md")


def test_unknown_files_are_refused_in_one_line_per_suffix(folder: Path) -> None:
    for name in ("1.csv", "2.csv", "3.csv", "x.bin"):
        (folder / name).write_text("x")
    csv, other = check_sources((SourceConfig(path=str(folder)),))
    assert csv.startswith(f"sources.0.format: unknown suffix .csv of {folder / '1.csv'} and 2 more")
    assert "x.bin" in other


def test_side_files_in_a_bucket_are_skipped(s3: Place) -> None:
    folder = s3 / "side-files"
    for name in ("a.txt", "README.md", "sub/LICENSE"):
        (folder / name).write_bytes(b"x")
    found = discover_files((SourceConfig(path=str(folder)),))
    assert [file.name for file in found] == ["a.txt"]


def test_wrong_path_of_conversations_is_one_problem(
    tmp_path: Path, folder: Path, tokenizer_dir: Path
) -> None:
    data = {
        "store_dir": str(tmp_path / "store"),
        "sources": [{"path": str(folder)}, {"path": str(tmp_path / "nowhere")}],
        "chat": {"template": "alpaca", "ignore_fields": ["text"]},
    }
    with pytest.raises(ConfigError) as caught:
        open_chat_corpus(from_dict(ChatDataConfig, data), load_tokenizer(tokenizer_dir))
    (problem,) = caught.value.problems
    assert problem.startswith("data.sources.1.path: no file matches")
