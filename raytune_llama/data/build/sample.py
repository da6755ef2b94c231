"""A sample of a corpus: rows chosen evenly from the heads of several files, in every run the same.

    heads = read_heads(corpus.files, num_files=8)
    rows = choose_rows(heads, 3)
    table = sample_lengths(corpus, tokenizer)   # how long the documents are, within a few seconds

Of a large file only the head is read, as a compressed one cannot be read from the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation, Defect
from raytune_llama.chat.encoding import build_chat_encoder
from raytune_llama.chat.formats import read_row
from raytune_llama.chat.row_fields import KeyCounts
from raytune_llama.data.build.chat_corpus import ChatCorpus
from raytune_llama.data.build.chat_reader import DROP_REASONS
from raytune_llama.data.build.preparation import Corpus
from raytune_llama.data.build.text_corpus import TextCorpus
from raytune_llama.data.filters.cleaning import Cleaner
from raytune_llama.data.readers.documents import read_head_rows
from raytune_llama.data.readers.rows import BadRow, RowBatch
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.lengths import LengthTable
from raytune_llama.tokenizer.loader import encode_text

_HEAD_ROWS = 1000
_HEAD_BYTES = 4 << 20
_LENGTH_FILES = 16
_LENGTH_BYTES = 1 << 19
_LENGTH_ROWS = 2000


@dataclass(frozen=True, slots=True)
class HeadRow:
    """A row in the head of a file that is not blank."""

    file: SourceFile
    """File of the row."""
    line: int | None
    """Line of the row, or row of a table, from 1; None for text, whose reader counts no lines."""
    offset: int
    """Offset of the row, in bytes or, for tables, in rows."""
    value: str | dict[str, Any] | BadRow
    """Text or object of the row, or why it cannot be read."""

    @property
    def place(self) -> str:
        """File and line of the row, for people; for text, the offset, for a JSON array both."""
        if self.line is None:
            return f"{self.file.name} at {self.file.options.offset_unit} {self.offset}"
        unit = "row" if self.file.options.is_table else "line"
        place = f"{self.file.name}, {unit} {self.line}"
        # A whole array is often on one line.
        is_array = self.file.options.format == "json"
        return f"{place}, byte {self.offset}" if is_array else place


def read_heads(
    files: Sequence[SourceFile],
    num_files: int,
    *,
    max_rows: int = _HEAD_ROWS,
    max_bytes: int = _HEAD_BYTES,
) -> list[list[HeadRow]]:
    """Read the first rows of some files, chosen evenly.

    Args:
        files: Files to choose from.
        num_files: Number of files to read, at most.
        max_rows: Number of rows to read per file, at most.
        max_bytes: Number of bytes to read per file, at most, apart from the last row.
    """
    count = min(num_files, len(files))
    chosen = [files[number * len(files) // count] for number in range(count)]
    return [_read_head(file, max_rows, max_bytes) for file in chosen]


def choose_rows(heads: Sequence[Sequence[HeadRow]], num_rows: int) -> list[HeadRow]:
    """Return rows that are spread evenly over the files and over each of their heads, in order."""
    quotas = [0] * len(heads)
    left = min(num_rows, sum(map(len, heads)))
    while left:
        for number, head in enumerate(heads):
            if left and quotas[number] < len(head):
                quotas[number] += 1
                left -= 1
    # Of one row each, the files show the beginning, the middle and the end, not all the beginning.
    return [
        head[len(head) * (turn * len(heads) + number) // (quota * len(heads))]
        for number, (head, quota) in enumerate(zip(heads, quotas, strict=True))
        for turn in range(quota)
    ]


def _read_head(file: SourceFile, max_rows: int, max_bytes: int) -> list[HeadRow]:
    rows: list[HeadRow] = []
    for batch in read_head_rows(file):
        for row in _rows_of(batch, file):
            is_beyond = row.offset >= max_bytes and not file.options.is_table
            if len(rows) >= max_rows or (is_beyond and rows):
                return rows
            rows.append(row)
    return rows


def _rows_of(batch: RowBatch, file: SourceFile) -> list[HeadRow]:
    rows = [
        HeadRow(file, None, offset, text)
        for text, offset in zip(batch.texts, batch.offsets, strict=True)
        if text.strip()
    ]
    rows += [HeadRow(file, row.line, row.offset, row.value) for row in batch.objects]
    rows += [HeadRow(file, row.line, row.offset, row) for row in batch.bad]
    return sorted(rows, key=lambda row: row.offset)


def sample_lengths(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> LengthTable:
    """Encode a sample of a corpus and return how long its documents are.

    Rows that are unusable, blank or dropped by cleaning are not counted. Of a text longer than the
    sample, only the beginning is encoded.

    Args:
        corpus: Corpus of a token store.
        tokenizer: Tokenizer of the store.
    """
    num_files = min(_LENGTH_FILES, max(1, len(corpus.files)))
    heads = read_heads(
        corpus.files,
        num_files,
        max_rows=_LENGTH_ROWS // num_files,
        max_bytes=_LENGTH_BYTES // num_files,
    )
    rows = [row for head in heads for row in head]
    if isinstance(corpus, ChatCorpus):
        return _sample_conversations(corpus, tokenizer, rows)
    assert isinstance(corpus, TextCorpus)
    texts = [row.value[:_LENGTH_BYTES] for row in rows if isinstance(row.value, str)]
    cleaned = Cleaner(corpus.config.cleaning).clean_all(texts)
    table = LengthTable(is_sample=True)
    for ids in encode_text(tokenizer, [text for text, reason in cleaned if reason is None]):
        if ids:
            table.add(len(ids))
    return table


def _sample_conversations(
    corpus: ChatCorpus, tokenizer: PreTrainedTokenizerFast, rows: list[HeadRow]
) -> LengthTable:
    table = LengthTable(is_sample=True, num_targets=0)
    read = [
        read_row(row.value, corpus.formats[row.file.source], KeyCounts())
        for row in rows
        if isinstance(row.value, dict)
    ]
    usable = [one for one in read if isinstance(one, Conversation)]
    for made in build_chat_encoder(tokenizer, corpus.config.chat).encode(usable):
        if not isinstance(made, Defect):
            table.add(
                len(made.ids),
                num_targets=int(made.targets.sum()),
                num_cut=made.num_cut,
                lost_prompt=made.lost_prompt,
            )
        elif made.reason in DROP_REASONS:
            table.add_left_out(made.num_tokens)
    return table
