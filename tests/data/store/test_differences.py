"""Promise: a stale store's message names the field, the file and what changed."""

import copy
from typing import Any

import pytest

from raytune_llama.data.store.differences import describe_differences


def file(source: int, name: str, digest: str, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "source": source,
        "name": name,
        "hash": f"blake3:{digest}",
        "format": "txt",
        "max_document_bytes": 256 << 20,
        "encoding": "utf-8",
        "document": "line",
        **options,
    }


INPUTS: dict[str, Any] = {
    "format_version": 3,
    "sources": [file(0, "a.txt", "aa" * 32), file(0, "b.txt", "bb" * 32), file(1, "c.txt", "cc")],
    "tokenizer": {"hash": "blake3:" + "11" * 32, "bos_id": 1, "eos_id": 2, "version": "0.2"},
    "cleaning": {},
    "validation_fraction": 0.01,
}


def changed(**inputs: Any) -> dict[str, Any]:  # noqa: ANN401
    return {**copy.deepcopy(INPUTS), **inputs}


def test_describe_differences_edited_file_is_named_with_both_hashes() -> None:
    wanted = changed()
    wanted["sources"][1]["hash"] = "blake3:" + "dd" * 32
    (line,) = describe_differences(INPUTS, wanted)
    assert line.startswith("data.sources.0: b.txt: ")
    assert "content" in line
    assert f"BLAKE3 {'bb' * 8} -> BLAKE3 {'dd' * 8}" in line


def test_describe_differences_added_and_removed_files_are_named_per_source() -> None:
    wanted = changed(sources=[INPUTS["sources"][0], file(0, "n.txt", "0"), file(0, "o.txt", "1")])
    lines = describe_differences(INPUTS, wanted)
    assert [line.partition(": ")[0] for line in lines] == [f"data.sources.{n}" for n in (0, 1, 0)]
    assert lines[0].endswith("1 file: b.txt")
    assert lines[1].endswith("1 file: c.txt")
    assert lines[2].endswith("2 files: n.txt, o.txt")


def test_describe_differences_many_files_are_counted_and_the_first_named() -> None:
    wanted = changed(sources=[*INPUTS["sources"], *(file(1, f"{n}.txt", "0") for n in range(30))])
    (line,) = describe_differences(INPUTS, wanted)
    assert "30 files: 0.txt, 1.txt" in line
    assert "29.txt" not in line


def test_describe_differences_files_in_another_order_are_said() -> None:
    (line,) = describe_differences(INPUTS, changed(sources=INPUTS["sources"][::-1]))
    assert "order" in line


def test_describe_differences_option_of_many_files_is_one_line_with_both_values() -> None:
    wanted = changed()
    for each in wanted["sources"]:
        each["max_document_bytes"] = 1 << 20
    for each in wanted["sources"][:2]:
        each["document"] = "blank_line"
    lines = describe_differences(INPUTS, wanted)
    assert "data.max_document_mib: 256 -> 1 (3 files)" in lines
    assert "data.sources.0.document: 'line' -> 'blank_line' (2 files)" in lines
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("path", "value", "field", "values"),
    [
        ("tokenizer.bos_id", None, "data.bos", "1 -> None"),
        ("tokenizer.eos_id", None, "data.eos", "2 -> None"),
        ("tokenizer.hash", "blake3:" + "22" * 32, "tokenizer", f"{'11' * 8} -> BLAKE3 {'22' * 8}"),
        ("tokenizer.version", "0.3", "tokenizer", "'0.2' -> '0.3'"),
        ("cleaning.min_characters", 5, "data.cleaning.min_characters", "(not given) -> 5"),
        ("validation_fraction", 0.5, "data.validation_fraction", "0.01 -> 0.5"),
    ],
)
def test_describe_differences_setting_is_named_as_in_the_config(
    path: str, value: object, field: str, values: str
) -> None:
    wanted = changed()
    *parents, last = path.split(".")
    here = wanted
    for parent in parents:
        here = here[parent]
    here[last] = value
    (line,) = describe_differences(INPUTS, wanted)
    assert line.partition(":")[0] == field
    assert values in line


def test_describe_differences_of_conversations_tells_validation_from_training() -> None:
    chat = {"formats": [["alpaca", "\n", {}], ["alpaca", "\n", {}]], "validation_sources": 1}
    stored = changed(**chat, sources=[file(0, "a", "1"), file(1, "b", "2")])
    wanted = copy.deepcopy(stored)
    wanted["sources"][1]["hash"] = "blake3:3"
    wanted["formats"][1] = ["messages", "\n", {"output": "Answer"}]
    lines = describe_differences(stored, wanted)
    assert lines[0].startswith("data.validation.0: b: ")
    assert lines[1:] == [
        "data.validation.0.format: 'alpaca' -> 'messages'",
        "data.validation.0.fields.output: (not given) -> 'Answer'",
    ]
