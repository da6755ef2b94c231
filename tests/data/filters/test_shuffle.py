"""Promise: each reader gets its rows of every file, in order."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raytune_llama.data.filters.shuffle import ShuffleRows, read_shuffle_rows, write_shuffle_rows
from raytune_llama.storage.place import Place

ROW = st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(0, 9))


@given(st.lists(st.lists(ROW, max_size=8), min_size=1, max_size=4))
@example([[(number * 7 % 4, number, number % 10) for number in range(400)]])
def test_read_rows_are_those_that_were_sent_in_order(
    tmp_path_factory: pytest.TempPathFactory, tasks: list[list[tuple[int, int, int]]]
) -> None:
    folder = Place.local(tmp_path_factory.mktemp("shuffle"))
    files = [folder / f"{number}.rows" for number in range(len(tasks))]
    for file, rows in zip(files, tasks, strict=True):
        columns = np.array([row[1:] for row in rows], dtype=np.uint64).reshape(-1, 2).T
        reader = np.array([row[0] for row in rows], dtype=np.int64)
        counts = {"rows": len(rows)}
        made = ShuffleRows(tuple(columns), reader, 4, counts)
        assert write_shuffle_rows(file, lambda made=made: made) == counts
    for place in range(4):
        found = [column.tolist() for column in read_shuffle_rows(files, place, 4, 2)]
        wanted = [row[1:] for rows in tasks for row in rows if row[0] == place]
        assert list(zip(*found, strict=True)) == wanted


def test_make_rows_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    file = Place.local(tmp_path / "made" / "0.rows")
    one = np.ones(3, dtype=np.uint64)
    rows = ShuffleRows((one,), np.zeros(3, dtype=np.int64), 1, {"number": 3, "more": 10**12})
    assert write_shuffle_rows(file, lambda: rows) == rows.counts

    def fail() -> ShuffleRows:
        raise AssertionError

    assert write_shuffle_rows(file, fail) == rows.counts


def test_make_rows_that_fail_leave_no_file(tmp_path: Path) -> None:
    def fail() -> ShuffleRows:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write_shuffle_rows(Place.local(tmp_path / "0.rows"), fail)
    assert not list(tmp_path.iterdir())
