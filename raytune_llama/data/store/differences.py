"""Differences between the inputs of an existing token store and those of the config, in words.

Each line starts with the field to look at: the source, with the file's name, or the setting.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from raytune_llama.config.settings import find_differences
from raytune_llama.storage.hashes import HASH_KEYS, find_hash, show_hash

_MAX_FILES = 5  # named per source and kind of change
_MIB = 1 << 20

_FIELDS: Final = {
    "format_version": "data.store_dir: version of the store's format",
    "rows_version": "data.store_dir: version of the rules that read a row",
    "tokenizer.reference": "tokenizer: library that defines the ids",
    "tokenizer.version": "tokenizer: version of that library",
    "tokenizer.vocabulary_size": "tokenizer: number of ids",
    "tokenizer.bos_id": "data.bos: id before each document",
    "tokenizer.eos_id": "data.eos: id after each document",
    "validation_sources": "data.validation: number of sources",
}
"""What inputs are called that are not settings of the config by the same name."""

_OPTIONS: Final = {"text_fields": "text_field", "max_document_bytes": "max_document_mib"}
"""Settings of a file's options whose name differs."""


def describe_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return one line per difference: the field, what changed, and both values.

    Args:
        stored: Inputs in the store's manifest.
        wanted: Inputs that a new store would have.
    """
    before, after = (_Sources(inputs) for inputs in (stored, wanted))
    rest = [
        _indexed({key: value for key, value in inputs.items() if key != "sources"})
        for inputs in (stored, wanted)
    ]
    lines = [
        *_changed_files(before, after),
        *_changed_options(before, after),
        *(_setting_line(line, after) for line in find_differences(*rest)),
    ]
    return lines or find_differences(stored, wanted)


class _Sources:
    """The source files among a store's inputs, by their source and name."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.files: dict[tuple[int, str], Mapping[str, Any]] = {
            (file["source"], file["name"]): file for file in inputs.get("sources", [])
        }
        self._num_trained = None
        if "validation_sources" in inputs and "formats" in inputs:
            self._num_trained = len(inputs["formats"]) - inputs["validation_sources"]

    def field(self, source: int) -> str:
        """Return the config field of a source."""
        if self._num_trained is None or source < self._num_trained:
            return f"data.sources.{source}"
        return f"data.validation.{source - self._num_trained}"


def _changed_files(before: _Sources, after: _Sources) -> Iterator[str]:
    """Yield a line for each file whose content changed, and what was added and removed."""
    for key, file in after.files.items():
        old, new = (find_hash(each) or "" for each in (before.files.get(key, file), file))
        if old != new:
            hashes = f"{show_hash(old)} -> {show_hash(new)}"
            yield f"{after.field(key[0])}: {key[1]}: its content changed ({hashes})"
    for sources, others, word in ((before, after, "no longer has"), (after, before, "also has")):
        only = [key for key in sources.files if key not in others.files]
        for source in dict.fromkeys(source for source, _ in only):
            names = [name for number, name in only if number == source]
            yield f"{sources.field(source)}: it {word} {_listed(names)}"
    if set(before.files) == set(after.files) and list(before.files) != list(after.files):
        yield "data.sources: the same files are in another order"


def _changed_options(before: _Sources, after: _Sources) -> Iterator[str]:
    """Yield a line for each option of reading that changed, with the number of its files."""
    changes: Counter[tuple[str, str, str]] = Counter()
    for key, file in after.files.items():
        old = before.files.get(key, file)
        for name in {**old, **file}:
            if name not in HASH_KEYS and old.get(name) != file.get(name):
                field = f"{after.field(key[0])}.{_OPTIONS.get(name, name)}"
                values = [_option_text(name, each.get(name)) for each in (old, file)]
                if name == "max_document_bytes":
                    field = f"data.{_OPTIONS[name]}"
                changes[field, values[0], values[1]] += 1
    for (field, old, new), count in changes.items():
        yield f"{field}: {old} -> {new} ({count} {'file' if count == 1 else 'files'})"


def _option_text(name: str, value: object) -> str:
    if name == "max_document_bytes" and isinstance(value, int):
        return f"{value / _MIB:g}"
    return "(not given)" if value is None else repr(value)


def _setting_line(difference: str, sources: _Sources) -> str:
    """Turn a line of `find_differences` into one that starts with the field of the config."""
    path, _, values = difference.partition(": ")
    if path in {f"tokenizer.{key}" for key in HASH_KEYS}:
        old, new = (show_hash(value.strip("'")) for value in values.split(" -> "))
        return f"tokenizer: its content changed ({old} -> {new})"
    if path.startswith("formats."):
        source, _, option = path.removeprefix("formats.").partition(".")
        number, _, rest = option.partition(".")
        name = {"0": "format", "1": "input_separator", "2": "fields"}.get(number, number)
        name = f"{name}.{rest}" if rest else name
        return f"{sources.field(int(source))}.{name}: {values}"
    return f"{_FIELDS.get(path, f'data.{path}')}: {values}"


def _listed(names: list[str]) -> str:
    """Return the first names, and the number of all: `2 files: a.txt, b.txt`."""
    more = f" and {len(names) - _MAX_FILES} more" if len(names) > _MAX_FILES else ""
    count = f"{len(names)} {'file' if len(names) == 1 else 'files'}"
    return f"{count}: {', '.join(names[:_MAX_FILES])}{more}"


def _indexed(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Turn lists into mappings by index, so that a difference names a single element.

    Empty ones are left out: that a list is no longer empty is said by its first element.
    """
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, Mapping):
        return {key: _indexed(item) for key, item in value.items() if item not in ({}, [])}
    return value
