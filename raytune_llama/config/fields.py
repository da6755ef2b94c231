"""Introspection of settings classes: paths, types and defaults of their fields."""

import difflib
import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, cast, get_args, get_origin

import pydantic
import pydantic.dataclasses
import pydantic_core
from pydantic.fields import FieldInfo

_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "multiple of"))


def is_settings(kind: object) -> TypeGuard[type[Any]]:
    """Whether an annotation is a settings class."""
    return isinstance(kind, type) and pydantic.dataclasses.is_pydantic_dataclass(kind)


def fields_of(cls: type[Any]) -> Mapping[str, FieldInfo]:
    """Return the fields of a settings class by name, in the order of the source."""
    return cls.__pydantic_fields__


def inherited_description(cls: type[Any], name: str) -> str | None:
    """Return the docstring of a field in the nearest base class that has it.

    pydantic reads the docstrings of a class's own source only. A field that the class redefines
    inherits no docstring.
    """
    if name in inspect.get_annotations(cls):
        return None
    bases = [base for base in cls.__mro__[1:] if is_settings(base) and name in fields_of(base)]
    return fields_of(bases[0])[name].description if bases else None


def check_default(name: str, field: FieldInfo) -> None:
    """Validate a field's default when its class is defined: no later step does.

    Raises:
        TypeError: The default does not fit the field's type, or is a settings object that differs
            from its class's own defaults.
    """
    default = field.get_default(call_default_factory=True, validated_data={})
    # Annotated requires metadata, even for a type without bounds.
    kind: Any = Annotated[(field.annotation, "bounds", *field.metadata)]
    try:
        pydantic.TypeAdapter(kind).validate_python(default, strict=True)
    except pydantic.ValidationError as error:
        raise TypeError(f"{name}: the default does not match the type: {error}") from None
    if is_settings(type(default)) and default != type(default)():
        raise TypeError(
            f"{name}: the default differs from {type(default).__name__}(); "
            "change the defaults of that class instead"
        )


def walk_fields(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted path and definition of every field, nested fields after their parent.

    Elements of lists have the path `list.N`, values of mappings `mapping.NAME`.
    """
    for name, field in fields_of(cls).items():
        path = f"{prefix}{name}"
        yield path, field
        for below, nested in nested_settings(field.annotation):
            yield from walk_fields(nested, f"{path}.{below}")


def nested_settings(annotation: object) -> Iterator[tuple[str, type[Any]]]:
    """Yield the settings classes that a field of this type can hold, each with its path."""
    if is_settings(annotation):
        yield "", annotation
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from nested_settings(arguments[0])
        return
    step = ""
    if isinstance(origin, type) and issubclass(origin, Mapping):
        step, arguments = "NAME.", arguments[1:]
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        step = "N."
    for argument in arguments if origin is not Literal else ():
        for below, nested in nested_settings(argument):
            yield f"{step}{below}", nested


def suggest_field(cls: type[Any], parents: Sequence[str], name: str) -> str:
    """Return a hint for an unknown field name: the closest field, or all fields of its class.

    Args:
        cls: Root settings class.
        parents: Path of the mapping with the unknown name, including list indices and keys.
        name: The unknown name.
    """
    if close := closest_field(cls, parents, name):
        return f"did you mean {'.'.join((*parents, close))}?"
    # The other common mistake: a correct name in the wrong section.
    leaves = {path.rpartition(".")[2]: path for path, _ in walk_fields(cls)}
    if match := difflib.get_close_matches(name, leaves, n=1, cutoff=0.8):
        return f"did you mean {leaves[match[0]]}?"
    classes = _classes_at(cls, parents)
    siblings = [sibling for owner in classes for sibling in fields_of(owner)]
    owners = " or ".join(owner.__name__ for owner in classes)
    return f"{owners} has {', '.join(siblings)}"


def closest_field(cls: type[Any], parents: Sequence[str], name: str) -> str | None:
    """Return the field of the mapping at a path whose name is like an unknown one, if any.

    Args:
        cls: Root settings class.
        parents: Path of the mapping with the unknown name, as of `suggest_field`.
        name: The unknown name.
    """
    siblings = [sibling for owner in _classes_at(cls, parents) for sibling in fields_of(owner)]
    close = difflib.get_close_matches(name, siblings, n=1)
    return close[0] if close else None


def _classes_at(cls: type[Any], path: Sequence[str]) -> list[type[Any]]:
    """Return the settings classes that a path can refer to."""
    classes = {"": [cls]}
    for part in path:
        below: dict[str, list[type[Any]]] = {}
        for rest, owners in classes.items():
            if rest:  # Inside a list or mapping: this part is its index or key.
                below.setdefault(rest.partition(".")[2], []).extend(owners)
                continue
            for owner in owners:
                if field := fields_of(owner).get(part):
                    for step, nested in nested_settings(field.annotation):
                        below.setdefault(step, []).append(nested)
        classes = below
    return classes.get("", [])


def path_of_error(data: object, detail: pydantic_core.ErrorDetails) -> list[str]:
    """Return where in the data an error of pydantic is, without the types that pydantic names."""
    keys: list[str] = []
    for part in detail["loc"]:
        in_mapping = isinstance(data, dict) and part in data
        if in_mapping or (isinstance(data, list) and isinstance(part, int)):
            data = cast("Any", data)[part]
            keys.append(str(part))
    return [*keys, str(detail["loc"][-1])] if detail["type"] == "missing" else keys


def type_text(annotation: object, metadata: Sequence[object] = ()) -> str:
    """Return a type in words: `int >= 1 or null`, `list of string`, `'fp32' or 'bf16'`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    bounds = _bounds_text(metadata, is_string=annotation is str)
    if origin is Annotated:
        return type_text(arguments[0], arguments[1:]) + bounds
    if origin is Literal:
        return " or ".join(repr(value) for value in arguments)
    if origin is Union or origin is types.UnionType:
        return " or ".join(type_text(argument) for argument in arguments) + bounds
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of name to {type_text(arguments[1])}{bounds}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        items = arguments[:1] if arguments[-1] is Ellipsis else arguments
        return f"list of {', '.join(type_text(item) for item in items)}{bounds}"
    words = {str: "string", Path: "path", type(None): "null", Any: "anything"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation))) + bounds


def default_text(field: FieldInfo) -> str:
    """Return a field's default as it is written in YAML."""
    default = field.get_default(call_default_factory=True, validated_data={})
    if is_settings(type(default)):
        return "as below"
    return json.dumps(pydantic_core.to_jsonable_python(default), ensure_ascii=False)


def _bounds_text(metadata: Sequence[object], *, is_string: bool) -> str:
    """Return the bounds among what annotates a type in words; empty if there are none."""
    # A FieldInfo inside Annotated has its own.
    parts = [part for item in metadata for part in getattr(item, "metadata", [item])]

    def values(name: str) -> list[Any]:
        return [value for part in parts if (value := getattr(part, name, None)) is not None]

    bounds = "".join(f" {word} {value}" for name, word in _BOUNDS for value in values(name))
    shortest, longest = (
        max(values("min_length"), default=0),
        min(values("max_length"), default=None),
    )
    if not shortest and longest is None:
        return bounds
    if longest is None:
        length = f"at least {shortest}"
    else:
        length = f"{shortest} to {longest}" if shortest else f"at most {longest}"
    one = (shortest if longest is None else longest) == 1
    unit = ("character" if is_string else "item") + ("" if one else "s")
    return bounds + (f" of {length} {unit}" if is_string else f" ({length} {unit})")
