"""Promise: what one worker cannot write, all know of; one that dies while saving costs a step."""

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from raytune_llama.train.checkpoint.layout import list_checkpoints
from raytune_llama.train.monitoring import metrics
from raytune_llama.train.monitoring.metrics import read_metrics
from tests.train.conftest import MakeConfig, curve, stage_fields
from tests.train.group import Group
from tests.train.saved import hashes_of

FIELDS = {"checkpoint__keep_best": False, "eval__every_steps": None}


@contextlib.contextmanager
def disk_of(full_rank: int, times: int, rank: int) -> Iterator[None]:
    """Refuse to flush one worker's files of a checkpoint."""
    left = iter(range(times))

    def refuse() -> None:
        if next(left, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _at_flush(refuse) if rank == full_rank else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def killed(dying_rank: int, number: int, rank: int) -> Iterator[None]:
    """End one worker as it flushes a file of a checkpoint, at the n-th time, from 0."""
    count = itertools.count()

    def die() -> None:
        if next(count) == number:
            os._exit(9)

    with _at_flush(die) if rank == dying_rank else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _at_flush(act: Callable[[], None]) -> Iterator[None]:
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith("state-"):
            act()
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", watched)
        yield


@pytest.mark.parametrize("full_rank", [0, 1])
def test_train_with_one_workers_disk_full_for_a_while_goes_on_and_counts(
    make_config: MakeConfig, two: Group, full_rank: int
) -> None:
    whole, config = make_config("whole", **FIELDS), make_config(**FIELDS)
    two.run(whole)
    two.run(config, around=partial(disk_of, full_rank, 2))
    assert curve(config) == curve(whole)
    failed = [r["step"] for r in read_metrics(config.run_place) if metrics.CHECKPOINT_FAILED in r]
    assert failed == [2, 4]
    ours, wanted = (
        [p.name for p in (c.run_place / "checkpoints").folders()] for c in (config, whole)
    )
    assert (ours, wanted) == (["step-00000006"], ["step-00000004", "step-00000006"])


@pytest.mark.slow
def test_train_with_one_workers_disk_full_ends_on_all_of_them_naming_it(
    make_config: MakeConfig, two: Group
) -> None:
    fields = {**FIELDS, "checkpoint__every_steps": 1}
    with pytest.raises(AssertionError, match=r"CheckpointError: 3 .* worker 1: .*No space"):
        two.run(make_config(**fields), around=partial(disk_of, 1, 10**6))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(1, 1), (0, 4)])
def test_train_whose_worker_is_killed_while_saving_resumes_from_the_one_before(
    make_config: MakeConfig, two: Group, rank: int, number: int
) -> None:
    # At step 4: as the second worker flushes its file, or as the first one publishes all.
    fields = {**FIELDS, **stage_fields(2)}
    whole, config = make_config("whole", **fields), make_config(**fields)
    two.run(whole)
    with pytest.raises(AssertionError):
        two.run(config, around=partial(killed, rank, number))
    assert list_checkpoints(config.run_place)[-1].name == "step-00000002"
    two.run(config)
    assert curve(config) == curve(whole)
    ours, wanted = (hashes_of(list_checkpoints(c.run_place)[-1]) for c in (config, whole))
    assert ours == wanted
