"""The command `raytune runs`: list, show, diff and prune."""

import argparse
import json
from collections.abc import Callable, Sequence

from raytune_llama.runs.diff import compare_runs, differences_json, render_differences
from raytune_llama.runs.listing import list_json, render_list
from raytune_llama.runs.prune import (
    candidates_json,
    delete_places,
    find_candidates,
    render_candidates,
)
from raytune_llama.runs.show import entry_json, open_entry, render_entry
from raytune_llama.runs.survey import default_places, survey_places
from raytune_llama.runs.text import show_bytes

_DIRS = "directories to look in, local or s3://... (default: runs, stores, models, made, merges)"


def build_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments.

    Args:
        program: what usage messages call the command.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="List, show and compare run directories, and delete what is not needed. All "
        "of it is read from the directories themselves.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{list,show,diff,prune}")
    listed = verbs.add_parser("list", help="runs, sweeps, merges, stores, evaluations: a table")
    listed.add_argument("dirs", nargs="*", metavar="DIR", help=_DIRS)
    listed.add_argument("--trials", action="store_true", help="a row for each trial of a sweep")
    shown = verbs.add_parser("show", help="one run: config, losses, checkpoints, lineage")
    shown.add_argument("run", metavar="RUN", help="directory of a run, a sweep or any other job")
    shown.add_argument("dirs", nargs="*", metavar="DIR", help=f"where lineage is found: {_DIRS}")
    compared = verbs.add_parser("diff", help="two runs: configs, inputs, losses side by side")
    compared.add_argument("run", metavar="A")
    compared.add_argument("other", metavar="B")
    pruned = verbs.add_parser("prune", help="what old checkpoints, stores and leftovers take")
    pruned.add_argument("dirs", nargs="*", metavar="DIR", help=_DIRS)
    pruned.add_argument(
        "--delete", nargs="+", metavar="PATH", default=[], help="delete these, if not in use"
    )
    for verb in (listed, shown, compared, pruned):
        verb.add_argument("--json", action="store_true", help="a JSON document, for programs")
    return parser


def run_command(argv: Sequence[str], program: str, width: int) -> str:
    """Carry out `raytune runs ARGUMENTS` and return what it prints.

    Args:
        argv: arguments after `runs`.
        program: what usage messages call the command.
        width: number of characters of a line.

    Raises:
        ConfigError: a directory does not exist or holds nothing that a job wrote, or something
            that is to be deleted is in use.
        SystemExit: after help or an unknown argument.
    """
    given = build_parser(program).parse_args(argv)
    acts: dict[str, Callable[[argparse.Namespace, int], str]] = {
        "list": _list,
        "show": _show,
        "diff": _diff,
        "prune": _prune,
    }
    return acts[given.verb](given, width)


def _list(given: argparse.Namespace, width: int) -> str:
    survey = survey_places(given.dirs or default_places())
    if given.json:
        return list_json(survey, trials=given.trials)
    return render_list(survey, width, trials=given.trials)


def _show(given: argparse.Namespace, width: int) -> str:
    entry = open_entry(given.run, "RUN")
    survey = survey_places(given.dirs or [str(entry.place.parent), *default_places()])
    if given.json:
        return _json(entry_json(entry, survey))
    return render_entry(entry, survey, width)


def _diff(given: argparse.Namespace, width: int) -> str:
    first, second = open_entry(given.run, "A"), open_entry(given.other, "B")
    found = compare_runs(first, second)
    if given.json:
        return _json(differences_json(first, second, found))
    return render_differences(first, second, found, width)


def _prune(given: argparse.Namespace, width: int) -> str:
    survey = survey_places(given.dirs or default_places())
    if given.delete:
        freed = delete_places(survey, given.delete)
        return _json({"freed_bytes": freed}) if given.json else f"freed {show_bytes(freed)}"
    candidates = find_candidates(survey)
    return candidates_json(candidates) if given.json else render_candidates(candidates, width)


def _json(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, indent=1)
