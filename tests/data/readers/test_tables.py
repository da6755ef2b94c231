"""Promise: Parquet and Arrow files give the rows that JSON Lines would, numbered over the file."""

import datetime as dt
import decimal
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.build.chat_corpus import open_chat_corpus
from raytune_llama.data.build.file_hashes import SourceHashes, hash_files
from raytune_llama.data.build.text_corpus import TextUnitReader
from raytune_llama.data.build.unit_encoder import encode_unit, quarantine_place
from raytune_llama.data.build.units import plan_units
from raytune_llama.data.config import ChatDataConfig
from raytune_llama.data.readers.arrow import ArrowFile, open_arrow
from raytune_llama.data.readers.config import ConversationSource, SourceConfig
from raytune_llama.data.readers.conversations import ConversationCounts, read_conversations
from raytune_llama.data.readers.ranges import HASH_BLOCK_BYTES
from raytune_llama.data.readers.rows import BadRow, ReadOptions, RowBatch, SourceError
from raytune_llama.data.readers.sources import discover_files
from raytune_llama.data.store.manifest import SplitManifest
from raytune_llama.data.store.token_store import TokenSplit
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import load_reference_encoder, load_tokenizer
from tests.data.readers.test_dirty import encode, encode_whole
from tests.data.readers.test_documents import read_part

GROUP_ROWS = 10


def write_ipc(table: pa.Table, path: Path, *, stream: bool = False, **options: Any) -> None:  # noqa: ANN401
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=GROUP_ROWS)


LAYOUTS: dict[str, tuple[str, Callable[[pa.Table, Path], None]]] = {
    "parquet": (
        "a.parquet",
        lambda table, path: pq.write_table(table, path, row_group_size=GROUP_ROWS),
    ),
    "file": ("a.arrow", write_ipc),
    "compressed file": ("a.arrow", lambda table, path: write_ipc(table, path, compression="zstd")),
    "feather": (
        "a.feather",
        lambda table, path: feather.write_feather(table, str(path), chunksize=GROUP_ROWS),
    ),
    "file before 0.15": (
        "a.arrow",
        lambda table, path: write_ipc(
            table,
            path,
            use_legacy_format=True,
            metadata_version=pa.ipc.MetadataVersion.V4,
        ),
    ),
    "stream": ("a.arrow", lambda table, path: write_ipc(table, path, stream=True)),
}
ARROW_FILES = [name for name in LAYOUTS if name not in ("parquet", "stream")]


def write(table: pa.Table, folder: Path, layout: str) -> Path:
    name, write_table = LAYOUTS[layout]
    write_table(table, folder / name)
    return folder / name


def options_of(path: Path, *text_fields: str) -> ReadOptions:
    return ReadOptions(
        format="parquet" if path.suffix == ".parquet" else "arrow", text_fields=text_fields
    )


def joined(batches: Iterator[RowBatch]) -> RowBatch:
    whole = RowBatch()
    for batch in batches:
        for name in ("texts", "offsets", "num_bytes", "objects", "bad"):
            getattr(whole, name).extend(getattr(batch, name))
        whole.num_rows += batch.num_rows
        whole.num_lines += batch.num_lines
    assert whole.num_rows == len(whole.texts) + len(whole.objects) + len(whole.bad)
    return whole


def read(path: Path, *text_fields: str, groups: range = range(1000)) -> RowBatch:
    options = options_of(path, *text_fields)
    return joined(read_part(path.read_bytes(), groups.start, groups.stop, options))


def row_of(bad: BadRow) -> tuple[int, int, str]:
    return bad.line, bad.offset, bad.reason


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_of_any_layout_come_with_their_rows(layout: str, kind: str, tmp_path: Path) -> None:
    texts = [f"行 {number}" for number in range(25)]
    values: list[str | None] = [*texts]
    values[17] = None
    column: Any = pa.array(values)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pa.table({"id": range(25), "text": column})
    path = write(table, tmp_path, layout)
    rows = read(path, "body", "text")
    assert rows.texts == [*texts[:17], *texts[18:]]
    assert rows.offsets == [*range(17), *range(18, 25)]
    assert [row_of(row) for row in rows.bad] == [(18, 17, "null_field")]
    assert rows.num_lines == 25


@pytest.mark.parametrize("layout", ["parquet", *ARROW_FILES])
def test_ranges_of_groups_give_the_rows_of_the_whole_file(layout: str, tmp_path: Path) -> None:
    values: list[str | None] = [f"行 {number}" for number in range(25)]
    values[17] = None
    path = write(pa.table({"text": values, "id": range(25)}), tmp_path, layout)
    (file,) = discover_files((SourceConfig(path=str(path)),))
    assert file.end == 3
    assert sum(file.row_group_bytes) < file.status.num_bytes
    parts = [read(path, "text", groups=range(group, group + 1)) for group in range(3)]
    assert [part.num_lines for part in parts] == [10, 10, 5]
    whole = read(path, "text")
    assert [text for part in parts for text in part.texts] == whole.texts
    assert [offset for part in parts for offset in part.offsets] == whole.offsets
    assert [row_of(row) for part in parts for row in part.bad] == [(8, 17, "null_field")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_column_named_like_a_part_of_another_is_read(layout: str, tmp_path: Path) -> None:
    path = write(pa.table({"a": [{"b": "no"}], "a.b": ["yes"]}), tmp_path, layout)
    assert read(path, "a.b").texts == ["yes"]
    assert [row.value for row in read(path).objects] == [{"a": {"b": "no"}, "a.b": "yes"}]


def test_lines_of_a_long_group_are_counted_over_the_range(tmp_path: Path) -> None:
    values: list[str | None] = ["x"] * 5000
    values[4999] = None
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    assert [row_of(row) for row in read(tmp_path / "a.parquet", "text").bad] == [
        (5000, 4999, "null_field")
    ]


@given(
    sizes=st.lists(st.integers(0, 5), max_size=6),
    as_dictionary=st.booleans(),
    legacy=st.booleans(),
    data=st.data(),
)
def test_arrow_file_any_batches_are_found_with_their_rows(
    *,
    sizes: list[int],
    as_dictionary: bool,
    legacy: bool,
    data: st.DataObject,
) -> None:
    kind = pa.dictionary(pa.int8(), pa.string()) if as_dictionary else pa.string()
    schema = pa.schema({"id": pa.int64(), "text": kind}, metadata={"note": "x" * 50})
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(use_legacy_format=legacy)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for size in sizes:
            ids = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
            # One dictionary for all batches, since a file cannot replace it.
            texts = pa.array([*map(str, range(10)), *map(str, ids)], kind)[10:]
            writer.write_batch(pa.record_batch([pa.array(ids, pa.int64()), texts], schema=schema))
    place = Place("", "/corpus/file")
    table = open_arrow(pa.BufferReader(sink.getvalue()), place)
    assert isinstance(table, ArrowFile)
    assert table.group_rows == tuple(sizes)
    assert sum(table.group_bytes) < len(sink.getvalue())
    assert len(table.group_bytes) == len(sizes)


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "人民日报?"},
            {"role": "assistant", "content": "新年", "weight": 1},
        ],
        "meta": {"source": "a", "page": 3},
    },
    {
        "system": "short",
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2", "parts": ["x", None]},
        ],
    },
] * 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_objects_are_those_of_json_without_the_nulls_of_a_table(
    layout: str, tmp_path: Path
) -> None:
    path = write(pa.Table.from_pylist(ROWS[::-1]).select([0, 1]), tmp_path, layout)
    assert [row.value for row in read(path).objects] == [
        {name: row[name] for name in ("system", "messages") if name in row} for row in ROWS[::-1]
    ]


def test_objects_of_all_columns_are_numbered_over_the_file(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS, pa.Table.from_pylist([ROWS[1] | ROWS[0]]).schema)
    path = write(table, tmp_path, "parquet")
    rows = read(path, groups=range(1, 3))
    assert [row.offset for row in rows.objects] == [*range(10, 30)]
    assert [row.line for row in rows.objects] == [*range(1, 21)]
    assert rows.objects[0].value["meta"] == ROWS[10]["meta"]


def test_objects_have_json_values_only(tmp_path: Path) -> None:
    moment = dt.datetime(1998, 1, 1, tzinfo=dt.UTC)
    table = pa.table(
        {
            "at": pa.array([moment]),
            "price": pa.array([decimal.Decimal("1.50")]),
            "image": pa.array([b"\xff\xfe\xfd"]),
            "name": pa.array(["新年".encode()]),
            "scores": pa.array([[("a", 1.5)]], pa.map_(pa.string(), pa.float64())),
            "good": pa.array([True]),
        }
    )
    (row,) = read(write(table, tmp_path, "file")).objects
    assert json.loads(json.dumps(row.value)) == {
        "at": str(moment),
        "price": "1.50",
        "image": {"num_bytes": 3},
        "name": "新年",
        "scores": {"a": 1.5},
        "good": True,
    }


def texts_of_bytes(*values: bytes) -> pa.Array:
    binary = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(values), binary.buffers()[1], binary.buffers()[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_that_are_not_utf8_spoil_their_row_only(layout: str, tmp_path: Path) -> None:
    texts = texts_of_bytes(b"good", b"\xff\xfe", b"more")
    turns = pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([texts], ["value"]))
    path = write(pa.table({"text": texts}), tmp_path, layout)
    rows = read(path, "text")
    assert rows.texts == ["good", "more"]
    assert [row_of(row) for row in rows.bad] == [(2, 1, "invalid_bytes")]
    path = write(pa.table({"conversations": turns}), tmp_path, layout)
    rows = read(path)
    assert [row.value["conversations"][0]["value"] for row in rows.objects] == ["good", "more"]
    assert [row_of(row) for row in rows.bad] == [(2, 1, "invalid_bytes")]


def test_objects_larger_than_the_limit_are_bad_rows(tmp_path: Path) -> None:
    path = write(pa.table({"text": ["a", "x" * 500, "b"]}), tmp_path, "file")
    limited = replace(options_of(path), max_document_bytes=400)
    rows = joined(read_part(path.read_bytes(), 0, 1, limited))
    assert [row.value for row in rows.objects] == [{"text": "a"}, {"text": "b"}]
    assert [row_of(row) for row in rows.bad] == [(2, 1, "too_long")]


def damaged_offsets(path: Path) -> bytes:
    """A file whose second record batch has an offset far beyond its texts."""
    data = path.read_bytes()
    offsets = b"".join((6 * number).to_bytes(4, "little") for number in range(11))
    second = data.index(offsets, data.index(offsets) + 1)
    return data[: second + 8] + (1 << 30).to_bytes(4, "little") + data[second + 12 :]


@pytest.mark.parametrize("text_fields", [("text",), ()])
def test_arrow_damaged_batch_is_a_bad_row_for_each_of_its_rows(
    text_fields: tuple[str, ...], tmp_path: Path
) -> None:
    table = pa.table({"text": [f"text {number}" for number in range(10, 40)]})
    table = table.set_column(0, "text", pa.array([f"text{n}" for n in range(10, 40)]))
    path = write(table, tmp_path, "file")
    path.write_bytes(damaged_offsets(path))
    rows = read(path, *text_fields)
    assert len(rows.texts) + len(rows.objects) == 20
    assert [row_of(row) for row in rows.bad] == [
        (number + 1, number, "damaged") for number in range(10, 20)
    ]


def test_arrow_damaged_compressed_batch_is_a_bad_row_for_each_of_its_rows(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {number} " * 20 for number in range(30)]})
    path = write(table, tmp_path, "compressed file")
    (file,) = discover_files((SourceConfig(path=str(path)),))
    data = bytearray(path.read_bytes())
    end = data.index(b"\x28\xb5\x2f\xfd", data.index(b"\x28\xb5\x2f\xfd") + 100)
    assert file.end == 3
    data[end + 4 : end + 24] = bytes(20)
    path.write_bytes(data)
    rows = read(path, "text")
    assert {row.reason for row in rows.bad} == {"damaged"}
    assert len(rows.bad) % 10 == 0
    assert len(rows.texts) == 30 - len(rows.bad) > 0


def test_arrow_truncated_stream_is_refused_with_the_rows_before_it(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {number}" for number in range(30)]})
    path = write(table, tmp_path, "stream")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"/corpus/file: damaged or truncated after row 20"):
        read(path, "text")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"text", "not an Arrow IPC file or stream"),
        (b"", "not an Arrow IPC file or stream"),
        (b"ARROW1\0\0" + bytes(100), "not an Arrow IPC file or stream, or damaged"),
        (b"FEA1" + bytes(100), "Feather version 1"),
    ],
)
def test_arrow_other_file_is_named_for_what_it_is(
    data: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "a.arrow").write_bytes(data)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ConfigError, match=rf"sources\.0: .*a\.arrow: {problem}"):
        discover_files((SourceConfig(path=str(tmp_path)),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_table_without_rows_has_none(layout: str, tmp_path: Path) -> None:
    path = write(pa.table({"text": pa.array([], pa.string())}), tmp_path, layout)
    assert read(path, "text").num_rows == read(path).num_rows == 0


@pytest.mark.parametrize(
    ("layout", "fields", "problem"),
    [
        ("file", {}, "no field 'text'; fields are body, id"),
        ("stream", {"text_field": "id"}, "column 'id' is int64, wanted string"),
        ("feather", {"text_field": "body", "encoding": "utf-8"}, "encoding: got utf-8 for arrow"),
    ],
)
def test_arrow_that_does_not_fit_its_config_is_refused(
    layout: str, fields: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write(pa.table({"body": ["a"], "id": [1]}), tmp_path, layout)
    with pytest.raises(ConfigError, match=problem):
        discover_files((SourceConfig(path=str(path), **fields),))


def test_objects_with_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(pa.table([["a"], ["b"]], names=["output", "output"]), tmp_path, "file")
    with pytest.raises(SourceError, match="several columns are named output"):
        read(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversations_of_a_table_are_those_of_json(layout: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "conversations": [
                {"from": "human", "value": f"{number}?"},
                {"from": "gpt", "value": "新年"},
            ]
        }
        for number in range(25)
    ]
    rows[3]["system"] = "short"
    rows[7]["conversations"].pop()
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = write(
        pa.Table.from_pylist(rows, pa.Table.from_pylist(rows[3:]).schema), tmp_path, layout
    )
    wanted, got = (
        [
            (row.number, row.line, row.conversation)
            for row in read_conversations(
                (ConversationSource(path=str(one)),), ConversationCounts()
            )
        ]
        for one in (tmp_path / "a.jsonl", path)
    )
    assert got == wanted
    assert len(got) == 25


@pytest.mark.parametrize("layout", ["parquet", "file", "stream"])
def test_units_of_a_large_table_hash_the_file_once_and_give_its_rows(
    layout: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    texts = [f"{number} " + "the quick brown fox " * 900 for number in range(40)]
    # The file is large by a column that nobody encodes.
    table = pa.table({"text": texts, "id": [text * 19 for text in texts]})
    path = write(table, tmp_path / "corpus", layout)
    if layout == "parquet":
        pq.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    plan, whole = encode(tmp_path, tokenizer_dir)
    units = plan_units(plan.files, HASH_BLOCK_BYTES)
    assert len(units) == (1 if layout == "stream" else 4)
    reader = TextUnitReader(load_reference_encoder(tokenizer_dir))
    records = [encode_unit(unit, plan, reader) for unit in units]
    assert SourceHashes.from_records(plan.files, units, records) == hash_files(
        plan.files, SourceHashes({})
    )
    assert sum(record.rows.documents for record in records) == 40
    assert [one for record in records for one in record.pieces[0].digests] == [
        *whole.pieces[0].digests
    ]
    tokens = [shard.tokens for record in records if (shard := record.shards["train"])]
    assert whole.shards["train"] is not None
    assert sum(tokens) == whole.shards["train"].tokens


def test_units_of_conversations_in_tables_are_encoded_as_those_in_json(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    rows = [
        {"instruction": f"{number}?", "input": None, "output": "新年的钟声敲响了。"}
        for number in range(25)
    ]
    rows[13]["output"] = None
    tokens: dict[str, list[int]] = {}
    for name in ("json", "parquet", "file", "stream"):
        folder = tmp_path / name
        (folder / "corpus").mkdir(parents=True)
        if name == "json":
            lines = [json.dumps({k: v for k, v in row.items() if v}) for row in rows]
            (folder / "corpus" / "a.jsonl").write_text("\n".join(lines))
        else:
            write(pa.Table.from_pylist(rows), folder / "corpus", name)
        config = from_dict(
            ChatDataConfig,
            {
                "store_dir": str(folder / "store"),
                "sources": [{"path": str(folder / "corpus")}],
                "chat": {"template": "alpaca"},
            },
        )
        corpus = open_chat_corpus(config, load_tokenizer(tokenizer_dir))
        reader = corpus.build_reader(load_reference_encoder(tokenizer_dir))
        plan, record = encode_whole(folder, corpus.files, reader)
        shard = record.shards["train"]
        assert shard is not None
        assert record.rows.quarantined == {"missing_field": 1}
        (unit,) = plan_units(plan.files, 1 << 30)
        (bad,) = quarantine_place(unit, plan).read_bytes().splitlines()
        assert json.loads(bad)["line"] == 14
        split = TokenSplit(plan.store_dir, SplitManifest.from_shards([shard]))
        tokens[name] = split.tokens(0, split.num_tokens).tolist()
        assert split.num_documents == 24
    assert tokens["json"] == tokens["parquet"] == tokens["file"] == tokens["stream"]
