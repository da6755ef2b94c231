"""A sample shows every part of a corpus, and its lengths are those that the store will have."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import from_dict
from raytune_llama.data.build.preparation import open_data
from raytune_llama.data.build.sample import HeadRow, choose_rows, read_heads, sample_lengths
from raytune_llama.data.config import AnyDataConfig, ChatDataConfig, DataConfig
from raytune_llama.data.store.lengths import LengthTable
from tests.data.stores import build_store


def text_config(tmp_path: Path, sizes: dict[str, int]) -> DataConfig:
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        (folder / f"{name}.txt").write_text("\n" + "".join(f"{name}{n}\n\n" for n in range(size)))
    data = {"sources": [{"path": str(folder)}], "store_dir": str(tmp_path / "store")}
    return from_dict(DataConfig, data)


def heads_of(
    config: AnyDataConfig, tokenizer_dir: Path, num_files: int, **most: int
) -> list[list[HeadRow]]:
    return read_heads(open_data(config, tokenizer_dir).corpus.files, num_files, **most)


@pytest.mark.parametrize(
    ("sizes", "number", "chosen"),
    [
        ({"a": 9}, 3, ["a0", "a3", "a6"]),
        ({"a": 2}, 5, ["a0", "a1"]),
        ({"a": 9, "b": 9}, 3, ["a0", "a4", "b4"]),
        ({"a": 1, "b": 9}, 4, ["a0", "b1", "b4", "b7"]),
        ({"a": 9, "b": 9, "c": 9}, 3, ["a0", "b3", "c6"]),
        (dict.fromkeys("abcdef", 9), 2, ["a0", "d4"]),
    ],
)
def test_choose_rows_are_spread_over_files_and_heads_without_blank_ones(
    tmp_path: Path, tokenizer_dir: Path, sizes: dict[str, int], number: int, chosen: list[str]
) -> None:
    heads = heads_of(text_config(tmp_path, sizes), tokenizer_dir, number)
    assert [row.value for row in choose_rows(heads, number)] == chosen


def test_read_heads_ends_after_the_given_rows_and_bytes(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    config = text_config(tmp_path, {"a": 50})
    (rows,) = heads_of(config, tokenizer_dir, 1, max_rows=7)
    assert len(rows) == 7
    (rows,) = heads_of(config, tokenizer_dir, 1, max_bytes=21)  # each row has 4 bytes, after 1
    assert [row.value for row in rows] == ["a0", "a1", "a2", "a3", "a4"]
    (rows,) = heads_of(config, tokenizer_dir, 1, max_bytes=0)
    assert len(rows) == 1


def test_head_row_place_has_the_line_of_the_file(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [
        '{"instruction": "a", "output": "b"}',
        "",
        "{broken",
        '{"instruction": "c", "output": ""}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    config = chat_config(tmp_path)
    (head,) = heads_of(config, tokenizer_dir, 1)
    assert [row.place for row in head] == [f"a.jsonl, line {line}" for line in (1, 3, 4)]


def test_head_row_place_in_an_array_has_the_byte_too(tmp_path: Path, tokenizer_dir: Path) -> None:
    row = {"instruction": "a", "output": "b"}
    text = json.dumps([row, row])
    (tmp_path / "a.jsonl").write_text(text)
    (head,) = heads_of(chat_config(tmp_path), tokenizer_dir, 1)
    places = [
        f"a.jsonl, line 1, byte {text.index('{')}",
        f"a.jsonl, line 1, byte {text.rindex('{')}",
    ]
    assert [row.place for row in head] == places


def chat_config(tmp_path: Path, **chat: Any) -> ChatDataConfig:  # noqa: ANN401
    data = {
        "sources": [{"path": str(tmp_path / "a.jsonl")}],
        "store_dir": str(tmp_path / "store"),
        "chat": {"template": "alpaca", **chat},
        "max_bad_fraction": 1.0,
        "max_left_out_fraction": 1.0,
    }
    return from_dict(ChatDataConfig, data)


def sampled(config: AnyDataConfig, tokenizer_dir: Path) -> LengthTable:
    inputs = open_data(config, tokenizer_dir)
    return sample_lengths(inputs.corpus, inputs.tokenizer)


@pytest.mark.ray
@pytest.mark.parametrize("truncation", ["keep_eos", "drop"])
def test_sample_lengths_of_a_small_corpus_are_those_of_its_store(
    tmp_path: Path, tokenizer_dir: Path, ray_cluster: str, truncation: str
) -> None:
    rows = [{"instruction": "fox " * n, "output": "dog " * (n + 1)} for n in range(60)]
    rows.append({"instruction": "blank", "output": ""})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = chat_config(tmp_path, max_tokens=200, truncation=truncation)
    table = sampled(config, tokenizer_dir)
    stored = LengthTable.from_manifest(build_store(config, tokenizer_dir).manifest)
    assert table.is_sample
    assert table.bins == stored.bins
    assert dict(table.facts()) == dict(stored.facts())
    assert 5 < table.cut.total() + table.left_out.total() < 55


@pytest.mark.ray
def test_sample_lengths_of_text_are_those_of_its_store(
    tmp_path: Path, tokenizer_dir: Path, ray_cluster: str
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "long.txt").write_text("".join("fox " * n + "\n" for n in range(60)))
    config = text_config(tmp_path, {"a": 5, "b": 7})
    stored = LengthTable.from_manifest(build_store(config, tokenizer_dir).manifest)
    assert sampled(config, tokenizer_dir).bins == stored.bins


def test_sample_lengths_reads_no_more_than_the_head_of_a_large_file(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    row = json.dumps({"instruction": "fox", "output": "dog " * 50}) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 30_000)
    assert 1000 <= sampled(chat_config(tmp_path), tokenizer_dir).num_rows <= 3000
