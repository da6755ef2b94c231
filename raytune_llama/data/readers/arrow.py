"""Open Arrow IPC files, read by record batch, and Arrow IPC streams, read whole.

A `.arrow` file is either: Hugging Face's `datasets` writes streams, Feather (version 2) is a file.
A file ends with a list of its record batches; a stream has none, so only reading it shows how many
it holds.
"""

import struct
from collections.abc import Iterator

import pyarrow as pa

from raytune_llama.data.readers.rows import SourceError
from raytune_llama.storage.place import Place

_FILE_MAGIC = b"ARROW1"
_FEATHER_1_MAGIC = b"FEA1"
_CONTINUATION = b"\xff\xff\xff\xff"

# Slots of fields in the FlatBuffers tables of Arrow's format (File.fbs and Message.fbs).
_FOOTER_BATCHES = 3
_MESSAGE_HEADER = 2
_BATCH_LENGTH = 0
_BLOCK_BYTES = 24


def open_arrow(file: pa.NativeFile, place: Place) -> "ArrowFile | ArrowStream":
    """Open an Arrow IPC file or stream.

    Raises:
        SourceError: The file is neither, or damaged.
    """
    file.seek(0)
    magic = file.read(len(_FILE_MAGIC))
    if magic.startswith(_FEATHER_1_MAGIC):
        raise SourceError(
            f"{place}: Feather version 1, wanted version 2, which is an Arrow IPC file; read it "
            "with pandas and write it again"
        )
    try:
        return ArrowFile(file) if magic == _FILE_MAGIC else ArrowStream(file, place)
    except (pa.ArrowInvalid, OSError, EOFError, struct.error, IndexError) as error:
        raise SourceError(
            f"{place}: not an Arrow IPC file or stream, or damaged ({error})"
        ) from error


class ArrowFile:
    """An open Arrow IPC file; implements `tables.Table`."""

    def __init__(self, file: pa.NativeFile) -> None:
        """Read the footer and the metadata of each record batch."""
        self._file = file
        self._readers: dict[tuple[str, ...], pa.RecordBatchFileReader] = {}
        self.schema: pa.Schema = self._reader([]).schema
        blocks = _read_blocks(file)
        self.group_rows: tuple[int | None, ...] = tuple(
            _read_num_rows(file, offset, num_bytes) for offset, num_bytes, _ in blocks
        )
        self.group_bytes: tuple[int, ...] = tuple(
            num_metadata + num_body for _, num_metadata, num_body in blocks
        )

    def read_group(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Read a record batch, with the given columns only."""
        records = self._reader(columns).get_batch(group)
        _check_buffers(records)
        yield records

    def _reader(self, columns: list[str]) -> pa.RecordBatchFileReader:
        """Return a reader of some columns, or of all columns if none is given."""
        key = tuple(columns)
        if key not in self._readers:
            numbers = [self.schema.names.index(column) for column in columns]
            options = pa.ipc.IpcReadOptions(included_fields=numbers)
            self._readers[key] = pa.ipc.open_file(self._file, options=options)
        return self._readers[key]


class ArrowStream:
    """An open Arrow IPC stream, one group of rows; implements `tables.Table`."""

    def __init__(self, file: pa.NativeFile, place: Place) -> None:
        """Read the schema of a stream."""
        self._file = file
        self._place = place
        self.schema: pa.Schema = self._reader([]).schema
        self.group_rows: tuple[int | None, ...] = (None,)
        self.group_bytes: tuple[int, ...] = (file.size(),)

    def read_group(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Stream the record batches, with the given columns only.

        Raises:
            SourceError: The stream is damaged or truncated: the number of lost rows is unknown.
        """
        assert group == 0
        num_rows = 0
        try:
            for records in self._reader(columns):
                _check_buffers(records)
                yield records
                num_rows += records.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(
                f"{self._place}: damaged or truncated after row {num_rows} ({error}); download or "
                "write the file again"
            ) from error

    def _reader(self, columns: list[str]) -> pa.RecordBatchStreamReader:
        self._file.seek(0)
        numbers = [self.schema.names.index(column) for column in columns]
        options = pa.ipc.IpcReadOptions(included_fields=numbers)
        return pa.ipc.open_stream(self._file, options=options)


def _check_buffers(records: pa.RecordBatch) -> None:
    """Check the offsets of a record batch, which a damaged file can set beyond its buffers.

    Strings are checked as bytes: one that is not UTF-8 is a bad row, not a damaged batch.

    Raises:
        pa.ArrowInvalid: An offset is out of bounds.
    """
    for column in records.columns:
        kind = _bytes_type(column.type)
        (column if kind == column.type else column.view(kind)).validate(full=True)


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    """Return a type of the same layout, with bytes in place of strings."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return pa.struct([field.with_type(_bytes_type(field.type)) for field in fields])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_bytes_type(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_bytes_type(kind.value_type)))
    return kind


def _read_blocks(file: pa.NativeFile) -> list[tuple[int, int, int]]:
    """Return the place of each record batch: its offset, and bytes of its metadata and body."""
    tail_bytes = 4 + len(_FILE_MAGIC)
    size = file.size()
    file.seek(size - tail_bytes)
    (num_bytes,) = struct.unpack_from("<i", file.read(tail_bytes))
    file.seek(size - tail_bytes - num_bytes)
    data = file.read(num_bytes)
    field = _find_field(data, _root(data), _FOOTER_BATCHES)
    if field is None:
        return []
    vector = field + _unsigned(data, field)
    first = vector + 4
    # Each block is offset: int64, metaDataLength: int32, padding, bodyLength: int64.
    return [
        struct.unpack_from("<qi4xq", data, first + number * _BLOCK_BYTES)
        for number in range(_unsigned(data, vector))
    ]


def _read_num_rows(file: pa.NativeFile, offset: int, num_bytes: int) -> int:
    """Return the number of rows of a record batch from its metadata."""
    file.seek(offset)
    data = file.read(num_bytes)
    # Files from before Arrow 0.15 have only the length before the metadata.
    data = data[8:] if data.startswith(_CONTINUATION) else data[4:]
    header = _find_field(data, _root(data), _MESSAGE_HEADER)
    if header is None:
        raise EOFError(f"the message at byte {offset} has no header")
    length = _find_field(data, header + _unsigned(data, header), _BATCH_LENGTH)
    return 0 if length is None else struct.unpack_from("<q", data, length)[0]


def _root(data: bytes) -> int:
    return _unsigned(data, 0)


def _unsigned(data: bytes, position: int) -> int:
    return struct.unpack_from("<I", data, position)[0]


def _find_field(data: bytes, table: int, slot: int) -> int | None:
    """Return the position of a field of a FlatBuffers table; None if it has its default."""
    (distance,) = struct.unpack_from("<i", data, table)
    layout = table - distance
    (layout_bytes,) = struct.unpack_from("<H", data, layout)
    entry = 4 + 2 * slot
    if entry >= layout_bytes:
        return None
    (offset,) = struct.unpack_from("<H", data, layout + entry)
    return table + offset if offset else None
