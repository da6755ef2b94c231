"""Settings of a run: a YAML file and `a.b=c` overrides become frozen, typed, strict objects.

A module describes its settings with one class, and a job's root class nests them:

    @settings
    class LoraConfig:
        '''Which weights are adapted, and how.'''

        rank: Annotated[int, Field(ge=1)] = 8
        '''Rank of the update matrices.'''

    config = load(SftConfig, sys.argv[1:], default=Path("jobs/configs/sft.yaml"))

A file and overrides, nothing else: no includes, no interpolation, no environment look-ups. Every
mistake of both is reported at once, in one `ConfigError`. How YAML is read is in `yaml12.py`.
"""

import contextlib
import copy
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast, dataclass_transform

import pydantic
import pydantic.dataclasses
import pydantic_core

from raytune_llama.config import command_line, fields, yaml12
from raytune_llama.config.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A config that cannot be used.

    A validator of a settings class may raise it too, with one entry a mistake: its entries start
    with a field path relative to that class.

    Attributes:
        problems: One line for each mistake, starting with the dotted path of the field.
    """

    def __init__(self, problems: list[str]) -> None:
        # The list is the only argument, so that pickle can rebuild the error in another process.
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


@contextlib.contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Name other fields in the errors of the block, for a config that is made from another one.

    Args:
        names: field of the made config -> field of the user's config.
    """
    try:
        yield
    except ConfigError as error:
        problems = [rename_fields(problem, names) for problem in error.problems]
        raise ConfigError(problems) from error
    except UserError as error:
        raise type(error)(rename_fields(str(error), names)) from error


def rename_fields(text: str, names: Mapping[str, str]) -> str:
    """Return a message with other names of fields; see `renamed_fields`."""
    for field, name in names.items():
        text = text.replace(field, name)
    return text


@dataclasses.dataclass(frozen=True)
class Placement:
    """Type of the marker `PLACEMENT`."""


PLACEMENT: Final = Placement()
"""Marks a field, `Annotated[int, PLACEMENT]`, that may change when a run is resumed.

It says where and how a run is carried out, not what it computes. On a field that holds a settings
class it marks all that is inside.
"""


@dataclasses.dataclass(frozen=True)
class Fingerprinted:
    """Type of the marker `FINGERPRINTED`."""


FINGERPRINTED: Final = Fingerprinted()
"""Marks a field that is compared in a way of its own on a resume, as by a store's fingerprint.

It is beside `PLACEMENT`, or below a field with that marker: what it marks may not change, but
for what is marked `PLACEMENT` inside.
"""


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, pydantic.Field)
)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only, strictly typed group of settings.

    Values are not converted: "yes" is no boolean and 1.5 no integer; only integers are taken for
    floats, and the texts of a YAML file for paths and enums. Floats are finite.

    Raises:
        TypeError: A field has no docstring under it, its default does not fit its type, or its
            default is a settings object that differs from its class's own defaults: a file that
            gives some of that object's fields would silently reset the others.
    """
    made = pydantic.dataclasses.dataclass(
        frozen=True,
        kw_only=True,
        config=pydantic.ConfigDict(
            allow_inf_nan=False,
            extra="forbid",
            ser_json_inf_nan="constants",
            strict=True,
            use_attribute_docstrings=True,
        ),
    )(cls)
    for name, field in fields.fields_of(made).items():
        field.description = field.description or fields.inherited_description(cls, name)
        if not field.description:
            raise TypeError(f"{cls.__name__}.{name}: write a docstring under the field")
        if not field.is_required():
            fields.check_default(f"{cls.__name__}.{name}", field)
    return cast("type[T]", made)


def load(
    cls: type[T], argv: Sequence[str], *, default: Path | None = None, program: str | None = None
) -> T:
    """Read a config as a job's command line gives it: `[CONFIG.yaml] [a.b=c ...]`.

    The right side of an override is YAML: `model.targets=[q_proj, v_proj]`, `eval.store=null`. The
    left side is a dotted path; numbers are indices of lists. `--help` or `-h` prints every field
    and exits.

    Args:
        cls: Root settings class.
        argv: Arguments without the program's name.
        default: File to read if `argv` names none; None means an empty config.
        program: What the usage line calls the program; None: the name of the script.

    Returns:
        The validated config.

    Raises:
        ConfigError: All mistakes of the file and of the overrides, also overrides that would mix
            other inputs with what the jobs of `default` have written.
        SystemExit: With status 0, after the help was printed.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_help_text(cls, argv, default, program or Path(sys.argv[0]).name))
        raise SystemExit(0)
    data, problems = read_arguments(argv, default=default, program=program, cls=cls)
    if data is None:
        raise ConfigError(problems)
    return _validate(cls, data, problems)


def read_arguments(
    argv: Sequence[str],
    *,
    default: Path | None = None,
    program: str | None = None,
    cls: type[Any] | None = None,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a config as `load` does, but as plain data that is not validated.

    Args:
        argv: Arguments without the program's name.
        default: File to read if `argv` names none; None means an empty config.
        program: What the usage line calls the program; None: the name of the script.
        cls: Root settings class, if it is known: an override may replace a number by a mapping
            where the class allows both.

    Returns:
        The data, None if the file could not be read, and the mistakes that are found without a
        settings class.
    """
    named, overrides = command_line.split_arguments(argv)
    path = named or default
    problems: list[str] = []
    data: dict[str, Any] | None = {}
    if path is not None:
        data, problems = yaml12.read_mapping(path)
    if named is None and default is not None and data is not None:
        problems += command_line.check_mixing(data, default, argv, program or sys.argv[0])
    # A file that could not be read lacks every field; the overrides are still checked for form.
    target = {} if data is None else data
    known = frozenset[str]() if cls is None else _known_paths(cls)
    for argument in overrides:
        problems += _apply_argument(target, argument, known)
    return data, problems


def _help_text(cls: type[Any], argv: Sequence[str], default: Path | None, program: str) -> str:
    """Return what `--help` prints: every field, or those of the section that is named after it."""
    section = next((argument for argument in argv if not argument.startswith("-")), None)
    if section is not None and "=" not in section and not section.endswith((".yaml", ".yml")):
        return describe(cls, section)
    usage = f"usage: {program} [CONFIG.yaml] [a.b=c ...]\n       {program} --help [SECTION]\n"
    source = f"Without a file: {default}\n" if default else ""
    return f"{usage}{source}\n{describe(cls)}"


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build a config from nested plain data, as `to_dict` returns it.

    Raises:
        ConfigError: All mistakes in the data.
    """
    return _validate(cls, data, [])


def to_dict(config: object) -> dict[str, Any]:
    """Return all fields of a config, defaults included, as nested plain data (JSON types)."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: object) -> str:
    """Return all fields of a config, defaults included, as YAML that `load` reads back."""
    return yaml12.dump(to_dict(config))


def write_yaml(config: object, path: Path) -> None:
    """Write `to_yaml` to a local file; a reader sees the old file or the new, never half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(to_yaml(config), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def override(config: T, values: Mapping[str, Any]) -> T:
    """Return a copy of a config with some fields replaced, validated again.

    Args:
        config: Any settings object; it is not changed.
        values: Dotted path -> value, for example a sample of a search space.

    Raises:
        ConfigError: All mistakes, unknown paths and broken relations included.
    """
    data = to_dict(config)
    known = _known_paths(type(config))
    problems = [
        problem for path, value in values.items() for problem in _put(data, path, value, known)
    ]
    return _validate(type(config), data, problems)


def identity(config: object) -> dict[str, Any]:
    """Return the fields that make a run what it is: nested plain data without `PLACEMENT` fields.

    A run is resumed only if these are equal to what it was started with.
    """
    return _without_placement(config, to_dict(config))


def changeable_fields(
    cls: type[Any], prefix: str = "", *, is_inherited: bool = False
) -> Iterator[str]:
    """Yield the dotted paths of the fields that may change when a run is resumed.

    Args:
        cls: Settings class.
        prefix: Path of its fields, with a dot at the end; empty for the root.
        is_inherited: Whether a field above it is marked `PLACEMENT`.
    """
    for name, field in fields.fields_of(cls).items():
        may_change = (
            is_inherited or PLACEMENT in field.metadata
        ) and FINGERPRINTED not in field.metadata
        if may_change:
            yield f"{prefix}{name}"
        for below, nested in fields.nested_settings(field.annotation):
            yield from changeable_fields(nested, f"{prefix}{name}.{below}", is_inherited=may_change)


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Compare two results of `identity` or `to_dict`.

    Returns:
        One line for each field that differs: `a.b: OLD -> NEW`, in the order of `old`.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{path}: {_shown(before, path)} -> {_shown(after, path)}"
        for path in {**before, **after}
        if path not in before or path not in after or before[path] != after[path]
    ]


def describe(cls: type[Any], section: str | None = None) -> str:
    """Return the help text: each field's dotted path, type, default and meaning.

    Args:
        cls: Root settings class.
        section: Dotted path whose fields are described, such as `optim`; None: all.

    Raises:
        ConfigError: No field is at `section`.
    """
    summary = inspect.cleandoc(cls.__doc__ or "").splitlines()[:1]
    lines = [": ".join([cls.__name__, *summary]), ""] if section is None else []
    known = [path for path, _ in fields.walk_fields(cls)]
    changeable = set(changeable_fields(cls))
    for path, field in fields.walk_fields(cls):
        if section is not None and path != section and not path.startswith(f"{section}."):
            continue
        required = field.is_required()
        default = "required" if required else f"default {fields.default_text(field)}"
        placement = ", may change on resume" if path in changeable else ""
        lines.append(
            f"{path}: {fields.type_text(field.annotation, field.metadata)} ({default}{placement})"
        )
        lines += [f"    {line}".rstrip() for line in (field.description or "").splitlines()]
    if not lines:
        sections = dict.fromkeys(path.partition(".")[0] for path in known)
        raise ConfigError([f"--help: no section {section!r}; sections are {', '.join(sections)}"])
    return "\n".join(lines) + "\n"


def _validate(cls: type[T], data: Mapping[str, Any], problems: list[str]) -> T:
    """Build `cls` from plain data, or raise one error with `problems` and what is wrong in it."""
    try:
        text = pydantic_core.to_json(data, inf_nan_mode="constants")
    except pydantic_core.PydanticSerializationError as error:
        raise ConfigError([*problems, f"not plain data: {error}"]) from None
    try:
        # In JSON, strict means what we want of YAML: lists for tuples and texts for paths pass,
        # and nothing else is converted.
        config = pydantic.TypeAdapter(cls).validate_json(text)
    except pydantic.ValidationError as error:
        plain = pydantic_core.from_json(text)
        problems = [*problems, *_problem_lines(cls, plain, error)]
        problems += [line for line in _relation_lines(cls, plain, error) if line not in problems]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def _apply_argument(data: dict[str, Any], argument: str, known: frozenset[str]) -> list[str]:
    """Put one `a.b=c` into plain data; return what is wrong with it."""
    path, equals, text = argument.partition("=")
    if not equals or not path or path.startswith("-"):
        return [f"{argument}: got no override, wanted a.b=c (a config file comes first)"]
    if not text.strip():
        return [f"{path}: got no value; write {path}=null, or {path}='\"\"' for the empty text"]
    value, problems = yaml12.read_value(text)
    if problems:
        return [f"{path}: {problem}" for problem in problems]
    return _put(data, path, value, known)


def _known_paths(cls: type[Any]) -> frozenset[str]:
    return frozenset(path for path, _ in fields.walk_fields(cls))


def _put(data: dict[str, Any], path: str, value: object, known: frozenset[str]) -> list[str]:
    """Set the value at a dotted path of plain data, making mappings on the way.

    A key of a mapping may contain dots: the rest of the path may be an existing key. A number where
    a mapping with the `known` path may be, as in `scale.num_workers.min`, is replaced by one.
    """
    *parents, last = path.split(".")
    here: Any = data
    for position, part in enumerate(parents):
        rest = ".".join([*parents[position:], last])
        if isinstance(here, dict) and rest in here:
            here[rest] = value
            return []
        seen = ".".join(parents[:position])
        key, problem = _key_in(here, part, seen, path)
        if problem:
            return [problem]
        if isinstance(here, dict) and (
            here.get(key) is None or (path in known and not isinstance(here[key], dict | list))
        ):
            here[key] = {}
        here = here[key]
    key, problem = _key_in(here, last, ".".join(parents), path)
    if problem:
        return [problem]
    here[key] = value
    return []


def _key_in(container: object, part: str, seen: str, path: str) -> tuple[Any, str]:
    """Return the key of `container` that `part` of a dotted path means, or what is wrong."""
    if isinstance(container, dict) and part:
        return part, ""
    if not part:
        return None, f"{path}: got an empty name between dots"
    if not isinstance(container, list):
        return None, f"{path}: {seen} is {_short(container)}, which has no field {part!r}"
    if not part.isdecimal() or int(part) >= len(container):
        return None, f"{path}: {seen} is a list of {len(container)}; {part!r} is no index of it"
    return int(part), ""


def _problem_lines(
    cls: type[Any], data: dict[str, Any], error: pydantic.ValidationError
) -> list[str]:
    """Turn pydantic's errors into lines `a.b: got X, wanted Y`, one for each field."""
    # A value that fits no member of a union gives one error a member: one line names them all, but
    # for a mapping whose fields are wrong, which was meant for the member that has fields.
    wanted: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        keys = fields.path_of_error(data, detail)
        path = ".".join(keys)
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            for problem in cause.problems:
                wanted.setdefault(f"{path}.{problem}" if path else problem, [])
        elif detail["type"] == "unexpected_keyword_argument":
            hint = fields.suggest_field(cls, keys[:-1], keys[-1])
            wanted.setdefault(f"{path}: no such field; {hint}", [])
        elif detail["type"] == "missing":
            wanted.setdefault(f"{path}: required, but not given", [])
        elif cause is not None:
            wanted.setdefault(f"{path}: {cause}" if path else str(cause), [])
        else:
            start = f"{path}: got {_short(detail['input'])}, wanted "
            wanted.setdefault(start, []).append(_wanted_text(detail))
    for start in [start for start, texts in wanted.items() if texts]:
        if any(other.startswith(f"{start.partition(':')[0]}.") for other in wanted):
            del wanted[start]
    return [start + " or ".join(dict.fromkeys(texts)) for start, texts in wanted.items()]


def _relation_lines(
    cls: type[Any], data: dict[str, Any], error: pydantic.ValidationError
) -> list[str]:
    """Return what is wrong between fields, of a config in which other fields are wrong.

    pydantic looks at relations only once every field is right. So wrong values are left out here,
    and misspelt fields get their right names; relations that such a field takes part in are not
    known.
    """
    touched: set[str] = set()
    repaired = copy.deepcopy(data)
    for detail in error.errors(include_url=False):
        *parents, last = fields.path_of_error(data, detail) or [""]
        here: Any = repaired
        for key in parents:
            here = here.get(key) if isinstance(here, dict) else None
        if not isinstance(here, dict) or last not in here or "error" in detail.get("ctx", {}):
            continue
        value = here.pop(last)
        touched.add(last)
        if detail["type"] == "unexpected_keyword_argument":
            meant = fields.closest_field(cls, parents, last)
            if meant is not None:
                touched.add(meant)
                if here.get(meant) is None:
                    here[meant] = value
    try:
        pydantic.TypeAdapter(cls).validate_json(pydantic_core.to_json(repaired))
    except pydantic.ValidationError as second:
        details = second.errors(include_url=False)
        causes = [detail.get("ctx", {}).get("error") for detail in details]
        lines = _problem_lines(cls, repaired, second) if all(causes) else []
        return [line for line in lines if not touched & set(re.findall(r"\w+", line))]
    return []


def _wanted_text(detail: pydantic_core.ErrorDetails) -> str:
    """Return what a field takes, in words."""
    words = {"bool_type": "true or false", "dataclass_type": "a mapping of fields to values"}
    words |= {"none_required": "null", "tuple_type": "a list", "dict_type": "a mapping"}
    return words.get(detail["type"], detail["msg"].removeprefix("Input should be "))


def _short(value: object) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _without_placement(value: object, plain: Any) -> Any:  # noqa: ANN401 (any JSON type)
    """Drop from `plain`, the dump of `value`, what `PLACEMENT` marks."""
    if fields.is_settings(type(value)):
        return {
            name: _without_placement(getattr(value, name), plain[name])
            for name, field in fields.fields_of(type(value)).items()
            if PLACEMENT not in field.metadata
        }
    if isinstance(value, tuple | list):
        return [_without_placement(*pair) for pair in zip(value, plain, strict=True)]
    if isinstance(value, Mapping):
        return {key: _without_placement(value[key], plain[str(key)]) for key in value}
    return plain


def _leaves(data: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of what has no fields: plain values and lists of them."""
    for key, value in data.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield from _leaves(dict(enumerate(value)), f"{path}.")
        else:
            yield path, value


def _shown(leaves: Mapping[str, Any], path: str) -> str:
    return _short(leaves[path]) if path in leaves else "(not given)"
