"""One entry in detail: `raytune runs show RUN`."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from raytune_llama.config.settings import ConfigError
from raytune_llama.runs.entries import RUN_KINDS, Entry
from raytune_llama.runs.lineage import find_results, find_sources
from raytune_llama.runs.listing import show_state, show_steps
from raytune_llama.runs.recognition import (
    READ_ERRORS,
    describe_error,
    find_trial,
    read_config,
    read_entry,
)
from raytune_llama.runs.survey import Survey
from raytune_llama.runs.text import render_table, show_age, show_bytes, show_loss, show_place
from raytune_llama.runs.tree import read_folder
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    EVAL_TEXT_BITS_PER_BYTE,
    LEARNING_RATE,
    LOSS,
    read_metrics,
)

_SHOWN_FIELDS: Final = (
    *("model.path", "model.tokenizer", "model.quantization", "train", "adapter"),
    *("lora.rank", "lora.alpha", "lora.targets", "data.store_dir", "optim.learning_rate"),
    *("schedule.kind", "batch.sequence_tokens", "batch.sequences_per_step", "max_steps"),
    *("num_epochs", "stop_step", "seed", "engine.precision", "engine.strategy"),
    "scale.num_workers",
)
_CURVES: Final = (LOSS, EVAL_LOSS, EVAL_BITS_PER_BYTE, EVAL_TEXT_BITS_PER_BYTE, LEARNING_RATE)
_NUM_ROWS: Final = 12
_MAX_TRIALS: Final = 20


def open_entry(name: str, field: str) -> Entry:
    """Return the entry at a place.

    Args:
        name: directory of a run or of any other job, local or in object storage.
        field: what an error calls it.

    Raises:
        ConfigError: there is nothing that a job wrote.
    """
    place = Place.parse(name, field)
    trial = None
    # A trial of a damaged sweep is read as a run of its own.
    with contextlib.suppress(*READ_ERRORS):
        trial = find_trial(place)
    entry = read_entry(read_folder(place), trial)
    if entry is None:
        raise ConfigError(
            [
                f"{field}: {place} holds no run, sweep, merge, store or evaluation; "
                "`raytune runs list DIR` lists those below a directory"
            ]
        )
    return entry


def render_entry(entry: Entry, survey: Survey, width: int) -> str:
    """Return all that is known of an entry, for a terminal.

    Args:
        entry: the entry.
        survey: where its lineage is looked for.
        width: number of characters of a line.
    """
    lines = [f"{show_place(entry.place)}: {entry.kind}, {show_state(entry)}"]
    lines += [f"  {entry.note}"] if entry.note else []
    facts = {
        "step": show_steps(entry),
        "size": show_bytes(entry.folder.num_bytes),
        "last write": f"{show_age(entry.age_seconds)} ago" if entry.age_seconds else "",
    }
    lines += [f"  {name}: {fact}" for name, fact in facts.items() if fact]
    if entry.kind in RUN_KINDS:
        lines += _section("config", _config_lines(entry))
        lines += _section("losses", _curve_lines(entry, width))
        lines += _section("checkpoints", _checkpoint_lines(entry))
    if entry.kind == "sweep":
        lines += _section("trials", _trial_lines(entry, survey, width))
    lines += _section("made from", map(str, find_sources(entry, survey.entries)))
    lines += _section("used by", map(str, find_results(entry, survey.entries)))
    return "\n".join(lines)


def entry_json(entry: Entry, survey: Survey) -> dict[str, Any]:
    """Return what `render_entry` shows as plain data, with every record of the metrics."""
    document = entry.to_json()
    if entry.kind in RUN_KINDS:
        try:
            document |= {"config": read_config(entry.folder), "metrics": read_metrics(entry.place)}
        except READ_ERRORS as error:
            document["problem"] = describe_error(error)
    sources, results = (f(entry, survey.entries) for f in (find_sources, find_results))
    document["made_from"] = [relative.to_json() for relative in sources]
    document["used_by"] = [relative.to_json() for relative in results]
    return document


def _section(title: str, lines: Iterator[str] | Sequence[str]) -> list[str]:
    found = [f"  {line}" for line in lines]
    return ["", f"{title}:", *found] if found else []


def value_at(data: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401  # any value of YAML
    """Return the value at a dotted path of plain data; None if it has none."""
    here: Any = data
    for name in path.split("."):
        here = here.get(name) if isinstance(here, Mapping) else None
    return here


def _config_lines(entry: Entry) -> Iterator[str]:
    try:
        config = read_config(entry.folder)
    except READ_ERRORS as error:
        yield describe_error(error)
        return
    for path in _SHOWN_FIELDS:
        value = value_at(config, path)
        if value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{path}: {shown}"


@dataclass(frozen=True)
class Curves:
    """Metrics of a run by step."""

    values: Mapping[str, Mapping[int, float | None]]
    """Name of a metric to its values by step; None: not finite."""

    @classmethod
    def read(cls, place: Place) -> "Curves":
        """Read the metrics of a run.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read.
        """
        values: dict[str, dict[int, float | None]] = {}
        for record in read_metrics(place):
            for name, value in record.items():
                values.setdefault(name, {})[int(record["step"])] = value
        return cls(values)

    def cell(self, name: str, step: int) -> str:
        """Return a metric at a step for a table; empty if it was not measured there."""
        found = self.values.get(name, {})
        if step not in found:
            return ""
        value = found[step]
        if value is None:
            return "not finite"
        return f"{value:.3g}" if name == LEARNING_RATE else show_loss(value)


def choose_steps(
    steps: Sequence[int], evaluated: Sequence[int], most: int = _NUM_ROWS
) -> list[int]:
    """Return steps to show: those with evaluations if there are any, evenly spread if too many.

    Args:
        steps: steps with a loss, in order.
        evaluated: steps with an evaluation, in order.
        most: number of steps to return at most.
    """
    found = sorted({*evaluated, *steps[-1:]}) if evaluated else list(steps)
    if len(found) <= most:
        return found
    return [found[round(number * (len(found) - 1) / (most - 1))] for number in range(most)]


def _curve_lines(entry: Entry, width: int) -> list[str]:
    try:
        curves = Curves.read(entry.place)
    except READ_ERRORS as error:
        return [describe_error(error)]
    names = [name for name in _CURVES if name in curves.values]
    trained, evaluated = (sorted(curves.values.get(name, {})) for name in (LOSS, EVAL_LOSS))
    steps = choose_steps(trained, evaluated)
    if not steps:
        return []
    rows = [(str(step), *(curves.cell(name, step) for name in names)) for step in steps]
    return render_table(("step", *names), rows, width - 2, num_left=0).splitlines()


def _checkpoint_lines(entry: Entry) -> Iterator[str]:
    for checkpoint in entry.checkpoints:
        marks = [
            name
            for name, is_set in (("newest", checkpoint.is_newest), ("best", checkpoint.is_best))
            if is_set
        ]
        size = show_bytes(checkpoint.folder.num_bytes)
        yield f"step {checkpoint.step}: {size}" + (f", {' and '.join(marks)}" if marks else "")


def _trial_lines(entry: Entry, survey: Survey, width: int) -> list[str]:
    trials = [
        other for other in survey.entries if other.is_trial and other.place.is_below(entry.place)
    ]
    rows = [
        (
            *(show_place(trial.place), show_state(trial), show_steps(trial)),
            *(show_loss(trial.train_loss), show_loss(trial.eval_loss)),
            show_bytes(trial.folder.num_bytes),
        )
        for trial in trials[:_MAX_TRIALS]
    ]
    if not rows:
        return []
    heads = ("trial", "state", "step", "train", "eval", "size")
    lines = render_table(heads, rows, width - 2, num_left=2).splitlines()
    more = len(trials) - _MAX_TRIALS
    return [*lines, f"and {more} more: raytune runs list --trials"] if more > 0 else lines
