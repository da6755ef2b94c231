"""Promise: folders at a place are whole or not trusted, and a node's copies are what they claim."""

import os
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path

import pytest

from raytune_llama.storage import buckets
from raytune_llama.storage.hashes import hash_bytes, hash_hex
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import (
    Mirror,
    default_cache_dir,
    is_published,
    local_copy,
    publish_place,
)
from tests.faulty_s3 import FaultyServer

DATA = b"the bytes of a shard"
HASH = hash_bytes(DATA)


class _StopError(Exception):
    pass


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder that does not exist yet, on the disk and in object storage."""
    if request.param == "local":
        return Place.local(tmp_path / "folder")
    return request.getfixturevalue("s3_path")


def names(folder: Place) -> list[str]:
    return [place.relative_to(folder) for place in folder.files(recursive=True)]


def publish(target: Place) -> None:
    with publish_place(target, "manifest.json") as folder:
        (folder / "deep").mkdir()
        for name in ("a.bin", "manifest.json", "z.bin", "deep/b.bin"):
            (folder / name).write_text(name)


def test_publish_place_shows_the_folder_when_the_block_ends(folder: Place) -> None:
    with publish_place(folder, "manifest.json") as local:
        (local / "manifest.json").write_text("{}")
        assert not is_published(folder, "manifest.json")
        assert names(folder) == []
    assert is_published(folder, "manifest.json")
    assert names(folder) == ["manifest.json"]


def test_publish_place_again_is_refused_and_keeps_what_is_there(folder: Place) -> None:
    publish(folder)
    assert names(folder) == ["a.bin", "deep/b.bin", "manifest.json", "z.bin"]
    with (
        pytest.raises(FileExistsError, match="exists; delete it"),
        publish_place(folder, "manifest.json"),
    ):
        pytest.fail("the block must not run")
    assert (folder / "deep/b.bin").read_bytes() == b"deep/b.bin"


def test_publish_place_that_raises_shows_nothing(folder: Place) -> None:
    def fail() -> None:
        with publish_place(folder, "manifest.json") as local:
            (local / "manifest.json").write_text("{}")
            raise _StopError

    with pytest.raises(_StopError):
        fail()
    assert not folder.exists()


@pytest.mark.parametrize("failing", ["a.bin", "deep/b.bin", "z.bin", "manifest.json"])
def test_publish_place_upload_that_fails_is_not_published_and_can_be_repeated(
    faulty_s3: FaultyServer, s3_path: Place, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    faulty_s3.fault = lambda request, _: (
        HTTPStatus.INTERNAL_SERVER_ERROR
        if request.startswith(f"PUT /{s3_path.key}/{failing}")
        else None
    )
    with pytest.raises(OSError, match=failing):
        publish(faulty_s3.front_of(s3_path))
    assert not is_published(s3_path, "manifest.json")
    publish(s3_path)
    assert is_published(s3_path, "manifest.json")
    assert names(s3_path) == ["a.bin", "deep/b.bin", "manifest.json", "z.bin"]


def test_publish_place_uploads_the_last_file_after_all_others(
    faulty_s3: FaultyServer, s3_path: Place
) -> None:
    publish(faulty_s3.front_of(s3_path))
    # An upload is complete with a POST; its key is the first word of the request's path.
    completed = [
        request.removeprefix(f"POST /{s3_path.key}/").partition("?")[0]
        for request in faulty_s3.requests
        if request.startswith("POST") and "uploadId" in request
    ]
    assert completed[-1] == "manifest.json"
    assert len(completed) == 4


def test_mirror_shows_what_was_written_at_the_last_push(folder: Place) -> None:
    mirror = Mirror(folder)
    growing = mirror.folder / "log"
    growing.write_text("1\n")
    mirror.push()
    assert (folder / "log").read_bytes() == b"1\n"
    growing.write_text("1\n2\n")
    (mirror.folder / "deep").mkdir()
    (mirror.folder / "deep/other").write_text("x")
    mirror.push()
    assert names(folder) == ["deep/other", "log"]
    assert (folder / "log").read_bytes() == b"1\n2\n"
    growing.write_text("1\n2\n3\n")
    mirror.close()
    assert (folder / "log").read_bytes() == b"1\n2\n3\n"
    assert mirror.folder.exists() == folder.is_local


def test_mirror_pushes_only_what_has_changed(faulty_s3: FaultyServer, s3_path: Place) -> None:
    mirror = Mirror(faulty_s3.front_of(s3_path))
    for name in ("a", "b"):
        (mirror.folder / name).write_text("x")
    mirror.push()
    faulty_s3.requests.clear()
    (mirror.folder / "b").write_text("longer")
    mirror.close()
    assert {request.partition("?")[0] for request in faulty_s3.requests} == {
        f"{method} /{s3_path.key}/b" for method in ("POST", "PUT")
    }


def test_mirror_that_cannot_push_says_so_and_leaves_no_folder(
    faulty_s3: FaultyServer, s3_path: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    faulty_s3.fault = lambda *_: HTTPStatus.INTERNAL_SERVER_ERROR
    mirror = Mirror(faulty_s3.front_of(s3_path))
    (mirror.folder / "log").write_text("x")
    with pytest.raises(OSError, match="log"):
        mirror.close()
    assert not mirror.folder.exists()


def copy(place: Place, cache_dir: Path, *, wanted: str = HASH, num_bytes: int = 20) -> Path:
    return local_copy(place, wanted=wanted, num_bytes=num_bytes, cache_dir=cache_dir)


def test_local_copy_of_a_local_file_is_the_file(tmp_path: Path) -> None:
    file = Place.local(tmp_path / "file.arrow")
    file.write_bytes(DATA)
    assert copy(file, tmp_path / "cache") == file.path
    assert not (tmp_path / "cache").exists()


def test_local_copy_is_named_by_content_and_fetched_once(
    faulty_s3: FaultyServer, s3_path: Place, tmp_path: Path
) -> None:
    folder = faulty_s3.front_of(s3_path)
    for name in ("a.arrow", "b.arrow"):
        (folder / name).write_bytes(DATA)
    first = copy(folder / "a.arrow", tmp_path / "cache")
    assert first == tmp_path / "cache" / f"{hash_hex(HASH)}.arrow"
    assert first.read_bytes() == DATA
    faulty_s3.requests.clear()
    # The same bytes under another name are the same copy.
    assert copy(folder / "b.arrow", tmp_path / "cache") == first
    assert faulty_s3.requests == []


@pytest.mark.parametrize("left", [b"", DATA[:-1], DATA + b"more"])
def test_local_copy_of_another_size_is_fetched_again(
    s3_path: Place, tmp_path: Path, left: bytes
) -> None:
    (s3_path / "a.arrow").write_bytes(DATA)
    path = copy(s3_path / "a.arrow", tmp_path)
    path.write_bytes(left)
    assert copy(s3_path / "a.arrow", tmp_path) == path
    assert path.read_bytes() == DATA


def test_local_copy_of_other_bytes_is_refused_and_leaves_no_copy(
    s3_path: Place, tmp_path: Path
) -> None:
    file = s3_path / "a.arrow"
    file.write_bytes(DATA)
    with pytest.raises(ValueError, match="its hash is BLAKE3") as caught:
        copy(file, tmp_path, wanted="blake3:" + "0" * 64)
    assert str(file) in str(caught.value)
    with pytest.raises(ValueError, match="has 20 bytes, wanted 19"):
        copy(file, tmp_path, num_bytes=19)
    with pytest.raises(FileNotFoundError):
        copy(s3_path / "b.arrow", tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".arrow"] == []


def test_local_copy_by_many_processes_at_once_is_fetched_once(
    faulty_s3: FaultyServer, s3_path: Place, tmp_path: Path
) -> None:
    data = os.urandom(20 * 2**20)
    wanted = hash_bytes(data)
    file = faulty_s3.front_of(s3_path) / "a.arrow"
    file.write_bytes(data)
    faulty_s3.requests.clear()
    program = (
        "import sys; from pathlib import Path; from raytune_llama.storage.place import Place;"
        "from raytune_llama.storage.transfers import local_copy; sys.stdin.read(1);"
        "place = Place.parse(sys.argv[1], 'x');"
        "path = local_copy(place, wanted=sys.argv[2], num_bytes=20 * 2**20,"
        " cache_dir=Path(sys.argv[3])); print(path)"
    )
    command = [sys.executable, "-c", program, str(file), wanted, str(tmp_path)]
    processes = [
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.close()
        process.stdin = None
    outputs = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert outputs == {str(tmp_path / f"{hash_hex(wanted)}.arrow")}
    assert (tmp_path / f"{hash_hex(wanted)}.arrow").read_bytes() == data
    # Ranges of one size are read one after the other: as many as one process needs.
    assert len([r for r in faulty_s3.requests if r.startswith("GET")]) == 3
    assert [path.suffix for path in tmp_path.iterdir() if path.name[0] != "."] == [".arrow"]


def test_default_cache_dir_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/home/someone/.cache/raytune_llama")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/raytune_llama")
