"""Promise: the small collectives give every worker the same, in double precision."""

import json
from functools import partial
from pathlib import Path

from raytune_llama.train.process_group import ProcessGroup
from tests.train.group import Group

# Lost in single precision, as the target tokens of a long evaluation would be.
ODD = 2.0**24 + 1


def _work(folder: Path, workers: ProcessGroup) -> None:
    rank = workers.rank
    seen = {
        "rank": rank,
        "world_size": workers.world_size,
        "is_first": workers.is_rank_zero,
        "sum": workers.all_reduce_sum([ODD if rank == 0 else 0.0, 0.25 + rank]),
        "broadcast": workers.broadcast({"from": rank}),
        "none": workers.broadcast("late" if rank else None),
    }
    workers.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def test_workers_two_processes_agree(two: Group, tmp_path: Path) -> None:
    two.call(partial(_work, tmp_path))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank,
            "world_size": 2,
            "is_first": rank == 0,
            "sum": [ODD, 1.5],
            "broadcast": {"from": 0},
            "none": None,
        }


def test_workers_alone_needs_no_process_group() -> None:
    workers = ProcessGroup.single_process()
    assert workers.is_rank_zero
    assert workers.all_reduce_sum([1.5, ODD]) == [1.5, ODD]
    assert workers.broadcast("here") == "here"
    workers.barrier()
