"""Invalid request bodies in words: each field with what was sent and what is expected.

Pydantic reports every variant of a union by itself, and its texts name Python's types. Here the
variants of a field are joined, and the types are those of JSON.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llama.chat.conversations import describe_type
from raytune_llama.serve.protocol.fields import INVALID, MISSING, FieldError

_MAX_PROBLEMS = 8
_MAX_SHOWN_CHARACTERS = 64
_MAX_PATH_CHARACTERS = 256

_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""What pydantic's type errors expected."""

_BOUNDS = {
    "greater_than": ("more than {gt}", "below_min_value"),
    "greater_than_equal": ("at least {ge}", "below_min_value"),
    "less_than": ("less than {lt}", "above_max_value"),
    "less_than_equal": ("at most {le}", "above_max_value"),
}
_LENGTHS = {
    "string_too_short": ("at least {min_length} characters", "string_below_min_length"),
    "string_too_long": ("at most {max_length} characters", "string_above_max_length"),
    "too_short": ("at least {min_length} items", "array_below_min_length"),
    "too_long": ("at most {max_length} items", "array_above_max_length"),
}
_CHOICES = {"literal_error": "expected", "union_tag_invalid": "expected_tags"}
"""What pydantic calls the possible values."""

# How pydantic marks the variant of a union in a location: by a type or a class.
_VARIANT = re.compile(r"[A-Z]|.*[\[(-]|(str|int|float|bool|list|dict)$")


@dataclass(frozen=True)
class InvalidBody:
    """What is wrong with a request body, as in OpenAI's error object."""

    message: str
    param: str | None
    """Dotted path of the first invalid field."""

    code: str
    """OpenAI's error code of the first problem."""


@dataclass
class _Problem:
    path: str
    message: str
    code: str
    expected: str | None = None
    """Expected type or values, if the value has the wrong type."""


def describe_invalid_body(errors: Sequence[Mapping[str, Any]]) -> InvalidBody:
    """Return the description of a validation error.

    Args:
        errors: pydantic's errors of a request body.
    """
    problems = _join_variants([_read_problem(error) for error in errors])[:_MAX_PROBLEMS]
    text = "; ".join(f"{one.path or 'body'}: {one.message}" for one in problems)
    return InvalidBody(text, problems[0].path or None, problems[0].code)


def _join_variants(problems: Sequence[_Problem]) -> list[_Problem]:
    """Join what the variants of a union expected; what is inside the right variant says more."""
    joined: dict[str, _Problem] = {}
    for one in problems:
        inner = f"{one.path}."
        if one.expected and any(other.path.startswith(inner) for other in problems):
            continue
        known = joined.setdefault(one.path, one)
        if known.expected and not one.expected:
            joined[one.path] = one
        elif known is not one and known.expected:
            known.message += f" or {one.expected}"
    return list(joined.values())


def _read_problem(error: Mapping[str, Any]) -> _Problem:
    path, cause = _read_path(error["loc"]), error.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        whole = ".".join(filter(None, (path, cause.field)))
        return _Problem(whole[:_MAX_PATH_CHARACTERS], cause.message, cause.code)
    if cause is not None:
        return _Problem(path, str(cause), INVALID)
    if error["type"] in {"missing", "union_tag_not_found"}:
        return _Problem(path, "missing; this field is required", MISSING)
    got, expected, code = _compare(error["type"], error.get("input"), error.get("ctx", {}))
    is_kind = code == "invalid_type" or error["type"] in _CHOICES
    return _Problem(path, f"got {got}, expected {expected}", code, expected if is_kind else None)


def _compare(kind: str, value: object, context: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return what was sent, what is expected, and the error code."""
    got, expected, code = _show(value), "another value", INVALID
    if kind in _TYPES:
        expected, code = _TYPES[kind], "invalid_type"
        got = got if isinstance(value, float) else describe_type(value)
    elif kind in _CHOICES:
        got, expected = _show(context.get("tag", value)), str(context[_CHOICES[kind]])
    elif kind in _BOUNDS:
        expected, suffix = _BOUNDS[kind]
        code = f"{'integer' if isinstance(value, int) else 'decimal'}_{suffix}"
    elif kind in _LENGTHS:
        expected, code = _LENGTHS[kind]
        got = str(context.get("actual_length", len(value) if isinstance(value, str) else got))
    elif kind == "string_pattern_mismatch":
        expected = "a match of {pattern}"
    if kind not in _CHOICES:
        # A bound of 2 is written so, also if the field is a float.
        numbers = {
            name: int(bound) if isinstance(bound, float) and bound.is_integer() else bound
            for name, bound in context.items()
        }
        expected = expected.format(**numbers)
    return got, expected, code


def _read_path(location: Sequence[str | int]) -> str:
    """Return a dotted path without the variants of unions."""
    parts: list[str] = []
    is_tag = False
    for part in location[1:] if location[:1] in (("body",), ("path",), ("query",)) else location:
        is_variant = isinstance(part, str) and (is_tag or _VARIANT.match(part) is not None)
        if not is_variant:
            parts.append(str(part))
        is_tag = isinstance(part, str) and part.startswith("tagged-union")
    return ".".join(parts)[:_MAX_PATH_CHARACTERS]


def _show(value: object) -> str:
    if isinstance(value, str):
        shown = value[:_MAX_SHOWN_CHARACTERS]
        return repr(shown) + ("..." if len(value) > len(shown) else "")
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return describe_type(value)
    return str(value)[:_MAX_SHOWN_CHARACTERS]
