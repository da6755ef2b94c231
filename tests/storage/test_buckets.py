"""Promise: requests that fail are made again, and an upload is whole or never seen."""

import os
import signal
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from raytune_llama.storage import buckets
from raytune_llama.storage.place import Place
from tests.faulty_s3 import FaultyServer

MIB = 2**20


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_upload_that_is_interrupted_is_whole(
    faulty_s3: FaultyServer, s3_path: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "UPLOAD_PART_BYTES", 10 * MIB)
    data = os.urandom(25 * MIB)
    (tmp_path / "source").write_bytes(data)

    def interrupt(request: str, _: int) -> None:
        if "partNumber=1" in request:
            signal.raise_signal(signal.SIGINT)

    faulty_s3.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        (faulty_s3.front_of(s3_path) / "file").upload(tmp_path / "source")
    assert (s3_path / "file").read_bytes() == data


def test_requests_that_fail_at_first_are_made_again(
    faulty_s3: FaultyServer, s3_path: Place
) -> None:
    folder = faulty_s3.front_of(s3_path)
    failures = {
        "POST": [HTTPStatus.SERVICE_UNAVAILABLE],
        "PUT": [HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE],
        "GET": [HTTPStatus.SERVICE_UNAVAILABLE],
        "HEAD": [HTTPStatus.INTERNAL_SERVER_ERROR],
    }

    def fail(request: str, _: int) -> HTTPStatus | None:
        left = failures[request.split(maxsplit=1)[0]]
        return left.pop() if left else None

    faulty_s3.fault = fail
    (folder / "file").write_bytes(b"content")
    assert list(folder.files()) == [folder / "file"]
    assert (folder / "file").read_bytes() == b"content"
    assert not any(failures.values())


@pytest.mark.parametrize(
    ("failing", "num_bytes"),
    [
        ("?uploads", 25 * MIB),
        ("partNumber=1", 25 * MIB),
        ("partNumber=2", 25 * MIB),
        ("?uploads", 1),
        ("PUT", 1),
        ("PUT", 0),
    ],
)
def test_upload_that_fails_for_good_leaves_the_old_file(
    faulty_s3: FaultyServer,
    s3_path: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    failing: str,
    num_bytes: int,
) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    file = faulty_s3.front_of(s3_path) / "file"
    (s3_path / "file").write_bytes(b"old")
    (tmp_path / "source").write_bytes(bytes(num_bytes))
    faulty_s3.fault = lambda request, _: (
        HTTPStatus.INTERNAL_SERVER_ERROR if failing in request else None
    )
    with pytest.raises(OSError, match=s3_path.name):
        file.upload(tmp_path / "source")
    assert (s3_path / "file").read_bytes() == b"old"
