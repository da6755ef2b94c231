"""Promise: JSON that is laid out otherwise than its name says is read, or named before any work."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.config import ConversationSource, SourceConfig
from raytune_llama.data.readers.conversations import ConversationCounts, read_conversations
from raytune_llama.data.readers.encodings import HEAD_BYTES
from raytune_llama.data.readers.rows import ReadOptions
from raytune_llama.data.readers.sources import discover_files
from tests.data.readers.test_documents import TEXT, joined, read, read_in_ranges, read_part

ROWS = [{"text": f"行 {number}", "more": [{}, "]"]} for number in range(6)]
LONG = [{"text": "x" * HEAD_BYTES}, *ROWS]


def printed(*rows: Any, indent: int | None = None, end: str = "\n") -> str:  # noqa: ANN401
    return "".join(json.dumps(row, ensure_ascii=False, indent=indent) + end for row in rows)


LAYOUTS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    # text, its rows, format in which it is read
    "lines": (printed(*ROWS), ROWS, "jsonl"),
    "one line": (printed(ROWS[0]), ROWS[:1], "jsonl"),
    "one array": (printed(ROWS), ROWS, "json"),
    "one array over several lines": (printed(ROWS, indent=1), ROWS, "json"),
    "arrays": (printed(ROWS[:2], ROWS[2:5], ROWS[5:]), ROWS, "jsonl"),
    "an array, then objects": (printed(ROWS[:2], *ROWS[2:]), ROWS, "jsonl"),
    "objects, then an array": (printed(*ROWS[:2], ROWS[2:]), ROWS, "jsonl"),
    "arrays over several lines": (printed(ROWS[:2], ROWS[2:], indent=1), ROWS, "json"),
    "arrays, first one long": (printed(LONG, ROWS), [*LONG, *ROWS], "json"),
    "objects over several lines": (printed(*ROWS, indent=2), ROWS, "json"),
    "objects over several lines, first one long": (printed(*LONG, indent=2), LONG, "json"),
    "lines, first one long": (printed(*LONG), LONG, "jsonl"),
    "lines that end with a comma": (printed(*ROWS, end=",\n"), ROWS, "json"),
    "objects on one line": (printed(*ROWS, end=""), ROWS, "json"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jsonl_of_any_layout_gives_its_rows(layout: str, tmp_path: Path) -> None:
    text, rows, found = LAYOUTS[layout]
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (file,) = discover_files((SourceConfig(path=str(tmp_path)),))
    assert file.options.format == found
    data = text.encode()
    got = joined(read_part(data, 0, len(data), file.options))
    assert got.texts == [row["text"] for row in rows]
    assert got.bad == []
    for row, offset in zip(rows, got.offsets, strict=True):
        assert json.JSONDecoder().raw_decode(data[offset:].decode())[0] == row


@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_of_any_layout_gives_its_rows(layout: str, tmp_path: Path) -> None:
    text, rows, _ = LAYOUTS[layout]
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    (file,) = discover_files((SourceConfig(path=str(tmp_path)),))
    got = joined(read_part(text.encode(), 0, len(text.encode()), file.options))
    assert got.texts == [row["text"] for row in rows]


@given(
    arrays=st.lists(st.lists(TEXT, min_size=1, max_size=3), max_size=5),
    size=st.integers(1, 60),
    num_bytes=st.integers(1, 9),
    codec=st.sampled_from(["utf-8", "gb18030"]),
)
def test_jsonl_arrays_any_ranges_give_the_rows_of_the_whole_file(
    arrays: list[list[str]], size: int, num_bytes: int, codec: str
) -> None:
    text = printed(*([{"text": one} for one in texts] for texts in arrays))
    data = text.encode(codec)
    options = ReadOptions(format="jsonl", encoding=codec)
    got, offsets, bad, lines = read_in_ranges(data, size, num_bytes, options)
    assert (got, bad, lines) == ([one for texts in arrays for one in texts], [], len(arrays))
    assert all(data[offset : offset + 8] == b'{"text":' for offset in offsets)


def test_jsonl_array_with_bad_rows_costs_only_those() -> None:
    text = '[{"text": "a"}, {"text": 3}]\n["x"]\n[]\n[{"text": "b"}, 7]\n[{"text": "c"}]\n'
    rows = read(text.encode(), format="jsonl")
    assert rows.texts == ["a", "c"]
    assert [(row.line, row.reason) for row in rows.bad] == [
        (1, "wrong_type"),
        (2, "not_an_object"),
        (3, "not_an_object"),
        (4, "not_an_object"),
    ]
    assert rows.bad[0].offset == text.index('{"text": 3')


def test_layouts_are_noted_once_per_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(printed(*ROWS, indent=2), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        discover_files((SourceConfig(path=str(tmp_path)),))
    (line,) = caplog.messages
    assert "0.jsonl and 2 more files" in line
    assert "several lines" in line


def test_declared_format_that_the_file_has_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(printed(*ROWS, indent=2), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a\.jsonl: .*several lines.*set format to json or auto"):
        discover_files((SourceConfig(path=str(tmp_path), format="jsonl"),))


def talk(number: int, role: str, content: str, names: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {role: names[0], content: f"{number}?"},
        {role: names[1], content: "新年的钟声" * (number + 1)},
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("first_is_long", [False, True])
def test_array_of_messages_per_line_is_a_conversation(
    tmp_path: Path, suffix: str, num_rows: int, *, first_is_long: bool
) -> None:
    for one, arguments in {
        "role": ("role", "content", ("user", "assistant")),
        "from": ("from", "value", ("human", "gpt")),
    }.items():
        talks = [talk(number, *arguments) for number in range(num_rows)]
        talks[0][1][arguments[1]] += "x" * HEAD_BYTES * first_is_long
        path = tmp_path / f"{one}.{suffix}"
        path.write_text(printed(*talks), encoding="utf-8")
        counts = ConversationCounts()
        rows = list(read_conversations((ConversationSource(path=str(path)),), counts))
        said = [[turn.content for turn in row.conversation.turns] for row in rows]  # pyright: ignore[reportAttributeAccessIssue]
        assert said == [[turn[arguments[1]] for turn in talk] for talk in talks]
        assert [row.line for row in rows] == [*range(1, num_rows + 1)]


def test_array_of_rows_per_line_gives_its_conversations(tmp_path: Path) -> None:
    rows = [{"instruction": f"{number}?", "output": "2"} for number in range(6)]
    (tmp_path / "a.jsonl").write_text(printed(rows[:2], rows[2:]), encoding="utf-8")
    source = ConversationSource(path=str(tmp_path))
    got = list(read_conversations((source,), ConversationCounts()))
    questions = [row.conversation.turns[0].content for row in got]  # pyright: ignore[reportAttributeAccessIssue]
    assert questions == [row["instruction"] for row in rows]
    assert [row.line for row in got] == [1, 1, 2, 2, 2, 2]
