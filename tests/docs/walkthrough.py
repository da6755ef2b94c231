"""Reads the pages that lead through commands: what is typed, what they show, which files they name.

A command of a page is a block of the language `console` (`shell-session` if it is a mistake) whose
first line begins with `$ `; the other lines are what it prints, in order, with lines of `...` where
some are left out. The comment above it says what the tests do with it:

    <!-- run -->           run it; its exit status is 0
    <!-- run status=2 -->  run it; its exit status is 2
    <!-- serve -->         start it, run what is marked `ask`, and interrupt it
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

_STEP = re.compile(
    r"^<!-- (\w+)(?: status=(\d+))? -->\n```(?:console|shell-session)\n\$ (.*?)\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_YAML = re.compile(r"^```yaml\n# ([\w.-]+\.yaml)\b(.*?)^```$", re.MULTILINE | re.DOTALL)


class Step(NamedTuple):
    """A command of a page that the tests run."""

    kind: str
    status: int
    command: str
    shown: list[str]


def read_page(name: str) -> str:
    """Return the text of a page, by its path from the top of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def find_steps(page: str) -> list[Step]:
    """Return the commands of a page that are to be run, in order."""
    return [
        Step(kind, int(status or 0), command, shown.splitlines())
        for kind, status, command, shown in _STEP.findall(page)
    ]


def find_configs(page: str) -> dict[str, str]:
    """Return the texts of a page's YAML files, by the names in their first lines."""
    return {name: f"# {name}{rest}" for name, rest in _YAML.findall(page)}


def missing_lines(shown: list[str], printed: str) -> list[str]:
    """Return the first line that a page shows and a program did not print in this order, if any.

    Numbers do not matter.
    """
    lines = iter([_without_numbers(line) for line in printed.splitlines()])
    for line in shown:
        wanted = _without_numbers(line)
        # Each search continues where the one before it has found its line.
        if wanted not in ("", "...") and not any(_matches(wanted, found) for found in lines):
            return [line]
    return []


def _matches(wanted: str, found: str) -> bool:
    """Whether a printed line is the shown one, of which the end may be left out."""
    return found == wanted or (wanted.endswith("...") and found.startswith(wanted[:-3].rstrip()))


def _without_numbers(line: str) -> str:
    """Replace numbers, as every run and every machine has others, and spaces that align them."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,:]*(?:e-\d+)?", "#", line)).strip()
