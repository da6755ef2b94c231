"""Promise: a run on a disk that is full or read-only says so, and goes on once that is mended."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_llama.train.checkpoint.layout import CheckpointError, list_checkpoints
from raytune_llama.train.monitoring import metrics
from raytune_llama.train.monitoring.metrics import read_metrics
from tests.train.conftest import MakeConfig, curve, run_here
from tests.train.saved import hashes_of

FULL = {"train": "full", "lora": None, "eval__every_steps": None, "checkpoint__every_steps": 1}


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that holds two checkpoints of a full fine-tune, but not a third one beside them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder `run/checkpoints` in which nothing can be written."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mount("--bind", str(folder), str(folder))
    mount("-o", "remount,ro,bind", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


def test_train_on_a_full_disk_stops_and_goes_on_when_there_is_room(
    make_config: MakeConfig, small_disk: Path
) -> None:
    whole = make_config("whole", **FULL)
    run_here(whole)
    (newest, _) = reversed(list_checkpoints(whole.run_place))
    size = sum(status.num_bytes for status in newest.files().values())
    room = shutil.disk_usage(small_disk).free
    assert 2 * size < room < 3 * size, f"a checkpoint has {size} bytes, the disk {room}"

    config = make_config(**FULL, run_dir=str(small_disk / "run"))
    # What the metrics' file meets is an error too.
    with pytest.raises((CheckpointError, OSError), match="No space left"):
        run_here(config)
    kept = list_checkpoints(config.run_place)
    assert len(kept) == 2
    mount("-o", "remount,size=20m", str(small_disk))
    assert run_here(config).status == "finished"
    assert curve(config) == curve(whole)
    ours, wanted = (hashes_of(list_checkpoints(c.run_place)[-1]) for c in (config, whole))
    assert ours == wanted


def test_train_with_a_read_only_folder_counts_and_ends_naming_it(
    make_config: MakeConfig, read_only: Path
) -> None:
    whole, config = make_config("whole", **FULL), make_config(**FULL)
    run_here(whole)
    with pytest.raises(CheckpointError, match=str(read_only)):
        run_here(config)
    failed = [r["step"] for r in read_metrics(config.run_place) if metrics.CHECKPOINT_FAILED in r]
    assert failed == [1, 2, 3]
    subprocess.run(["umount", str(read_only)], check=True)
    assert run_here(config).status == "finished"
    assert curve(config) == curve(whole)
