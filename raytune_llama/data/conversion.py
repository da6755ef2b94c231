"""Convert conversation files from any known format to another, accounting for every row.

    convert_data(ConvertDataConfig(sources=(...), target="converted", format="conversations"))

The target directory appears once everything is written:

    train.jsonl  dev.jsonl   the rows, in input order (with `json`: one array per file)
    quarantine.jsonl         unusable rows, with file, line and reason
    manifest.json            counts that balance, and the hash of each file
"""

import json
import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from raytune_llama.chat.conversations import Conversation, Defect
from raytune_llama.chat.formats import write_row
from raytune_llama.config.settings import ConfigError, override, to_dict
from raytune_llama.data.build.text_corpus import choose_splits
from raytune_llama.data.config import ConvertDataConfig, DevSplit
from raytune_llama.data.readers.conversations import (
    ConversationCounts,
    ConversationRow,
    find_conversation_files,
    read_conversations,
)
from raytune_llama.data.readers.rows import BadRow, SourceError
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.storage.directories import pin_source_fields
from raytune_llama.storage.files import publish_directory, write_json_atomic
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import local_path

logger = logging.getLogger(__name__)

MANIFEST_FILE, QUARANTINE_FILE = "manifest.json", "quarantine.jsonl"

OutputSplit = Literal["train", "dev"]


@dataclass(frozen=True)
class Conversion:
    """Row counts of a conversion: `num_rows` is the sum of the others."""

    num_rows: int
    """Number of rows read."""
    written: dict[str, int]
    """Number of rows written, by output split (`train`, `dev`)."""
    quarantined: dict[str, int]
    """Number of unusable rows, by reason."""


def convert_data(config: ConvertDataConfig) -> Conversion:
    """Convert all conversations to `config.format`, in bounded memory.

    Raises:
        ConfigError: The target exists, or a source matches no file that is read.
        SourceError: A source mixes formats or cannot be read, too many rows are unusable, or no
            usable row is left.
    """
    target = local_path(config.target, "target")
    if target.exists():
        raise ConfigError([f"target: {target} exists; delete it or choose another directory"])
    paths = (source.path for source in config.sources)
    config = override(config, pin_source_fields(paths, "sources"))
    sources = find_conversation_files(config.sources)
    counts = ConversationCounts()
    with publish_directory(target) as folder:
        conversion = _write_all(folder, config, counts, sources)
        _check(conversion, folder, config)
        files = {file.name: hash_file(file) for file in sorted(folder.iterdir())}
        manifest = asdict(conversion) | {
            "blank_lines": counts.blank_lines,
            "formats": dict(counts.files),
            "keys": {
                "aliased": dict(counts.keys.aliased),
                "ignored": dict(counts.keys.ignored),
                "repeated": dict(counts.keys.repeated),
            },
            "files": files,
            "config": to_dict(config),
        }
        write_json_atomic(folder / MANIFEST_FILE, manifest)
    _log(conversion, counts, target)
    return conversion


def _write_all(
    folder: Path, config: ConvertDataConfig, counts: ConversationCounts, sources: list[SourceFile]
) -> Conversion:
    written: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    num_rows = 0
    with ExitStack() as stack:
        parts: list[OutputSplit] = ["train", "dev"] if config.split else ["train"]
        writers = {
            part: stack.enter_context(_RowFile(folder / f"{part}.{config.layout}", config.layout))
            for part in parts
        }
        bad = stack.enter_context(_RowFile(folder / QUARANTINE_FILE, "jsonl"))
        for row in read_conversations(config.sources, counts, config.ignore_fields, sources):
            num_rows += 1
            made = _convert(row, config)
            if isinstance(made, Defect | BadRow):
                quarantined[made.reason] += 1
                place = {"source": row.source, "file": row.file, "line": row.line}
                bad.write(place | {"row": row.number} | _reason(made))
                continue
            part = _choose_split(row, config.split, num_written=written.total())
            writers[part].write(made)
            written[part] += 1
    return Conversion(num_rows, dict(written), dict(sorted(quarantined.items())))


def _convert(row: ConversationRow, config: ConvertDataConfig) -> dict[str, Any] | Defect | BadRow:
    conversation = row.conversation
    if not isinstance(conversation, Conversation):
        return conversation
    if conversation.id is None and config.id_prefix is not None:
        conversation = replace(conversation, id=f"{config.id_prefix}-{row.number}")
    return write_row(conversation, config.format)


def _reason(bad: Defect | BadRow) -> dict[str, str]:
    return {"reason": bad.reason, "detail": bad.detail}


def _choose_split(row: ConversationRow, split: DevSplit | None, *, num_written: int) -> OutputSplit:
    if split is None:
        return "train"
    if split.head is not None:
        return "dev" if num_written < split.head else "train"
    assert split.hash_fraction is not None
    assert isinstance(row.conversation, Conversation)
    content = [row.conversation.system, *map(asdict, row.conversation.turns)]
    sides = choose_splits([json.dumps(content, ensure_ascii=False)], split.hash_fraction)
    return "dev" if sides["validation"][0] else "train"


class _RowFile:
    """Writer of JSON objects, one per line or as one array."""

    def __init__(self, path: Path, layout: Literal["jsonl", "json"]) -> None:
        self._path = path
        self._is_array = layout == "json"
        self._num_rows = 0

    def __enter__(self) -> Self:
        self._file = self._path.open("w", encoding="utf-8", newline="\n")
        if self._is_array:
            self._file.write("[\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_array:
            self._file.write("\n]\n" if self._num_rows else "]\n")
        self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        text = json.dumps(row, ensure_ascii=False)
        if self._is_array:
            self._file.write((",\n" if self._num_rows else "") + text)
        else:
            self._file.write(text + "\n")
        self._num_rows += 1


def _check(conversion: Conversion, folder: Path, config: ConvertDataConfig) -> None:
    num_bad, num_written = sum(conversion.quarantined.values()), sum(conversion.written.values())
    assert conversion.num_rows == num_bad + num_written, "every row is counted where it ends up"
    quarantine = folder / QUARANTINE_FILE
    if num_bad > config.max_bad_fraction * conversion.num_rows:
        with quarantine.open(encoding="utf-8") as file:
            first = "\n  ".join(line.rstrip("\n") for line, _ in zip(file, range(10), strict=False))
        raise SourceError(
            f"max_bad_fraction: {num_bad} of {conversion.num_rows} rows are unusable, more than "
            f"{config.max_bad_fraction:.2%}; fix them or raise the limit. First ones:\n  {first}"
        )
    if not num_written:
        raise SourceError("sources: no usable row found; name files that contain conversations")
    if not num_bad:
        quarantine.unlink()


def _log(conversion: Conversion, counts: ConversationCounts, target: Path) -> None:
    listed = ", ".join(f"{number} to {part}" for part, number in conversion.written.items())
    logger.info("%s: %d rows read, %s", target, conversion.num_rows, listed)
    if conversion.quarantined:
        bad = ", ".join(f"{number} {reason}" for reason, number in conversion.quarantined.items())
        logger.warning("%s: unusable rows: %s", target / QUARANTINE_FILE, bad)
    for meaning, names in (
        ("read under an alias", counts.keys.aliased),
        ("that are metadata or ignored, not converted", counts.keys.ignored),
        ("repeated in one object, not converted", counts.keys.repeated),
    ):
        if names:
            found = ", ".join(f"{name!r} {number} times" for name, number in names.most_common(20))
            logger.warning("fields %s: %s", meaning, found)
