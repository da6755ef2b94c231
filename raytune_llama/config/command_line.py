"""The arguments of a job, `[CONFIG.yaml] [a.b=c ...]`: which file and which overrides are meant.

A file of another job is recognized, and overrides without a file, which are applied to the demo's
config, must not mix a user's inputs with the demo's outputs.
"""

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pydantic
import pydantic_core

from raytune_llama.config import fields

logger = logging.getLogger(__name__)

_OUTPUTS_BY_INPUT: Final = {
    "data.sources": ("run_dir", "data.store_dir"),
    "data.validation": ("run_dir", "data.store_dir"),
    "tokenizer": ("data.store_dir",),
    "model.tokenizer": ("run_dir", "data.store_dir"),
    "model.path": ("run_dir",),
    "adapter": ("run_dir",),
    "base": ("sweep_dir",),
    "job": ("sweep_dir",),
    "fixed.data": ("sweep_dir",),
    "fixed.model": ("sweep_dir",),
    "sources": ("target",),
    "model": ("target",),
}
"""Inputs of the jobs, and the outputs that belong to them: a run, a token store, a sweep, a model.

A new model may use an existing store of the same tokenizer; another tokenizer makes it stale.
"""

_PACKAGE: Final = Path(__file__).parents[1]

_WITHOUT_OUTPUT: Final = ("plan", "preview")
"""Fields that, if true, make a job print something and write nothing."""

_MOSTLY: Final = 4
"""A file is another job's if less than 1 / _MOSTLY as many of its fields do not fit that job."""


_VALUE: Final = "takes no such value of"
_KINDS_BY_TYPE: Final = {"unexpected_keyword_argument": "has no", "missing": "needs"}
_KINDS: Final = (*_KINDS_BY_TYPE.values(), _VALUE)
"""What a job says of a field of another job's config."""

_MAX_FIELDS: Final = 3  # named per kind


def default_config(name: str) -> Path:
    """Return a config that ships with the package, in a checkout or in an installed wheel."""
    packaged = _PACKAGE / "configs" / name
    return packaged if packaged.is_file() else _PACKAGE.parent / "jobs" / "configs" / name


def split_arguments(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the config file among the arguments, None if there is none, and the overrides."""
    overrides = list(argv)
    if overrides and _is_file_name(overrides[0]):
        return Path(overrides.pop(0)), overrides
    return None, overrides


def _is_file_name(argument: str) -> bool:
    # The directory of a trial may be called `lr=0.001`, but no field has a slash in its path.
    left, equals, _ = argument.partition("=")
    return not argument.startswith("-") and (not equals or "/" in left)


def check_mixing(
    data: Mapping[str, Any], default: Path, argv: Sequence[str], program: str
) -> list[str]:
    """Log which default config is used, and refuse overrides that mix other inputs with its own.

    Args:
        data: Content of the default config.
        default: Its file.
        argv: Overrides, without a config file.
        program: What the command calls the job.

    Returns:
        One problem for each input that is overridden without the outputs that belong to it.
    """
    overrides = [argument.partition("=")[0] for argument in argv]
    overridden = f", with {', '.join(overrides)} overridden" if overrides else ""
    logger.info("no config file is given: using the demo's, %s%s", default, overridden)
    if any(f"{field}=true" in argv for field in _WITHOUT_OUTPUT):
        return []
    problems: list[str] = []
    missing: dict[str, str] = {}
    for field, outputs in _OUTPUTS_BY_INPUT.items():
        if not any(_is_at(given, field) for given in overrides):
            continue
        found = {name: _value_at(data, name) for name in outputs if name not in overrides}
        kept = {name: value for name, value in found.items() if isinstance(value, str)}
        if kept:
            listed = " and ".join(f"{name}={value}" for name, value in kept.items())
            problems.append(
                f"{field}: got an override without a config file, so it would be mixed with the "
                f"demo's own in {listed} of {default}"
            )
        missing |= {name: f"{name}={_beside(value)}" for name, value in kept.items()}
    if problems:
        command = shlex.join([*program.split(), *argv, *missing.values()])
        problems[-1] += f"; write a config file of your own, or give other directories: {command}"
    return problems


def _is_at(path: str, field: str) -> bool:
    return path == field or path.startswith(f"{field}.")


def _value_at(data: Mapping[str, Any], path: str) -> object:
    here: object = data
    for part in path.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def _beside(place: str) -> str:
    """Return an example of another place: `runs/demo` becomes `runs/mine`."""
    folder, slash, _ = place.rpartition("/")
    return f"{folder}{slash}mine"


def describe_other_job(
    data: Mapping[str, Any], problems: Sequence[str], job: str, configs: Mapping[str, type[Any]]
) -> str | None:
    """Return whose config a file is, if it is that of another job; None if it is not.

    Args:
        data: Content of the file.
        problems: Problems that the job found with it; fields that they do not name fit the job.
        job: Job that was started.
        configs: Root settings class of each job, by its name.
    """
    named = {problem.partition(":")[0] for problem in problems}
    own = {path: kind for path, kind in find_misfits(configs[job], data).items() if path in named}
    if not own:
        return None
    counts = {name: len(find_misfits(cls, data)) for name, cls in configs.items() if name != job}
    fewest = min(counts.values(), default=len(own))
    if fewest * _MOSTLY >= len(own):
        return None
    names = [f"`raytune {name}`" for name, count in counts.items() if count == fewest]
    reasons: list[str] = []
    for kind in _KINDS:
        paths = [path for path, found in own.items() if found == kind]
        more = f" and {len(paths) - _MAX_FIELDS} more" if len(paths) > _MAX_FIELDS else ""
        if paths:
            reasons.append(f"{kind} {', '.join(paths[:_MAX_FIELDS])}{more}")
    return f"this is a config of {' or '.join(names)}, not of {job}, which {', and '.join(reasons)}"


def find_misfits(cls: type[Any], data: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that a class does not know, lacks or takes no such value of, by path."""
    try:
        text = pydantic_core.to_json(dict(data), inf_nan_mode="constants")
    except pydantic_core.PydanticSerializationError:
        return {}
    try:
        pydantic.TypeAdapter(cls).validate_json(text)
    except pydantic.ValidationError as error:
        plain = pydantic_core.from_json(text)
        return {
            ".".join(fields.path_of_error(plain, each)): _KINDS_BY_TYPE.get(each["type"], _VALUE)
            for each in error.errors(include_url=False)
            # A relation between fields, which a validator checks, is no sign of another job.
            if "error" not in each.get("ctx", {})
        }
    return {}
