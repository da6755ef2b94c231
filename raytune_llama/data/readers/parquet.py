"""Read rows of text from a Parquet file, by row group."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_llama.data.readers.json_rows import add_row
from raytune_llama.data.readers.rows import BadRow, ReadOptions, RowBatch, SourceError, excerpt
from raytune_llama.storage.place import Place

_BATCH_ROWS = 1024


def open_parquet(file: pa.NativeFile, place: Place, text_fields: tuple[str, ...]) -> pq.ParquetFile:
    """Open a Parquet file and check that it has a text column.

    Raises:
        SourceError: The file is not Parquet, or has no such column of strings.
    """
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{place}: not a Parquet file ({error})") from error
    schema = parquet.schema_arrow
    column = next((name for name in text_fields if name in schema.names), None)
    if column is None:
        wanted = " or ".join(map(repr, text_fields))
        raise SourceError(
            f"{place}: no field {wanted}; fields are {', '.join(schema.names[:20]) or 'none'}; set "
            "text_field to one of them"
        )
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    ):
        raise SourceError(f"{place}: column {column!r} is {kind}, wanted string")
    return parquet


def read_parquet_rows(
    parquet: pq.ParquetFile, options: ReadOptions, row_groups: range
) -> Iterator[RowBatch]:
    """Stream the rows of some row groups; the rows of an unreadable group are all bad rows."""
    names = parquet.schema_arrow.names
    column = next(name for name in options.text_fields if name in names)
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(row_groups.start))
    for group in row_groups:
        num_rows = parquet.metadata.row_group(group).num_rows
        done = 0
        try:
            for records in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
                yield _rows_of(records.column(0), column, row + done, options)
                done += records.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            yield _lost(row + done, num_rows - done, f"row group {group}: {excerpt(str(error))}")
        row += num_rows


def _rows_of(column: pa.Array, name: str, first_row: int, options: ReadOptions) -> RowBatch:
    batch = RowBatch(num_rows=len(column), num_lines=len(column))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # Read as bytes, since Parquet does not check that a string is UTF-8.
    for number, data in enumerate(column.cast(pa.large_binary()).to_pylist()):
        row = first_row + number
        try:
            value = None if data is None else data.decode()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            detail = f"byte 0x{byte:02x} is not valid utf-8: {excerpt(error.object)}"
            batch.bad.append(BadRow(number + 1, row, "invalid_bytes", detail))
            continue
        add_row(batch, {name: value}, number + 1, row, options)
    return batch


def _lost(first_row: int, num_rows: int, detail: str) -> RowBatch:
    bad = [BadRow(number + 1, first_row + number, "damaged", detail) for number in range(num_rows)]
    return RowBatch(bad=bad, num_rows=num_rows, num_lines=num_rows)
