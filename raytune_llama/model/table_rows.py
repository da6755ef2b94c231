"""Rows of a stored embedding table that look untrained, by their values; the table is not loaded.

    table = read_table_sample(path, "lm_head.weight", num_ids=32000, excluded={1, 2})
    kinds = find_untrained_rows(table, read_rows(path, "lm_head.weight", [1, 2]))

A row that was never trained is what its initialization left: zeros, the mean of the table (as
transformers and `grow_embeddings` initialize new rows), a copy of another row, or a draw from a
normal distribution, which shows only against rows that are known to be unused.

Shapes: V rows of the table, S sampled rows, R rows to judge, U unused rows, D hidden size.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from raytune_llama.model.tensors import open_weights

NUM_BLOCKS, BLOCK_ROWS = 32, 32
"""Blocks of neighboring rows that a sample consists of, and their length."""

ZERO_NORM = 1e-3
"""Norm below which a row counts as zero, relative to the median norm of the sample."""

MEAN_DISTANCE = 0.15
"""Distance from the mean of the table below which a row counts as that mean, relative to the median
distance of the sample; the mean of 1,024 rows is exact to about 0.03."""

COPY_DISTANCE = 0.02
"""Distance between two rows below which they count as equal, relative as above: tokens that are
never read or written drift together."""

UNUSED_BAND = 0.1
"""Relative width of the shell around the mean of unused rows in which a row counts as one."""

MAX_TRAINED_IN_BAND = 0.01
"""Share of the sampled rows in that shell above which it distinguishes nothing."""

MIN_UNUSED_ROWS = 16
"""Number of unused rows below which they are not compared with."""


@dataclass(frozen=True)
class TableSample:
    """Rows of a table in float32."""

    rows_SD: Tensor
    """Rows of trained tokens, evenly spaced in blocks."""

    unused_UD: Tensor
    """Rows that no token uses, if there are any."""


def read_rows(path: Path, name: str, ids: Sequence[int]) -> Tensor:
    """Read rows of a table of a model directory, in float32, shape (R, D).

    Args:
        path: a model directory with safetensors weights.
        name: name of the table in its files.
        ids: indices of the rows.
    """
    for file in open_weights(path, what="model.path").files:
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118  # a handle is no mapping
                table = opened.get_slice(name)
                runs = _runs(ids) or [(0, 0)]
                return torch.cat([table[start:stop].float() for start, stop in runs])
    raise AssertionError(f"{path} has no {name}, which stored_tables has found")


def read_table_sample(
    path: Path, name: str, *, num_ids: int, excluded: Collection[int], unused: Sequence[int]
) -> TableSample:
    """Read a sample of a table's rows.

    Args:
        path: a model directory with safetensors weights.
        name: name of the table in its files.
        num_ids: number of ids whose rows are sampled, from 0.
        excluded: ids among them that are not, such as control tokens.
        unused: ids whose rows no text uses.
    """
    step = max(BLOCK_ROWS, num_ids // NUM_BLOCKS)
    ids = [
        id_
        for start in range(0, num_ids, step)
        for id_ in range(start, min(start + BLOCK_ROWS, num_ids))
        if id_ not in excluded
    ]
    return TableSample(read_rows(path, name, ids), read_rows(path, name, unused))


def find_untrained_rows(sample: TableSample, rows_RD: Tensor) -> dict[int, str]:
    """Return which rows look untrained, by their index in `rows_RD`, and what each looks like.

    The more rows that may be untrained are given, the more copies of one another are found.
    """
    trained_SD, unused_UD = sample.rows_SD, sample.unused_UD
    norm = trained_SD.norm(dim=1).median()
    mean_D = trained_SD.mean(dim=0)
    distance = (trained_SD - mean_D).norm(dim=1).median()
    others_ND = torch.cat([rows_RD, unused_UD])
    radius = _unused_radius(sample)
    found: dict[int, str] = {}
    for number, row_D in enumerate(rows_RD):
        if row_D.norm() <= ZERO_NORM * norm:
            found[number] = "zero"
        elif (row_D - mean_D).norm() <= MEAN_DISTANCE * distance:
            found[number] = "the mean of the table"
        elif ((others_ND - row_D).norm(dim=1) <= COPY_DISTANCE * distance).sum() > 1:
            found[number] = "a copy of another row"
        elif radius is not None and _is_in_band(row_D[None], unused_UD, radius).all():
            found[number] = "like the rows of unused ids"
    return found


def _unused_radius(sample: TableSample) -> float | None:
    """Return the radius of the unused rows around their mean; None if trained rows have it too."""
    unused_UD = sample.unused_UD
    if len(unused_UD) < MIN_UNUSED_ROWS:
        return None
    radius = float((unused_UD - unused_UD.mean(dim=0)).norm(dim=1).median())
    share = _is_in_band(sample.rows_SD, unused_UD, radius).float().mean()
    return None if share > MAX_TRAINED_IN_BAND else radius


def _is_in_band(rows_ND: Tensor, unused_UD: Tensor, radius: float) -> Tensor:
    distances_N = (rows_ND - unused_UD.mean(dim=0)).norm(dim=1)
    return (distances_N - radius).abs() <= UNUSED_BAND * radius


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return ids as ranges of neighbors, in order: one read for each."""
    runs: list[tuple[int, int]] = []
    for id_ in ids:
        if runs and runs[-1][1] == id_:
            runs[-1] = (runs[-1][0], id_ + 1)
        else:
            runs.append((id_, id_ + 1))
    return runs


def describe_rows(kinds: Mapping[int, str], names: Sequence[str]) -> str:
    """Return untrained rows as text: the tokens of each kind."""
    by_kind: dict[str, list[str]] = {}
    for number, kind in kinds.items():
        by_kind.setdefault(kind, []).append(names[number])
    return "; ".join(f"{', '.join(tokens)}: {kind}" for kind, tokens in by_kind.items())
