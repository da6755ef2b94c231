"""The table of `raytune runs list`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from raytune_llama.runs.entries import RUN_KINDS, Entry
from raytune_llama.runs.survey import Survey
from raytune_llama.runs.text import render_table, show_age, show_bytes, show_loss, show_place

_HEADS = ("directory", "kind", "state", "step", "train", "eval", "trained", "model", "age", "size")
_NOTED = ("running", "interrupted", "failed", "damaged")


def render_list(survey: Survey, width: int, *, trials: bool = False) -> str:
    """Return the entries of a survey as a table, and notes on those that are not finished.

    Args:
        survey: what was found.
        width: number of characters of a line.
        trials: whether the trials of sweeps have rows of their own.
    """
    entries = _chosen(survey, trials=trials)
    lines = [render_table(_HEADS, map(_row, entries), width, num_left=2)] if entries else []
    lines += ["", *_notes(entries)] if any(entry.state in _NOTED for entry in entries) else []
    lines += [f"{show_place(folder.place)}: {folder.problem}" for folder in survey.unlisted]
    return "\n".join([*lines, *([""] if lines else []), _count(survey, entries)])


def list_json(survey: Survey, *, trials: bool = False) -> str:
    """Return the entries of a survey as a JSON document, for programs."""
    document = {
        "entries": [entry.to_json() for entry in _chosen(survey, trials=trials)],
        "unlisted": {str(folder.place): folder.problem for folder in survey.unlisted},
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)


def _chosen(survey: Survey, *, trials: bool) -> list[Entry]:
    return [entry for entry in survey.entries if trials or not entry.is_trial]


def show_steps(entry: Entry) -> str:
    """Return how far an entry is: `40/120`; empty if it has no steps."""
    if entry.step is None:
        return ""
    return f"{entry.step}/{'?' if entry.num_steps is None else entry.num_steps}"


def show_state(entry: Entry) -> str:
    """Return the state of an entry: `interrupted at 40` for a run that can be resumed."""
    is_cut = entry.state in ("interrupted", "failed") and entry.kind in RUN_KINDS
    return f"{entry.state} at {entry.step}" if is_cut and entry.step is not None else entry.state


def _row(entry: Entry) -> Sequence[str]:
    return (
        show_place(entry.place),
        entry.kind,
        show_state(entry),
        show_steps(entry),
        show_loss(entry.train_loss),
        show_loss(entry.eval_loss),
        entry.trained or "",
        entry.model or "",
        show_age(entry.age_seconds),
        show_bytes(entry.folder.num_bytes),
    )


def _notes(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        if entry.state in _NOTED and entry.note:
            yield f"{show_place(entry.place)}: {show_state(entry)}: {entry.note}"


def _count(survey: Survey, entries: Sequence[Entry]) -> str:
    """Return the number of entries by state, and what was looked at."""
    roots = ", ".join(show_place(root.place) for root in survey.roots)
    num_hidden = len(survey.entries) - len(entries)
    states = Counter(entry.state for entry in entries)
    counts = ", ".join(f"{number} {state}" for state, number in states.items())
    total = show_bytes(sum(root.num_bytes for root in survey.roots))
    more = f"; {num_hidden} trials of sweeps are left out, see --trials" if num_hidden else ""
    return f"{len(entries)} in {roots}{f': {counts}' if counts else ''}; {total}{more}"
