"""Two runs compared: `raytune runs diff A B`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from raytune_llama.config.settings import (
    ConfigError,
    find_differences,
    from_dict,
    identity,
    to_dict,
)
from raytune_llama.runs.entries import RUN_KINDS, Entry
from raytune_llama.runs.recognition import READ_ERRORS, describe_error, read_config
from raytune_llama.runs.show import Curves, choose_steps
from raytune_llama.runs.text import render_table, show_place
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LOSS
from raytune_llama.train.run_files import IDENTITY_FILE
from raytune_llama.tune.config import JOB_CONFIGS

_NUM_STEPS: Final = 12
_INPUTS: Final = ("data", "model", "adapter", "tokenizer", "store", "evaluated")


@dataclass(frozen=True)
class RunDifferences:
    """What differs between two runs; each line is `field: A -> B`."""

    settings: tuple[str, ...]
    """Fields that decide the result: the same run cannot be resumed with another value."""

    placement: tuple[str, ...]
    """Fields that say where and how a run is carried out, and which may change on resume."""

    inputs: tuple[str, ...]
    """Model, adapter, tokenizer, token store and evaluated texts, by hash."""

    problems: tuple[str, ...] = ()
    """What could not be compared, and why."""


def compare_runs(first: Entry, second: Entry) -> RunDifferences:
    """Return the differences of two runs' configs and inputs.

    Raises:
        ConfigError: an entry is not a run.
    """
    problems = [
        f"{name}: {entry.place} is not a run ({entry.kind}); compare two training runs"
        for name, entry in (("A", first), ("B", second))
        if entry.kind not in RUN_KINDS
    ]
    if problems:
        raise ConfigError(problems)
    found: list[str] = []
    one, other = (_read(entry, found) for entry in (first, second))
    # A difference in a field that only one job has is a setting.
    is_identity = {*_paths(one.identity), *_paths(other.identity)}
    settings: list[str] = []
    placement: list[str] = []
    for line in find_differences(one.config, other.config):
        path = line.partition(":")[0]
        (settings if path in is_identity or not one.is_valid else placement).append(line)
    return RunDifferences(
        tuple(settings),
        tuple(placement),
        tuple(_describe_inputs(first, second, one.inputs, other.inputs, found)),
        tuple(found),
    )


@dataclass(frozen=True)
class _Recorded:
    """What a run's directory says of its config and inputs."""

    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    is_valid: bool
    inputs: Mapping[str, Any]


def _read(entry: Entry, problems: list[str]) -> _Recorded:
    name = show_place(entry.place)
    data: Mapping[str, Any] = {}
    inputs: Mapping[str, Any] = {}
    try:
        data = read_config(entry.folder)
        if IDENTITY_FILE in entry.folder.files:
            inputs = (entry.place / IDENTITY_FILE).read_json()
    except READ_ERRORS as error:
        problems.append(f"{name}: {describe_error(error)}")
    if not data:
        problems.append(f"{name}: has no readable run.yaml")
    try:
        config = from_dict(JOB_CONFIGS[entry.kind], data)
    except ConfigError as error:
        if data:
            problems.append(
                f"{name}: run.yaml is not one of this release ({error.problems[0]}), so settings "
                "and placement are not distinguished"
            )
        return _Recorded(data, {}, is_valid=False, inputs=inputs)
    return _Recorded(to_dict(config), identity(config), is_valid=True, inputs=inputs)


def _paths(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the dotted paths of all values, as `find_differences` names them."""
    for line in find_differences(data, {}):
        yield line.partition(":")[0]


def _describe_inputs(
    first: Entry,
    second: Entry,
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    problems: list[str],
) -> list[str]:
    for entry, inputs in ((first, one), (second, other)):
        if not inputs:
            problems.append(
                f"{show_place(entry.place)}: has no readable {IDENTITY_FILE}, so inputs are not "
                "compared by hash"
            )
    if not one or not other:
        return []
    before, after = ({key: each.get(key) for key in _INPUTS} for each in (one, other))
    return find_differences(before, after)


def render_differences(first: Entry, second: Entry, differences: RunDifferences, width: int) -> str:
    """Return the differences of two runs, and their losses side by side, for a terminal."""
    lines = [f"A: {show_place(first.place)}", f"B: {show_place(second.place)}"]
    for title, found in (
        ("settings that decide the result (A -> B)", differences.settings),
        ("placement and logging (A -> B)", differences.placement),
        ("inputs by hash (A -> B)", differences.inputs),
        ("not compared", differences.problems),
    ):
        if found:
            lines += ["", f"{title}:", *(f"  {line}" for line in found)]
    if len(lines) == 2:
        lines += ["", "the configs and the inputs are the same"]
    return "\n".join([*lines, "", *_curve_lines(first, second, width)])


def _curve_lines(first: Entry, second: Entry, width: int) -> list[str]:
    """Return the losses at steps that both runs have."""
    try:
        one, other = Curves.read(first.place), Curves.read(second.place)
    except READ_ERRORS as error:
        return [f"losses: {describe_error(error)}"]
    trained, evaluated = (
        sorted(one.values.get(name, {}).keys() & other.values.get(name, {}).keys())
        for name in (LOSS, EVAL_LOSS)
    )
    steps = choose_steps(trained, evaluated, _NUM_STEPS)
    if not steps:
        return ["losses: the runs have no step in common"]
    rows = [_row(one, other, step) for step in steps]
    heads = ("step", *(f"{name} {run}" for name in (LOSS, EVAL_LOSS) for run in ("A", "B", "B-A")))
    return ["losses at common steps:", *render_table(heads, rows, width, num_left=0).splitlines()]


def _row(one: Curves, other: Curves, step: int) -> Sequence[str]:
    cells = [str(step)]
    for name in (LOSS, EVAL_LOSS):
        left, right = (curves.values.get(name, {}).get(step) for curves in (one, other))
        change = "" if left is None or right is None else f"{right - left:+.4f}"
        cells += [one.cell(name, step), other.cell(name, step), change]
    return cells


def differences_json(first: Entry, second: Entry, differences: RunDifferences) -> dict[str, Any]:
    """Return the differences and both runs as plain data, for programs."""
    return {"a": first.to_json(), "b": second.to_json(), **asdict(differences)}
