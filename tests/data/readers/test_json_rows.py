"""Promise: a JSON array of any size is streamed, and a broken row costs no other row."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.readers.json_rows import read_json_stream
from raytune_llama.data.readers.rows import ReadOptions, RowBatch, SourceError

TEXT = st.text(st.sampled_from('a é中\U0001f600\n"\\{}[],:\t'), max_size=20)
OBJECTS = st.lists(
    st.fixed_dictionaries({"text": TEXT}, optional={"id": st.integers(), "more": st.lists(TEXT)}),
    max_size=5,
)


class Trickle:
    def __init__(self, data: bytes, num_bytes: int) -> None:
        self._data = data
        self._num_bytes = num_bytes

    def read(self, num_bytes: int, /) -> bytes:
        size = min(num_bytes, self._num_bytes)
        data, self._data = self._data[:size], self._data[size:]
        return data


def read(data: bytes | str, num_bytes: int = 1 << 20, **options: Any) -> RowBatch:  # noqa: ANN401
    data = data.encode() if isinstance(data, str) else data
    whole = RowBatch()
    fields = ReadOptions(format="json", **options)
    for batch in read_json_stream(Trickle(data, num_bytes), fields, "a.json", 0):
        whole.texts += batch.texts
        whole.offsets += batch.offsets
        whole.bad += batch.bad
        whole.num_rows += batch.num_rows
    assert whole.num_rows == len(whole.texts) + len(whole.bad)
    return whole


@given(
    rows=OBJECTS,
    indent=st.sampled_from([None, 1]),
    as_array=st.booleans(),
    ascii_only=st.booleans(),
    num_bytes=st.integers(1, 20),
)
def test_stream_any_objects_come_back_with_their_offsets(
    rows: list[dict[str, Any]],
    indent: int | None,
    num_bytes: int,
    *,
    as_array: bool,
    ascii_only: bool,
) -> None:
    parts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    text = " [\n" + " ,\n".join(parts) + "]\n" if as_array else "\n".join(parts)
    data = text.encode()
    got = read(data, num_bytes)
    assert got.texts == [row["text"] for row in rows]
    assert not got.bad
    ends = [*got.offsets[1:], len(data)][: len(rows)]
    for row, start, end in zip(rows, got.offsets, ends, strict=True):
        assert json.JSONDecoder().raw_decode(data[start:end].decode())[0] == row


BAD_ROWS = {
    '{"text": "open': "invalid_json",
    '{"text": }': "invalid_json",
    '{"text" "x"}': "invalid_json",
    '{"other": "x"}': "missing_field",
    '{"text": null}': "null_field",
    '{"text": ["x"]}': "wrong_type",
    '{"text": "\\udc00"}': "lone_surrogate",
    '{"text": "a", "text": "b"}': "duplicate_key",
    '"text"': "not_an_object",
    "12": "not_an_object",
    '{"text": nul}': "invalid_json",
}


@pytest.mark.parametrize("num_bytes", [3, 1 << 20])
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_stream_bad_row_in_the_middle_costs_only_itself(bad: str, num_bytes: int) -> None:
    data = f'[\n  {{"text": "one"}},\n  {bad},\n  {{"text": "two"}},\n  {{"text": "three"}}\n]'
    rows = read(data, num_bytes)
    assert rows.texts == ["one", "two", "three"]
    assert [(row.line, row.reason) for row in rows.bad] == [(3, BAD_ROWS[bad])]
    assert rows.bad[0].offset == data.index(f"{bad},\n")


@pytest.mark.parametrize("num_bytes", [3, 1 << 20])
def test_stream_bytes_that_are_no_text_spoil_their_row_only(num_bytes: int) -> None:
    rows = read(b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]', num_bytes)
    assert rows.texts == ["a", "b"]
    assert [(row.offset, row.reason) for row in rows.bad] == [(16, "invalid_bytes")]


@pytest.mark.parametrize("num_bytes", [3, 1 << 20])
@pytest.mark.parametrize(
    ("end", "texts"),
    [
        ('{"text": "thr', ["one", "two"]),
        ('{"text": "three"}', ["one", "two", "three"]),
        ('{"text": "three"},', ["one", "two", "three"]),
        ('{"tex', ["one", "two"]),
    ],
)
def test_stream_that_ends_early_is_told_once(end: str, texts: list[str], num_bytes: int) -> None:
    rows = read(f'[{{"text": "one"}},\n{{"text": "two"}},\n{end}', num_bytes)
    assert rows.texts == texts
    assert [row.reason for row in rows.bad] == ["truncated"]


def test_stream_text_behind_the_array_is_told() -> None:
    rows = read('[{"text": "one"}] {"text": "two"}')
    assert rows.texts == ["one"]
    assert [(row.reason, row.offset) for row in rows.bad] == [("invalid_json", 18)]


def test_stream_row_too_long_is_skipped_in_bounded_memory() -> None:
    long = "x" * 5000
    rows = read(f'[{{"text": "{long}"}},\n{{"text": "two"}}]', 100, max_document_bytes=1000)
    assert rows.texts == ["two"]
    assert [row.reason for row in rows.bad] == ["too_long"]


@pytest.mark.parametrize("data", ["", " \n", "[]", "[ \n]"])
def test_stream_without_rows_is_empty(data: str) -> None:
    assert read(data).num_rows == 0


@pytest.mark.parametrize("data", ["text", "3", '"text"'])
def test_stream_that_is_neither_array_nor_object_is_refused(data: str) -> None:
    with pytest.raises(SourceError, match=r"a\.json: it begins with .*wanted a JSON array"):
        read(data)
