"""Promise: every row of a file comes out once, as text or as a bad row, whatever the ranges."""

import bz2
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.readers.documents import OpenRange, read_rows
from raytune_llama.data.readers.ranges import HashingReader
from raytune_llama.data.readers.rows import BadRow, ReadOptions, RowBatch, SourceError
from raytune_llama.storage.place import Place

BOM = b"\xef\xbb\xbf"

# Line ends of Unicode and of str.splitlines, which are text here.
TEXT = st.text(
    st.sampled_from("a é中\U0001f600\r\n\x0b\x0c\x1c\x85\u2028\u2029\ufeff\t\u3000"), max_size=40
)
LINES = st.lists(st.sampled_from(["", " ", "\u3000", "a", "中文", "é", "b\r"]), max_size=12)


class TrickleFile:
    """An open file that returns a few bytes at a time, whatever is asked for."""

    def __init__(self, data: bytes, num_bytes: int) -> None:
        self._file = pa.BufferReader(data)
        self._num_bytes = num_bytes

    def seek(self, position: int) -> None:
        self._file.seek(position)

    def read(self, num_bytes: int) -> bytes:
        return self._file.read(min(num_bytes, self._num_bytes))


def read_part(
    data: bytes, start: int, stop: int, options: ReadOptions, num_bytes: int = 1 << 20
) -> Iterator[RowBatch]:
    slow: Any = TrickleFile(data, num_bytes)
    place = Place("", "/corpus/file")
    reader = HashingReader(slow, start, stop)
    return read_rows(OpenRange(place, pa.BufferReader(data), start, stop, reader), options)


def joined(batches: Iterator[RowBatch]) -> RowBatch:
    whole = RowBatch()
    for batch in batches:
        whole.texts += batch.texts
        whole.offsets += batch.offsets
        whole.num_bytes += batch.num_bytes
        whole.bad += batch.bad
        whole.num_rows += batch.num_rows
        whole.num_lines += batch.num_lines
        whole.num_alias_rows += batch.num_alias_rows
    assert whole.num_rows == len(whole.texts) + len(whole.bad)
    assert len(whole.texts) == len(whole.offsets) == len(whole.num_bytes)
    assert [len(text.encode()) for text in whole.texts] == whole.num_bytes
    return whole


def read(data: bytes, **options: Any) -> RowBatch:  # noqa: ANN401
    return joined(read_part(data, 0, len(data), ReadOptions(**options)))


def read_in_ranges(
    data: bytes, size: int, num_bytes: int, options: ReadOptions
) -> tuple[list[str], list[int], list[BadRow], int]:
    """Read a file range by range; return texts, offsets, bad rows (lines in the file), lines."""
    texts: list[str] = []
    offsets: list[int] = []
    bad: list[BadRow] = []
    lines = 0
    for start in range(0, len(data), size):
        part = joined(
            read_part(data, start, min(start + size, len(data)), options, num_bytes=num_bytes)
        )
        texts += part.texts
        offsets += part.offsets
        bad += [BadRow(row.line + lines, row.offset, row.reason, row.detail) for row in part.bad]
        lines += part.num_lines
    return texts, offsets, bad, lines


@given(text=TEXT, bom=st.sampled_from([b"", BOM]))
def test_txt_lines_any_text_offsets_point_at_the_bytes(text: str, bom: bytes) -> None:
    data = bom + text.encode()
    rows = read(data, format="txt", bom_bytes=len(bom))
    for row, offset, num_bytes in zip(rows.texts, rows.offsets, rows.num_bytes, strict=True):
        assert data[offset:][:num_bytes] == row.encode()
    lines = data.removeprefix(bom).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    assert [row.encode() for row in rows.texts] == [line.removesuffix(b"\r") for line in lines]


@given(
    lines=LINES,
    end=st.sampled_from(["", "\n"]),
    size=st.integers(1, 30),
    num_bytes=st.integers(1, 9),
    document=st.sampled_from(["line", "blank_line"]),
    codec=st.sampled_from(["utf-8", "gb18030"]),
    broken=st.booleans(),
)
def test_txt_any_ranges_give_the_rows_of_the_whole_file(
    *,
    lines: list[str],
    end: str,
    size: int,
    num_bytes: int,
    document: Any,  # noqa: ANN401
    codec: str,
    broken: bool,
) -> None:
    data = ("\n".join(lines) + end).encode(codec)
    if broken:
        data = data.replace(b"a", b"\xff\xfe")
    options = ReadOptions(format="txt", document=document, encoding=codec)
    whole = joined(read_part(data, 0, len(data), options))
    assert read_in_ranges(data, size, num_bytes, options) == (
        whole.texts,
        whole.offsets,
        whole.bad,
        whole.num_lines,
    )


@given(lines=LINES)
def test_txt_paragraphs_are_the_runs_of_lines_that_are_not_blank(lines: list[str]) -> None:
    rows = read("\n".join(lines).encode(), format="txt", document="blank_line")
    wanted: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            wanted[-1].append(line.removesuffix("\r"))
        else:
            wanted.append([])
    assert rows.texts == ["\n".join(paragraph) for paragraph in wanted if paragraph]


def test_txt_file_mode_is_one_document() -> None:
    rows = read(BOM + "一\r\n\n二\n".encode(), format="txt", document="file", bom_bytes=3)
    assert rows.texts == ["一\n\n二"]
    assert rows.offsets == [3]


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", [True, False])
def test_txt_utf_16_lines_come_whole(codec: str, *, mark: bool) -> None:
    # U+0A0D and U+0D0A hold the bytes of line ends.
    text = "中文\r\n\u0a0d\u0d0a\U0001f600\nlast"
    data = (("\ufeff" if mark else "") + text).encode(codec)
    rows = read(data, format="txt", encoding=codec, bom_bytes=2 if mark else 0)
    assert rows.texts == ["中文", "\u0a0d\u0d0a\U0001f600", "last"]


def test_txt_utf_16_half_a_character_spoils_its_line_only() -> None:
    data = "good\n".encode("utf-16-le") + b"\x00\xd8\n\x00" + "more\nx".encode("utf-16-le") + b"y"
    rows = read(data, format="txt", encoding="utf-16-le")
    assert rows.texts == ["good", "more"]
    assert [(row.line, row.reason) for row in rows.bad] == [
        (2, "invalid_bytes"),
        (4, "invalid_bytes"),
    ]


def test_txt_bad_lines_are_told_with_line_offset_and_reason() -> None:
    data = b"good\n\xe4\xb8\nnul\0here\n" + b"x" * 50 + b"\r\nlast"
    rows = read(data, format="txt", max_document_bytes=20)
    assert rows.texts == ["good", "last"]
    assert [(row.line, row.offset, row.reason) for row in rows.bad] == [
        (2, 5, "invalid_bytes"),
        (3, 8, "nul"),
        (4, 17, "too_long"),
    ]
    assert "0xe4 at offset 5" in rows.bad[0].detail


def test_txt_lines_far_longer_than_memory_allows_are_skipped() -> None:
    data = b"a\n" + b"x" * (20 << 20) + b"\nb\n"
    rows = read(data, format="txt", max_document_bytes=1 << 20)
    assert (rows.texts, rows.offsets) == (["a", "b"], [0, 3 + (20 << 20)])
    assert rows.bad[0].detail.startswith(f"{(20 << 20) + 1} bytes")


@pytest.mark.parametrize(
    ("compression", "compress"), [("gzip", gzip.compress), ("bz2", bz2.compress), ("zstd", None)]
)
def test_compressed_files_are_read_whole_and_hashed_as_they_lie(
    compression: Any,  # noqa: ANN401
    compress: Any,  # noqa: ANN401
) -> None:
    text = "".join(f"第 {number} 行\n" for number in range(50_000)).encode()
    compress = compress or (lambda data: pa.compress(data, "zstd", asbytes=True))
    # Files are often made by putting compressed ones behind one another.
    data = compress(text[:300_000]) + compress(text[300_000:])
    rows = read(data, format="txt", compression=compression)
    assert rows.texts == text.decode().split("\n")[:-1]
    with pytest.raises(SourceError, match="/corpus/file: damaged or truncated"):
        read(data[:-20], format="txt", compression=compression)


def test_jsonl_rows_are_texts_or_told_why_not() -> None:
    rows = {
        '{"text": "one"}': None,
        '{"text": "a", "text": "b"}': "duplicate_key",
        '{"id": 1, "id": 2, "text": "two"}': None,
        '{"other": "x"}': "missing_field",
        '{"text": null}': "null_field",
        '{"text": 3}': "wrong_type",
        '["text"]': "not_an_object",
        '{"text": "cut': "invalid_json",
        '{"text": "\\ud800 half"}': "lone_surrogate",
        '{"text": "\\u0000"}': "nul",
        '{"text": "\\ud83d\\ude00"}': None,
        "[" * 20_000: "invalid_json",
        "": None,
        '{"指令": "three"}': None,
    }
    data = "\r\n".join(rows).encode()
    got = read(data, format="jsonl", text_fields=("text", "指令"))
    assert got.texts == ["one", "two", "\U0001f600", "", "three"]
    assert got.num_alias_rows == 1
    lines = [number for number, reason in enumerate(rows.values(), start=1) if reason]
    assert [row.line for row in got.bad] == lines
    assert [row.reason for row in got.bad] == [reason for reason in rows.values() if reason]
    starts = [len("\r\n".join(list(rows)[:line]).encode()) for line in lines]
    assert [row.offset for row in got.bad] == [
        start - len(list(rows)[line - 1].encode())
        for start, line in zip(starts, lines, strict=True)
    ]
    for row in got.bad:
        json.dumps(row.detail).encode()


@given(texts=st.lists(TEXT, max_size=6), size=st.integers(1, 60), num_bytes=st.integers(1, 9))
def test_jsonl_any_ranges_give_the_rows_of_the_whole_file(
    texts: list[str], size: int, num_bytes: int
) -> None:
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    got, offsets, bad, lines = read_in_ranges(data, size, num_bytes, ReadOptions(format="jsonl"))
    assert (got, bad, lines) == (texts, [], len(texts))
    assert all(data[offset : offset + 8] == b'{"text":' for offset in offsets)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_row_groups_give_the_rows_of_the_whole_file(tmp_path: Path, kind: str) -> None:
    texts = [f"行 {number}" for number in range(25)]
    values: list[str | None] = [*texts]
    values[7] = None
    column: Any = pa.array(values)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column, "id": range(25)}), path, row_group_size=10)
    data = path.read_bytes()
    options = ReadOptions(format="parquet")
    parts = [joined(read_part(data, group, group + 1, options)) for group in range(3)]
    assert [text for part in parts for text in part.texts] == [*texts[:7], *texts[8:]]
    assert [offset for part in parts for offset in part.offsets] == [*range(7), *range(8, 25)]
    assert [(row.line, row.offset, row.reason) for row in parts[0].bad] == [(8, 7, "null_field")]
    assert [part.num_lines for part in parts] == [10, 10, 5]


def test_parquet_bytes_that_are_not_utf8_are_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    binary = pa.array([b"good", b"\xff\xfe", b"more"], pa.binary())
    column = pa.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2])
    pq.write_table(pa.table({"text": column}), path)
    rows = joined(read_part(path.read_bytes(), 0, 1, ReadOptions(format="parquet")))
    assert rows.texts == ["good", "more"]
    assert [(row.offset, row.reason) for row in rows.bad] == [(1, "invalid_bytes")]


def test_parquet_damaged_row_group_is_a_bad_row_for_each_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text {number}" for number in range(30)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    group = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    data[middle : middle + 20] = bytes(20)
    rows = joined(read_part(bytes(data), 0, 3, ReadOptions(format="parquet")))
    assert len(rows.texts) == 20
    assert [row.offset for row in rows.bad] == [*range(10, 20)]
    assert {row.reason for row in rows.bad} == {"damaged"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["x"]}, "no field 'text'; fields are body; set text_field"),
        ({"text": [1]}, "column 'text' is int64, wanted string"),
    ],
)
def test_parquet_without_text_names_what_there_is(
    tmp_path: Path, table: dict[str, list[Any]], message: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(SourceError, match=message):
        joined(read_part(path.read_bytes(), 0, 1, ReadOptions(format="parquet")))


def test_parquet_other_file_names_it() -> None:
    with pytest.raises(SourceError, match="/corpus/file: not a Parquet file"):
        joined(read_part(b"text", 0, 1, ReadOptions(format="parquet")))
