"""YAML is read as the 1.2 core schema says, and what is written is read back the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.config.yaml12 import dump, read_mapping, read_value

# What YAML readers take for something else than text, or need quotes around.
HARD_TEXTS = ["1e-4", "1_0", "yes", "null", "~", "", " x ", "#", "a: b", "- a", "010", "1:30", "\t",
              "0x1f", "2024-01-01", "=", "<<", "x\u2028\x85\n", "\ud7ff\ue000", "a\n\n b\n", ".inf",
              "!!x", "'\"", "\u2029", "a \n b", "\ufeff", "\r\n", "\x00"]  # fmt: skip
texts = st.text() | st.sampled_from(HARD_TEXTS)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def typed(value: object) -> object:
    """Tell 1 from 1.0 and True, which compare equal."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return type(value), value


@given(st.dictionaries(texts, values, max_size=4))
def test_dumped_mapping_is_read_back_with_the_same_types(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "data.yaml"
    path.write_text(dump(data), encoding="utf-8", newline="\n")
    found, problems = read_mapping(path)
    assert not problems
    assert found is not None
    assert typed(found) == typed(data)
    assert list(found) == list(data)


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "010", "1:30", "2024-01-01", "0x1f"])
def test_dumped_text_is_text_to_yaml_1_1_readers_too(text: str) -> None:
    assert yaml.safe_load(dump({"a": text})) == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("-1E4", -1e4), ("1.", 1.0), (".5", 0.5), ("+1.5e+3", 1500.0),
        ("7", 7), ("-7", -7), ("0", 0), ("1_000_000", 1_000_000), (".inf", float("inf")),
        ("true", True), ("False", False), ("null", None), ("~", None), ("[a, 1]", ["a", 1]),
        ("yes", "yes"), ("no", "no"), ("010", "010"), ("1:30", "1:30"), ("1:30.5", "1:30.5"),
        ("2024-01-31", "2024-01-31"), ("0x1f", "0x1f"), ("0b1", "0b1"), ("1__0", "1__0"),
        ("'1'", "1"), ("=", "="), ("<<", "<<"), ("trueish", "trueish"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_plain_scalar_has_the_type_of_yaml_1_2(text: str, value: object) -> None:
    found, problems = read_value(text)
    assert not problems
    assert typed(found) == typed(value)


@pytest.mark.parametrize("text", ["[", "a: b: c", "*unknown", "!!python/name:os.system", "'"])
def test_value_that_is_not_yaml_is_one_problem(text: str) -> None:
    _, problems = read_value(text)
    assert len(problems) == 1
    assert "\n" not in problems[0]


def test_repeated_and_odd_keys_are_named_by_line_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a:\n  b: 1\n  c: 2\n  b: 3\n1: x\n[p]: y\nd: [{e: 1, e: 2}]\n")
    found, problems = read_mapping(path)
    assert found == {"a": {"b": 1, "c": 2}, "d": [{"e": 1}]}
    lines = [problem.removeprefix(f"{path}:").partition(":")[0] for problem in problems]
    assert sorted(lines) == ["4", "5", "6", "7"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"a: [1", ":1: not YAML"),
        (b"a: 1\n b: 2\n", ":2: not YAML"),
        (b"a: 1\n---\nb: 2\n", ":2: not YAML"),
        (b"a: !!python/name:os.system\n", ":1: not YAML"),
        (b"- a\n", ": got a list"),
        (b"text", ": got a str"),
        (b"a: \xff\n", ": cannot be read as UTF-8"),
        (b"a: \x01\n", ": not YAML"),
    ],
)
def test_unusable_file_is_one_problem_with_file_and_line(
    tmp_path: Path, content: bytes, what: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    found, problems = read_mapping(path)
    assert found is None
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}{what}")
    assert "\n" not in problems[0]


def test_missing_file_and_directory_are_problems(tmp_path: Path) -> None:
    assert read_mapping(tmp_path / "none.yaml") == (None, [f"{tmp_path}/none.yaml: no such file"])
    assert read_mapping(tmp_path)[0] is None


def test_value_left_out_is_null_and_empty_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a:\nb: [1, ]\n")
    assert read_mapping(path) == ({"a": None, "b": [1]}, [])
    path.write_text("# nothing\n")
    assert read_mapping(path) == ({}, [])
