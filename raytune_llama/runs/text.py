"""Places, sizes, times and losses as people read them, and plain tables of them."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_llama.storage.place import Place

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TIMES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def show_place(place: Place) -> str:
    """Return a place as short as it can be typed: local ones relative to the current folder."""
    if place.is_local and place.path.is_relative_to(Path.cwd()):
        return str(place.path.relative_to(Path.cwd()))
    return str(place)


def show_bytes(num_bytes: float) -> str:
    """Return a size with a unit: `1.2 GiB`."""
    power = 0
    while num_bytes >= 1024 and power < len(_UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.0f} B" if power == 0 else f"{num_bytes:.1f} {_UNITS[power]}"


def show_age(seconds: float | None) -> str:
    """Return a time span with one unit: `3 h`; empty if it is unknown."""
    if seconds is None:
        return ""
    for size, unit in _TIMES:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return "now"


def show_loss(loss: float | None) -> str:
    """Return a loss with four digits; empty without one, `not finite` for NaN."""
    if loss is None:
        return ""
    return f"{loss:.4f}" if math.isfinite(loss) else "not finite"


def render_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], width: int, *, num_left: int = 1
) -> str:
    """Return a table as plain text.

    Args:
        heads: heads of the columns.
        rows: cells of each row.
        width: number of characters of a line.
        num_left: number of first columns with text, which is broken into lines where it is too
            long; the others are aligned to the right.
    """
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        is_text = number < num_left
        table.add_column(
            head,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())
