"""Promise: documents are read strictly, nothing is dropped, and their places are right."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.documents import (
    Document,
    DocumentMode,
    Format,
    ReadOptions,
    SourceError,
    read_documents,
)

BOM = b"\xef\xbb\xbf"

# Line ends of Unicode and of str.splitlines, which are text here.
TEXT = st.text(
    st.sampled_from("a é中\U0001f600\r\n\x0b\x0c\x1c\x85\u2028\u2029\ufeff\t"), max_size=40
)


def read(
    path: Path, kind: Format, document: DocumentMode = "line", text_field: str = "text"
) -> list[Document]:
    return list(read_documents(path, ReadOptions(kind, document, text_field)))


def write(folder: Path, data: bytes | str, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@given(text=TEXT, bom=st.sampled_from([b"", BOM]))
def test_txt_lines_any_text_offsets_point_at_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, text: str, bom: bytes
) -> None:
    data = bom + text.encode()
    documents = read(write(tmp_path_factory.mktemp("txt"), data), "txt")
    for document in documents:
        assert data[document.offset :][: document.num_bytes] == document.text.encode()
    body = data.removeprefix(BOM)
    lines = body.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if data and not lines:
        lines = [b""]  # a file that is nothing but a byte order mark has one empty line
    assert [document.text.encode() for document in documents] == [
        line.removesuffix(b"\r") for line in lines
    ]


@given(text=TEXT)
def test_txt_paragraphs_any_text_hold_all_lines_that_are_not_blank(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = write(tmp_path_factory.mktemp("txt"), text)
    lines = [document.text for document in read(path, "txt") if not document.is_blank]
    paragraphs = read(path, "txt", "blank_line")
    assert [line for one in paragraphs for line in one.text.split("\n")] == lines
    data = text.encode()
    for paragraph in paragraphs:
        first = paragraph.text.split("\n")[0].encode()
        assert data[paragraph.offset :].startswith(first)


def test_txt_blank_lines_are_yielded_for_the_caller_to_count(tmp_path: Path) -> None:
    documents = read(write(tmp_path, "a\n\n \u3000\r\nb"), "txt")
    assert [document.is_blank for document in documents] == [False, True, True, False]


def test_txt_paragraph_mode_cuts_at_blank_lines(tmp_path: Path) -> None:
    documents = read(write(tmp_path, "\na\r\nb\n\n \nc"), "txt", "blank_line")
    assert documents == [Document("a\nb", 1, 3), Document("c", 9, 1)]


def test_txt_file_mode_is_one_document(tmp_path: Path) -> None:
    documents = read(write(tmp_path, BOM + b"a\r\n\nb\n"), "txt", "file")
    assert documents == [Document("a\n\nb", 3, 4)]
    assert read(write(tmp_path, ""), "txt", "file")[0].is_blank


@given(rows=st.lists(TEXT, max_size=6), bom=st.sampled_from([b"", BOM]))
def test_jsonl_any_texts_come_back_with_the_offsets_of_their_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], bom: bytes
) -> None:
    lines = [json.dumps({"id": 1, "text": row}, ensure_ascii=False) for row in rows]
    data = bom + "\n".join(lines).encode()
    documents = read(write(tmp_path_factory.mktemp("jsonl"), data), "jsonl")
    if data == BOM:
        assert [document.is_blank for document in documents] == [True]
        return
    assert [document.text for document in documents] == rows
    assert [document.num_bytes for document in documents] == [len(row.encode()) for row in rows]
    for document, line in zip(documents, lines, strict=True):
        assert data[document.offset :].startswith(line.encode())


@given(
    rows=st.lists(TEXT, max_size=6),
    bom=st.sampled_from([b"", BOM]),
    indent=st.sampled_from([None, 2]),
)
def test_json_array_any_texts_come_back_with_the_offsets_of_their_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], bom: bytes, indent: int | None
) -> None:
    text = json.dumps([{"text": row} for row in rows], ensure_ascii=False, indent=indent)
    data = bom + text.encode()
    documents = read(write(tmp_path_factory.mktemp("json"), data), "json")
    assert [document.text for document in documents] == rows
    decoder = json.JSONDecoder()
    for document in documents:
        row, _ = decoder.raw_decode(data[document.offset :].decode())
        assert row == {"text": document.text}


def test_json_single_object_is_one_document(tmp_path: Path) -> None:
    assert read(write(tmp_path, ' {"body": "x"}\n'), "json", text_field="body") == [
        Document("x", 1, 1)
    ]


def test_parquet_many_batches_yield_all_rows_in_order(tmp_path: Path) -> None:
    texts = [f"é{number}" for number in range(3000)]
    pq.write_table(pa.table({"id": range(3000), "text": texts}), tmp_path / "file")
    documents = read(tmp_path / "file", "parquet")
    assert [document.text for document in documents] == texts
    assert [document.offset for document in documents] == list(range(3000))
    assert documents[10] == Document("é10", 10, 4)


def test_txt_bad_byte_names_file_row_and_offset(tmp_path: Path) -> None:
    path = write(tmp_path, b"good\nbad \xff\n")
    with pytest.raises(SourceError, match=r"file: row 2: byte 0xff at offset 9 is not UTF-8"):
        read(path, "txt")


def test_json_bad_byte_names_file_and_offset(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"file: byte 0xe9 at offset 12 is not UTF-8"):
        read(write(tmp_path, b'{"text": "ab\xe9"}'), "json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"row 2 at byte 14: not JSON"),
        ("[" * 100_000, r"row 2 at byte 14: not JSON"),
        ('["text"]', r"row 2 at byte 14: got an array, wanted an object"),
        ('{"text": null}', r"row 2 at byte 14: field 'text' is null"),
        ('{"text": 5}', r"row 2 at byte 14: field 'text' is a number"),
        ('{"txet": "x", "id": 1}', r"no field 'text'; there are: txet, id"),
        (r'{"text": "\ud800"}', r"row 2 at byte 14: .* surrogate"),
    ],
)
def test_jsonl_bad_row_names_row_offset_and_reason(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, '{"text": "a"}\n' + line)
    with pytest.raises(SourceError, match=message):
        read(path, "jsonl")


def test_json_with_lines_of_objects_points_to_jsonl(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="set format to jsonl"):
        read(write(tmp_path, '{"text": "a"}\n{"text": "b"}\n'), "json")


def test_json_array_bad_row_names_its_number(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"row 2 at byte 15: no field 'text'; there are: none"):
        read(write(tmp_path, '[{"text":"a"},\n{}]'), "json")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"txet": ["a"], "id": [1]}), "no field 'text'; there are: txet, id"),
        (pa.table({"text": [1, 2]}), "column 'text' is int64, wanted string"),
        (pa.table({"text": ["a", None]}), "row 2: field 'text' is null"),
    ],
)
def test_parquet_without_text_names_what_there_is(
    tmp_path: Path, table: pa.Table, message: str
) -> None:
    pq.write_table(table, tmp_path / "file")
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "file", "parquet")


def test_parquet_bytes_that_are_not_utf8_name_the_row(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "file")
    with pytest.raises(SourceError, match="row 2: not UTF-8"):
        read(tmp_path / "file", "parquet")


def test_parquet_other_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="file: not a Parquet file"):
        read(write(tmp_path, "text"), "parquet")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="gone: cannot be read: No such file"):
        read(tmp_path / "gone", "txt")
