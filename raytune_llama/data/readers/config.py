"""Settings of sources: which files to read, and how."""

from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.chat.config import FieldName, FormatName
from raytune_llama.config.settings import PLACEMENT, settings

DocumentMode = Literal["line", "file", "blank_line"]
"""Unit of a txt file that is one document."""


Encoding = Literal["auto", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "big5"]
"""Encodings that can be declared; `gb18030` also reads GBK and GB2312."""


@settings
class SourceConfig:
    """One corpus of text."""

    path: Annotated[str, PLACEMENT]
    """File, folder (read recursively, without hidden files) or glob (`**` for any depth), local or
    `s3://...`, `gs://...`, or in a dataset on the hub, `hf://datasets/org/name[@revision]/path`,
    whose commit a store records and keeps. Files beside the data in a folder or glob that hold
    none, such as README.md, LICENSE or Thumbs.db, are skipped and logged. A store is identified by
    the content and the relative names of the files, not by this path."""
    format: Literal["auto", "txt", "json", "jsonl", "parquet", "arrow"] = "auto"
    """File format. `auto`: by the suffix of each file, ignoring .gz, .bz2 and .zst, and for JSON by
    its first bytes. `json` is one array of objects, or a sequence of objects; a single task reads
    the file. `jsonl` has one object, or one array of objects, per line and is read in ranges.
    `arrow` is an Arrow IPC file, such as Feather, read by record batches, or an Arrow IPC stream,
    read by a single task."""
    document: DocumentMode = "line"
    """Unit of a txt file that is one document: a `line`, the entire `file`, or a paragraph that
    ends at a `blank_line`."""
    encoding: Encoding = "auto"
    """Encoding of txt and JSON files. `auto`: by the byte order mark, else UTF-8, unless the text
    is clearly GB18030 (GBK), which is then logged, and recorded per file in the manifest."""
    text_field: str = "text"
    """JSON field, or column of a Parquet or Arrow file, that holds the text."""
    text_aliases: tuple[str, ...] = ()
    """Alternative names of this field in some rows; rows that use one are counted."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the run's sequences, relative to the other sources' weights; set it for all sources
    or for none. Null: every sequence once per epoch. It belongs to the run: a token store does not
    depend on it."""
    name: Annotated[Annotated[str, Field(pattern=r"^[\w.-]+$")] | None, PLACEMENT] = None
    """Name in metrics and manifests, of letters, digits, `_`, `.` and `-`; unique among the
    sources. Null: the last part of the path, without suffix and wildcards."""


@settings
class ConversationSource:
    """One source of conversations."""

    path: Annotated[Annotated[str, Field(min_length=1)], PLACEMENT]
    """File, folder (read recursively, without hidden files) or glob of JSON, JSON Lines, Parquet or
    Arrow files, local or `s3://...`, `gs://...`, or in a dataset on the hub,
    `hf://datasets/org/name[@revision]/path`."""
    format: Literal["auto"] | FormatName = "auto"
    """Format of the rows. `auto`: that of the first row in a known format; a later row in another
    format is an error."""
    encoding: Encoding = "auto"
    """Encoding of the files. `auto`: by the byte order mark, else UTF-8 or clearly GB18030."""
    fields: dict[FieldName, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """Names of the rows' columns, by what they hold, such as `{instruction: 问题, output: 回答}`.
    Columns with a common name need none; see `raytune_llama.chat.formats`."""
    input_separator: str = "\n"
    """Text between instruction and input of an `alpaca` row: a line break, as Chinese-LLaMA-Alpaca
    trains, or empty, as CALM converts."""
