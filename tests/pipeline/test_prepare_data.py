"""Promise: however a data job dies, the same command ends with the bytes of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_llama.config.settings import from_dict, write_yaml
from raytune_llama.data.build.file_hashes import HASHES_NAME
from raytune_llama.data.config import PrepareDataConfig
from raytune_llama.data.store.token_store import TokenStore
from tests.pipeline.conftest import ROOT, own_cluster
from tests.train.conftest import WORDS

pytestmark = pytest.mark.ray

NUM_UNITS = 22


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a little less than 22 ranges of 1 MiB: enough to be killed in the middle of."""
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    generator = random.Random(2)
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(4, 80))) for _ in range(25_000)]
    parts = (f"{part} {line}\n" for part in range(5) for line in lines)
    num_bytes = 0
    with path.open("w") as file:
        for text in parts:
            num_bytes += len(text.encode())
            if num_bytes > 21.5 * 2**20:
                break
            file.write(text)
    return path


def write_config(folder: Path, corpus: Path, tokenizer_dir: Path) -> Path:
    folder.mkdir(exist_ok=True)
    data = {
        "sources": [{"path": str(corpus)}],
        "store_dir": str(folder / "store"),
        "validation_fraction": 0.1,
        "range_mib": 1,
        "num_workers": 2,
    }
    config = from_dict(PrepareDataConfig, {"tokenizer": str(tokenizer_dir), "data": data})
    write_yaml(config, folder / "job.yaml")
    return folder / "job.yaml"


def start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/prepare_data.py", str(config)]
    with config.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=own_cluster(), stdout=log, stderr=log, text=True
        )


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != HASHES_NAME}


def records(folder: Path) -> set[str]:
    """Return the units that a job has finished so far."""
    return {path.stem for path in folder.glob("store.partial-*/units/000??.json")}


def wait_for_records(folder: Path, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while len(records(folder)) < number:
        assert process.poll() is None, (folder / "job.log").read_text()
        assert time.monotonic() < deadline, "no such record in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def expected(
    corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder, corpus, tokenizer_dir)
    assert start(config).wait() == 0, config.with_suffix(".log").read_text()
    return content(folder / "store")


@pytest.mark.slow
def test_prepare_data_driver_killed_twice_ends_with_the_same_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    config = write_config(tmp_path, corpus, tokenizer_dir)
    inodes: dict[str, int] = {}
    for number in (2, 5):
        process = start(config)
        wait_for_records(tmp_path, number, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (work,) = tmp_path.glob("store.partial-*")
        for path in (work / "store").glob("*-*.arrow"):
            if path.stem.rpartition("-")[2] in records(tmp_path):
                inodes[path.name] = path.stat().st_ino
    assert not (tmp_path / "store").exists()
    assert start(config).wait() == 0, config.with_suffix(".log").read_text()
    assert content(tmp_path / "store") == expected
    # What was done before a kill was not done again.
    assert len(inodes) >= 2 * 5
    assert {name: (tmp_path / "store" / name).stat().st_ino for name in inodes} == inodes
    TokenStore.open(tmp_path / "store").verify()
    assert len(list((tmp_path / "store").glob("train-*.arrow"))) == NUM_UNITS


@pytest.mark.slow
def test_prepare_data_lost_node_ends_with_the_same_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    config = write_config(tmp_path, corpus, tokenizer_dir)
    # A process of its own: the cluster of two nodes must not meet the tests' shared one.
    command = [sys.executable, "-m", "tests.pipeline.lost_node", str(config)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=own_cluster(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node lost after" in done.stdout
    assert content(tmp_path / "store") == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 9 MiB; mounting one takes root."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.slow
def test_prepare_data_full_disk_is_named_and_goes_on_after_room_is_made(
    corpus: Path, tokenizer_dir: Path, small_disk: Path, expected: dict[str, bytes]
) -> None:
    config = write_config(small_disk, corpus, tokenizer_dir)
    log = config.with_suffix(".log")
    assert start(config).wait() == 2
    message = log.read_text().split("\n")
    assert any(
        "no space left for" in line and str(small_disk) in line and "bytes of text" in line
        for line in message
    ), log.read_text()
    before = records(small_disk)
    assert before
    log.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert start(config).wait() == 0, log.read_text()
    assert content(small_disk / "store") == expected
    assert f"({len(before)} from an earlier run)" in log.read_text()
