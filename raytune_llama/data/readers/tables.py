"""Read rows from Parquet and Arrow IPC files: one column as texts, or all columns as JSON objects.

    table = open_table(file, place, options)
    for batch in read_table_rows(table, options, range(len(table.group_rows))): ...

A table is read by groups of rows: Parquet's row groups, Arrow's record batches, or a whole stream.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa

from raytune_llama.data.readers.arrow import open_arrow
from raytune_llama.data.readers.json_rows import add_row
from raytune_llama.data.readers.parquet import ParquetTable
from raytune_llama.data.readers.rows import (
    BadRow,
    FileFormat,
    ObjectRow,
    ReadOptions,
    RowBatch,
    SourceError,
    excerpt,
)
from raytune_llama.storage.place import Place

_BATCH_ROWS = 1024


class Table(Protocol):
    """An open file of rows in columns."""

    schema: pa.Schema
    """Names and types of the columns."""
    group_rows: tuple[int | None, ...]
    """Number of rows of each group; None: unknown before it is read, which is so only in a file of
    one group."""
    group_bytes: tuple[int, ...]
    """Size of each group in the file, in bytes."""

    def read_group(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Stream the rows of a group, with the given columns only.

        Raises:
            pa.ArrowInvalid: The group is damaged.
            OSError: The group is damaged, or cannot be read.
        """
        ...


def open_table(
    file: pa.NativeFile, place: Place, file_format: FileFormat, text_fields: tuple[str, ...]
) -> Table:
    """Open a Parquet or Arrow IPC file and check that it has the text column, if there is one.

    Args:
        file: The open file, seekable.
        place: Location of the file, for error messages.
        file_format: `parquet` or `arrow`.
        text_fields: Names of the text column; empty: rows are read as objects.

    Raises:
        SourceError: The file has another format or no such column of strings, or two columns have
            the same name.
    """
    table: Table = (
        ParquetTable(file, place) if file_format == "parquet" else open_arrow(file, place)
    )
    names = table.schema.names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if text_fields:
        _check_text_column(table.schema, place, text_fields)
        repeated = [name for name in repeated if name in text_fields]
    if repeated:
        raise SourceError(f"{place}: several columns are named {', '.join(repeated)}; rename them")
    return table


def _check_text_column(schema: pa.Schema, place: Place, text_fields: tuple[str, ...]) -> None:
    column = next((name for name in text_fields if name in schema.names), None)
    if column is None:
        wanted = " or ".join(map(repr, text_fields))
        raise SourceError(
            f"{place}: no field {wanted}; fields are {', '.join(schema.names[:20]) or 'none'}; set "
            "text_field to one of them"
        )
    kind = schema.types[schema.names.index(column)]
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    ):
        raise SourceError(f"{place}: column {column!r} is {kind}, wanted string")


def read_table_rows(table: Table, options: ReadOptions, groups: range) -> Iterator[RowBatch]:
    """Stream the rows of some groups; the rows of an unreadable group are all bad rows."""
    names = table.schema.names
    columns = names
    if options.text_fields:
        columns = [next(name for name in options.text_fields if name in names)]
    row = first = sum(table.group_rows[group] or 0 for group in range(groups.start))
    for group in range(groups.start, min(groups.stop, len(table.group_rows))):
        num_rows = table.group_rows[group]
        done = 0
        try:
            for records in table.read_group(group, columns):
                for start in range(0, records.num_rows, _BATCH_ROWS):
                    part = records.slice(start, _BATCH_ROWS)
                    yield _rows_of(part, row + done, row + done - first + 1, options)
                    done += part.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            if num_rows is None:
                raise
            detail = f"group {group} of rows: {excerpt(str(error))}"
            yield _lost(row + done, row + done - first + 1, num_rows - done, detail)
        row += done if num_rows is None else num_rows


def _rows_of(records: pa.RecordBatch, row: int, line: int, options: ReadOptions) -> RowBatch:
    """Return some rows, the first of which is number `row` of the file and `line` of the range."""
    batch = RowBatch(num_rows=records.num_rows, num_lines=records.num_rows)
    if options.text_fields:
        _add_texts(batch, records, row, line, options)
    else:
        _add_objects(batch, records, row, line, options)
    return batch


def _add_texts(
    batch: RowBatch, records: pa.RecordBatch, row: int, line: int, options: ReadOptions
) -> None:
    column, name = records.column(0), records.schema.names[0]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # Read as bytes, since neither format checks that a string is UTF-8.
    for number, data in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            value = None if data is None else data.decode()
        except UnicodeDecodeError as error:
            bad = BadRow(line + number, row + number, "invalid_bytes", _undecodable(error))
            batch.bad.append(bad)
            continue
        add_row(batch, {name: value}, line + number, row + number, options)


def _add_objects(
    batch: RowBatch, records: pa.RecordBatch, row: int, line: int, options: ReadOptions
) -> None:
    limit = options.max_document_bytes
    are_small = records.nbytes <= limit
    if are_small:
        with contextlib.suppress(ValueError, KeyError, OverflowError):
            values = records.to_pylist(maps_as_pydicts="strict")
            batch.objects += [
                ObjectRow(line + number, row + number, to_json(value))
                for number, value in enumerate(values)
            ]
            return
    for number in range(records.num_rows):
        one = records.slice(number, 1)
        bad: BadRow | None = None
        if not are_small and one.nbytes > limit:
            detail = f"{one.nbytes} bytes, max_document_bytes is {limit}"
            bad = BadRow(line + number, row + number, "too_long", detail)
        else:
            try:
                (value,) = one.to_pylist(maps_as_pydicts="strict")
            except UnicodeDecodeError as error:
                bad = BadRow(line + number, row + number, "invalid_bytes", _undecodable(error))
            except (ValueError, KeyError, OverflowError) as error:  # names that repeat, odd dates
                bad = BadRow(line + number, row + number, "wrong_type", excerpt(str(error)))
            else:
                batch.objects.append(ObjectRow(line + number, row + number, to_json(value)))
        if bad is not None:
            batch.bad.append(bad)


def to_json(value: Any) -> Any:  # noqa: ANN401  # any value of a table, any JSON value
    """Convert a value of a table to a JSON value.

    Objects lose their null fields: in a table every object has the fields of all others, with null
    for those that it does not have. Bytes are decoded if they are UTF-8, else they become an object
    that says how many they are, so that no text is made from them. Dates and the like become text.
    """
    if isinstance(value, dict):
        return {name: to_json(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [to_json(one) for one in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"num_bytes": len(value)}
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)


def _undecodable(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not valid utf-8: {excerpt(error.object)}"


def _lost(row: int, line: int, num_rows: int, detail: str) -> RowBatch:
    bad = [BadRow(line + number, row + number, "damaged", detail) for number in range(num_rows)]
    return RowBatch(bad=bad, num_rows=num_rows, num_lines=num_rows)
