"""Open Parquet files, read by row group."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_llama.data.readers.rows import SourceError
from raytune_llama.storage.place import Place

_BATCH_ROWS = 1024


class ParquetTable:
    """An open Parquet file; implements `tables.Table`."""

    def __init__(self, file: pa.NativeFile, place: Place) -> None:
        """Read the footer of a file.

        Raises:
            SourceError: The file is not Parquet.
        """
        try:
            self._parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise SourceError(f"{place}: not a Parquet file ({error})") from error
        self.schema: pa.Schema = self._parquet.schema_arrow
        metadata = self._parquet.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        self.group_rows: tuple[int | None, ...] = tuple(group.num_rows for group in groups)
        self.group_bytes: tuple[int, ...] = tuple(
            sum(group.column(column).total_compressed_size for column in range(group.num_columns))
            for group in groups
        )

    def read_group(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Stream the rows of a row group, with the given columns."""
        # "a.b" also selects the part b of a column a, so other columns may come with it.
        for records in self._parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            yield records.select(columns)
