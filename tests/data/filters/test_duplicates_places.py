"""Promise: duplicates are the same on a Ray cluster of any size, and in object storage."""

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from raytune_llama.data.filters.config import DuplicatesConfig, NearDuplicatesConfig
from raytune_llama.data.filters.duplicates import (
    DuplicateCounts,
    ShuffleSizes,
    find_duplicates,
    find_duplicates_with,
    read_dropped,
)
from raytune_llama.data.filters.signatures import write_signatures
from raytune_llama.data.filters.tasks import run_tasks
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.storage.place import Place

CONFIG = DuplicatesConfig(exact=True, near=NearDuplicatesConfig(shingle_words=1, bands=4, rows=1))
SIZES = ShuffleSizes(chunk_batches=3, partition_rows=100)
NUM_UNITS = 4


def run_here(
    name: str, run: Callable[[int], Mapping[str, int]], num_tasks: int, attempts: Place
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in range(num_tasks):
        counts.update(run(number))
    return counts


def write_units(folder: Place) -> Place:
    generator = random.Random(0)
    pool = [" ".join(generator.choices([f"word{n}" for n in range(600)], k=8)) for _ in range(40)]
    for unit in range(NUM_UNITS):
        texts = generator.choices(pool, k=12)
        write_signatures(folder, unit, [texts], CONFIG, batch_documents=4)
    return folder


def content(dropped: Place) -> list[bytes]:
    return [(dropped / f"{unit:05d}.arrow").read_bytes() for unit in range(NUM_UNITS)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], DuplicateCounts]:
    """The result of one process on a local disk."""
    folder = Place.local(tmp_path_factory.mktemp("expected"))
    written, dropped = write_units(folder / "signatures"), folder / "dropped"
    counts = find_duplicates_with(run_here, written, NUM_UNITS, CONFIG, dropped, sizes=SIZES)
    assert counts.documents == 48
    assert 0 < min(counts.dropped.values()) <= sum(counts.dropped.values()) < 40
    return content(dropped), counts


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A folder on an S3 server of the test."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"127.0.0.1:{port}"
    client = boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1")
    client.create_bucket(Bucket="corpus")
    uri = f"s3://corpus/store?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    yield Place.parse(uri, "place")
    server.stop()


def test_find_duplicates_in_object_storage_gives_the_same_bytes(
    bucket: Place, expected: tuple[list[bytes], DuplicateCounts]
) -> None:
    written, dropped = write_units(bucket / "signatures"), bucket / "dropped"
    counts = find_duplicates_with(run_here, written, NUM_UNITS, CONFIG, dropped, sizes=SIZES)
    assert (content(dropped), counts) == expected
    assert len(dropped.files(recursive=True)) == NUM_UNITS + 1
    assert read_dropped(dropped, 0).reason(0) is None


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_workers", [1, None])
def test_find_duplicates_any_workers_give_the_same_bytes(
    tmp_path: Path, expected: tuple[list[bytes], DuplicateCounts], num_workers: int | None
) -> None:
    folder = Place.local(tmp_path)
    written, dropped = write_units(folder / "signatures"), folder / "dropped"
    counts = find_duplicates(
        written, NUM_UNITS, CONFIG, dropped, num_workers=num_workers, sizes=SIZES
    )
    assert (content(dropped), counts) == expected


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_tasks_killed_is_run_again_but_not_for_ever(tmp_path: Path) -> None:
    def run(number: int) -> dict[str, int]:
        died = tmp_path / "died"
        if number == 3 or (number == 1 and not died.exists()):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"sum": number}

    attempts = Place.local(tmp_path / "attempts")
    # As if it had died twice already: each time takes seconds.
    (attempts / "some-step/3").write_bytes(b"..")
    with pytest.raises(StoreError) as caught:
        run_tasks("some/step", run, 4, attempts)
    (problem,) = str(caught.value).splitlines()
    assert "some-step/3: the process of the task died 3 times" in problem
    assert run_tasks("some/step", run, 3, attempts) == {"sum": 3}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_tasks_problems_are_all_told(tmp_path: Path) -> None:
    def fail(number: int) -> dict[str, int]:
        if number == 2:
            raise OSError(28, "No space left on device", "file")
        if number:
            raise StoreError(f"problem {number}")
        return {}

    with pytest.raises(StoreError) as caught:
        run_tasks("fail", fail, 4, Place.local(tmp_path / "attempts"))
    first, second, third = sorted(str(caught.value).splitlines())
    assert "No space left on device" in first
    assert "free disk space there" in first
    assert (second, third) == ("problem 1", "problem 3")
