"""Log what one document of each text source is, with an example, before the work begins."""

import itertools
import logging
from collections.abc import Sequence

from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.documents import read_head_rows
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.readers.sources import SourceFile

logger = logging.getLogger(__name__)

_SAMPLED_DOCUMENTS = 1000
_SAMPLED_BYTES = 1 << 20
_MAX_FILE_BYTES = 64 << 20
_SHOWN_CHARACTERS = 60
_UNITS = {
    "line": "each line is a document (document: line, not file or blank_line)",
    "blank_line": "each paragraph is a document (document: blank_line, not line or file)",
    "file": "each file is a document (document: file, not line or blank_line)",
}


def log_documents(sources: Sequence[SourceConfig], files: list[SourceFile]) -> None:
    """Log per source what a document is, and the first ones of its first file that has any.

    Reads only the beginning of that file. A file that cannot be read is left to the build, which
    reports it.

    Args:
        sources: Sources in the config.
        files: Their files, as `discover_files` lists them.
    """
    for number, source in enumerate(sources):
        own = [file for file in files if file.source == number and file.status.num_bytes]
        if not own:
            continue
        options = own[0].options
        unit = f"each row is a document (field {source.text_field})"
        if options.format == "txt":
            unit = _UNITS[options.document]
        texts = _first_texts(own[0])
        num_bytes = own[0].status.num_bytes
        found = _describe(texts) if texts else f"the first file has {num_bytes:,} bytes"
        logger.info("%s: %s; %s", source.path, unit, found)


def _describe(texts: list[str]) -> str:
    mean = sum(map(len, texts)) / len(texts)
    many = f", the first {len(texts):,} have {mean:,.0f} on average" if len(texts) > 1 else ""
    more = "..." if len(texts[0]) > _SHOWN_CHARACTERS else ""
    shown = repr(texts[0][:_SHOWN_CHARACTERS])
    return f"the first one has {len(texts[0]):,} characters{many}: {shown}{more}"


def _first_texts(file: SourceFile) -> list[str]:
    """Return the first documents of a file that are not blank; none if they cannot be read."""
    options, num_bytes = file.options, file.status.num_bytes
    if options.format == "txt" and options.document == "file" and num_bytes > _MAX_FILE_BYTES:
        return []
    texts = (text for batch in read_head_rows(file, _SAMPLED_BYTES) for text in batch.texts)
    try:
        filled = (text for text in texts if text.strip())
        return list(itertools.islice(filled, _SAMPLED_DOCUMENTS))
    except (SourceError, OSError):
        return []
