"""Promise: a node has one whole copy of a folder in a bucket, or none, within its room."""

import shutil
import subprocess
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytune_llama.config.errors import UserError
from raytune_llama.storage.hashes import hash_bytes
from raytune_llama.storage.node_cache import NodeCache
from raytune_llama.storage.place import Place
from tests.faulty_s3 import FaultyServer
from tests.storage.fetching import fetch_elsewhere, start_fetch

MIB = 2**20
FIELD = "model.path"


def publish(place: Place, *, weights: bytes = b"weights", **others: bytes) -> Place:
    files = {"config.json": b"{}", "model.safetensors": weights, **others}
    for name, data in files.items():
        (place / name.replace("__", ".")).write_bytes(data)
    return place


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache" / "folders")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of another process with the same cache."""
    return {"RAYTUNE_LLAMA_CACHE_DIR": str(tmp_path / "cache")}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def gets(server: FaultyServer, name: str) -> int:
    return sum(r.startswith("GET ") and r.endswith(f"/{name}") for r in server.requests)


def test_fetch_copies_the_model_files_and_no_others(cache: NodeCache, s3_path: Place) -> None:
    publish(s3_path, modeling__py=b"import os", weights__bin=b"pickle", tokenizer__json=b"{}")
    folder = cache.fetch(s3_path, FIELD)
    assert names(folder) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert folder.name == s3_path.name


def test_fetch_without_weights_leaves_them_to_a_later_one(cache: NodeCache, s3_path: Place) -> None:
    publish(s3_path)
    assert names(cache.fetch(s3_path, FIELD, weights=False)) == {"config.json"}
    assert names(cache.fetch(s3_path, FIELD)) == {"config.json", "model.safetensors"}


def test_fetch_again_reads_no_file_and_a_changed_folder_is_another_copy(
    cache: NodeCache, s3_path: Place, faulty_s3: FaultyServer
) -> None:
    place = faulty_s3.front_of(publish(s3_path))
    first = cache.fetch(place, FIELD)
    before = gets(faulty_s3, "model.safetensors")
    assert cache.fetch(place, FIELD) == first
    assert gets(faulty_s3, "model.safetensors") == before > 0
    publish(s3_path, weights=b"other weights")
    second = cache.fetch(place, FIELD)
    assert (second / "model.safetensors").read_bytes() == b"other weights"
    assert (first / "model.safetensors").read_bytes() == b"weights"


def test_fetch_killed_in_a_file_continues_in_it(
    cache: NodeCache, s3_path: Place, faulty_s3: FaultyServer, environment: dict[str, str]
) -> None:
    weights = bytes(range(256)) * (20 * MIB // 256)
    place = faulty_s3.front_of(publish(s3_path, weights=weights))
    started: list[subprocess.Popen[str]] = []

    def kill(request: str, times: int) -> HTTPStatus | None:
        if not (request.startswith("GET ") and request.endswith("/model.safetensors") and times):
            return None
        started[0].kill()
        started[0].wait()
        return HTTPStatus.SERVICE_UNAVAILABLE

    faulty_s3.fault = kill
    started.append(start_fetch(str(place), environment))
    assert started[0].wait() != 0
    assert not list(cache.root.rglob("model.safetensors"))
    faulty_s3.fault = lambda _request, _times: None
    before = gets(faulty_s3, "model.safetensors")
    assert (cache.fetch(place, FIELD) / "model.safetensors").read_bytes() == weights
    # 12 MiB in pieces of 8 MiB; from the start it would have been three.
    assert gets(faulty_s3, "model.safetensors") - before == 2


@pytest.mark.parametrize("digest", ["blake3:00", 1, {"size": 2}])
def test_manifest_of_a_folder_says_nothing_of_other_files_of_the_node(
    cache: NodeCache, s3_path: Place, tmp_path: Path, digest: object
) -> None:
    other = tmp_path / "other"
    other.write_text("kept")
    publish(s3_path)
    relative = "/".join([*[".."] * 30, *other.parts[1:]])
    (s3_path / "manifest.json").write_json({"files": {str(other): digest, relative: digest}})
    folder = cache.fetch(s3_path, FIELD)
    assert (folder / relative).exists()
    assert other.read_text() == "kept"


def test_fetch_by_several_processes_of_a_node_is_one(
    s3_path: Place, faulty_s3: FaultyServer, environment: dict[str, str]
) -> None:
    place = faulty_s3.front_of(publish(s3_path))
    running = [start_fetch(str(place), environment) for _ in range(2)]
    assert len({process.communicate()[0] for process in running}) == 1
    assert [process.returncode for process in running] == [0, 0]
    assert gets(faulty_s3, "model.safetensors") == 1


def test_fetch_makes_room_by_what_was_not_used_for_longest_and_nobody_uses(
    tmp_path: Path, s3_path: Place, environment: dict[str, str]
) -> None:
    first, second, third = (
        publish(s3_path / name, weights=name[:1].encode() * MIB) for name in ("a", "b", "c")
    )
    copies = {
        place.name: Path(fetch_elsewhere(str(place), environment)) for place in (first, second)
    }
    fetch_elsewhere(str(first), environment)
    small = NodeCache(tmp_path / "cache" / "folders", int(2.5 * MIB))
    kept = small.fetch(third, FIELD)
    assert [copies["a"].is_dir(), copies["b"].is_dir(), kept.is_dir()] == [True, False, True]
    smaller = NodeCache(tmp_path / "cache" / "folders", int(1.5 * MIB))
    with pytest.raises(UserError, match=r"takes 1\.0 MB, .*may hold 1\.6 MB, of which 1\.0 MB"):
        smaller.fetch(second, FIELD)
    assert kept.is_dir()  # this process uses it


def test_fetch_on_a_full_disk_names_the_numbers_and_fetches_nothing(
    cache: NodeCache, s3_path: Place, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = faulty_s3.front_of(publish(s3_path, weights=b"w" * 30 * MIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=20 * MIB))
    with pytest.raises(UserError, match=r"model\.path: no room .*31\.5 MB .*21\.0 MB free"):
        cache.fetch(place, FIELD)
    assert gets(faulty_s3, "model.safetensors") == 0


def test_fetch_refuses_a_file_that_differs_from_the_folders_manifest(
    cache: NodeCache, s3_path: Place
) -> None:
    wrong = b'{"files": {"model.safetensors": "%s"}}' % hash_bytes(b"another").encode()
    publish(s3_path, manifest__json=wrong)
    with pytest.raises(UserError, match=r"model\.safetensors differs from its hash"):
        cache.fetch(s3_path, FIELD)
    # Another size: a bucket tells times to the second.
    right = b'{"files": {"model.safetensors": "%s"}}\n' % hash_bytes(b"weights").encode()
    publish(s3_path, manifest__json=right)
    assert (cache.fetch(s3_path, FIELD) / "model.safetensors").is_file()


def test_fetch_of_what_is_no_model_says_so(cache: NodeCache, s3_path: Place) -> None:
    with pytest.raises(UserError, match="has no files"):
        cache.fetch(s3_path, FIELD)
    (s3_path / "data.csv").write_bytes(b"1,2")
    with pytest.raises(UserError, match=r"none of a model's files, only data\.csv"):
        cache.fetch(s3_path, FIELD)
    (s3_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"weights only as pytorch_model\.bin"):
        cache.fetch(s3_path, FIELD)


def test_fetch_from_a_bucket_that_denies_names_the_credentials(
    cache: NodeCache, s3_path: Place, faulty_s3: FaultyServer
) -> None:
    place = faulty_s3.front_of(publish(s3_path))
    faulty_s3.fault = lambda _request, _times: HTTPStatus.FORBIDDEN
    with pytest.raises(UserError, match=r"model\.path: s3://.*credentials"):
        cache.fetch(place, FIELD)


@pytest.mark.parametrize("text", ["0", "-1", "much"])
def test_cache_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTUNE_LLAMA_CACHE_GIB", text)
    with pytest.raises(UserError, match="RAYTUNE_LLAMA_CACHE_GIB: got"):
        NodeCache.from_environment()
