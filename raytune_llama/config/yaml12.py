"""Read and write YAML by the YAML 1.2 core schema, reporting every error with file and line.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is false, `010` is 8, `1:30` is 90 and the
last of duplicate keys wins. Here `1e-4` is a number, only `true` and `false` are booleans, such
integers stay strings (which a strict config rejects) and duplicate keys are an error.
"""

import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

# Tag, pattern of the plain scalars that have it, and their possible first characters.
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


_UNICODE_BREAKS = re.compile("[\\x85\\u2028\\u2029]")

_PLAIN_ITEM = re.compile(r"[\w./~+][\w./~+-]*")


class _Loader(yaml.SafeLoader):
    """A safe loader for the core schema that collects bad keys and continues."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.bad_keys: list[tuple[int, str]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        """Build a mapping with string keys, without duplicates."""
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                self.bad_keys.append((line, f"the key {key!r} is not a string; put it in quotes"))
            elif key in mapping:
                self.bad_keys.append((line, f"duplicate key {key!r}; delete one"))
            else:
                mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes strings which YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        """Disable anchors and aliases, so that settings are easy to read."""
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Represent a string; Unicode line breaks are escaped, since reading would change them."""
        style = '"' if _UNICODE_BREAKS.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
# Inherit nothing of YAML 1.1: PyYAML copies its resolvers only if a class has none.
_Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in _SCALARS:
    _pattern = re.compile(f"(?:{_form})\\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
# An empty scalar has no first character; both classes look it up under the empty string.
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])


def read_mapping(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a YAML file that contains one mapping.

    Returns:
        The mapping, empty for an empty file, None if it could not be read; and the errors, one line
        each, with file and line number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, [f"{path}: no such file"]
    except (OSError, UnicodeDecodeError) as error:
        return None, [f"{path}: cannot be read as UTF-8 text: {error}"]
    return parse_mapping(text, str(path))


def parse_mapping(text: str, name: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Parse the text of a YAML file, as `read_mapping` does; errors begin with `name`."""
    try:
        data, bad_keys = _parse(text)
    except yaml.YAMLError as error:
        return None, [f"{name}{_where(error)}"]
    problems = [f"{name}:{line}: {problem}" for line, problem in bad_keys]
    if data is None:
        return {}, problems
    if not isinstance(data, dict):
        kind = type(data).__name__
        return None, [*problems, f"{name}: got a {kind}, wanted a mapping of fields to values"]
    return data, problems


def read_value(text: str) -> tuple[Any, list[str]]:
    """Parse one YAML value, such as the right side of an override.

    Returns:
        The value, and its errors; with errors, the value is meaningless.
    """
    try:
        value, bad_keys = _parse(text)
    except yaml.YAMLError as error:
        return None, [
            f"{text!r} is not YAML; quote strings with special characters ({_reason(error)})"
        ]
    return value, [problem for _, problem in bad_keys]


def dump(data: Mapping[str, Any]) -> str:
    """Return plain data as block-style YAML in the given order; `read_mapping` reads it back."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def format_value(value: Any, *, is_item: bool = False) -> str:  # noqa: ANN401  # any plain data
    """Return plain data as YAML on one line, without quotes where none are needed.

    Args:
        value: plain data, such as the right side of an override; `read_value` reads it back.
        is_item: whether it is in a list or a mapping, where more strings need quotes.
    """
    if isinstance(value, Mapping):
        items = (f"{key}: {format_value(item, is_item=True)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(item, is_item=True) for item in value) + "]"
    if isinstance(value, str):
        is_plain = read_value(value) == (value, [])
        if is_plain and (not is_item or _PLAIN_ITEM.fullmatch(value)):
            return value
    return json.dumps(value, ensure_ascii=False)


def _parse(text: str) -> tuple[Any, list[tuple[int, str]]]:
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.bad_keys
    finally:
        loader.dispose()


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = "" if mark is None else f":{mark.line + 1}"
    return f"{line}: not YAML: {_reason(error)}"


def _reason(error: yaml.YAMLError) -> str:
    """Return PyYAML's error on one line, without its excerpt of the text."""
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(reason).split())
