"""Promise: a token store in object storage is the one on the disk, by way of checked copies."""

import pickle
import re
from http import HTTPStatus
from pathlib import Path

import pytest

from raytune_llama.data.store.manifest import StoreError
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.storage import buckets
from raytune_llama.storage.hashes import hash_hex
from raytune_llama.storage.place import Place
from tests.data.store.test_token_store import edit_manifest, write_store
from tests.faulty_s3 import FaultyServer


def upload(folder: Path, target: Place) -> Place:
    for file in folder.iterdir():
        (target / file.name).upload(file)
    return target


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A store of two shards on the disk."""
    return write_store(tmp_path / "store")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def remote(local: Path, s3_path: Place) -> Place:
    """The same store in object storage."""
    return upload(local, s3_path)


def copies(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*.arrow"))


def test_remote_store_gives_what_the_local_one_does(
    remote: Place, local: Path, cache: Path
) -> None:
    ours, wanted = TokenStore.open(remote, cache), TokenStore.open(local)
    assert ours.fingerprint == wanted.fingerprint
    assert ours.manifest == wanted.manifest
    split, other = ours.split("train"), wanted.split("train")
    assert split.tokens(0, 11).tolist() == other.tokens(0, 11).tolist()
    assert split.document_starts(0, 11).tolist() == other.document_starts(0, 11).tolist()
    assert split.bytes_between(1, 7) == other.bytes_between(1, 7)
    assert split.source_ranges() == other.source_ranges()


def test_remote_store_fetches_shards_when_a_split_is_read_and_once(
    remote: Place, cache: Path, faulty_s3: FaultyServer
) -> None:
    store = TokenStore.open(faulty_s3.front_of(remote), cache)
    split = store.split("train")
    assert not cache.exists()
    split.tokens(0, 1)
    assert copies(cache) == sorted(
        f"{hash_hex(shard.hash)}.arrow" for shard in split.manifest.shards
    )
    faulty_s3.requests.clear()
    # Another process, or the next run.
    assert pickle.loads(pickle.dumps(split)).tokens(0, 11).tolist() == list(range(5, 16))  # noqa: S301
    assert faulty_s3.requests == []


def test_remote_split_pickles_small(remote: Place, cache: Path) -> None:
    split = TokenStore.open(remote, cache).split("train")
    before = len(pickle.dumps(split))
    split.tokens(0, 11)
    assert len(pickle.dumps(split)) == before < 2000


def test_remote_store_default_cache_is_that_of_the_node(
    remote: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = TokenStore.open(remote).split("train")
    # As after it was sent to a node with another home.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert split.tokens(0, 1).tolist() == [5]
    assert len(copies(tmp_path / "elsewhere/raytune_llama")) == 2


def test_remote_store_truncated_copy_is_fetched_again(remote: Place, cache: Path) -> None:
    store = TokenStore.open(remote, cache)
    store.split("train").tokens(0, 1)
    for name in copies(cache):
        (cache / name).write_bytes((cache / name).read_bytes()[:-8])
    assert store.split("train").tokens(0, 11).tolist() == list(range(5, 16))


def test_remote_store_flipped_bit_is_found_by_verify_and_by_reading(
    remote: Place, cache: Path
) -> None:
    store = TokenStore.open(remote, cache)
    store.verify()
    shard = remote / "train-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    for read in (store.verify, lambda: store.split("train").tokens(0, 1)):
        with pytest.raises(StoreError, match=f"{re.escape(str(shard))}: its hash is BLAKE3"):
            read()
    assert len(copies(cache)) == 1


def test_remote_store_verify_reads_the_store_and_no_copy(remote: Place, cache: Path) -> None:
    store = TokenStore.open(remote, cache)
    store.split("train").tokens(0, 1)
    (remote / "train-00000.arrow").write_bytes(bytes(10))
    with pytest.raises(StoreError, match=r"train-00000\.arrow.*: its hash is BLAKE3"):
        store.verify()


def test_remote_store_without_a_shard_or_manifest_is_refused(remote: Place) -> None:
    (remote / "train-00000.arrow").delete()
    with pytest.raises(StoreError, match=r"s3://.*train-00000\.arrow.* is missing"):
        TokenStore.open(remote)
    (remote / "manifest.json").delete()
    with pytest.raises(StoreError, match=r"s3://.* no manifest\.json"):
        TokenStore.open(remote)


def test_remote_store_edited_manifest_is_refused(local: Path, s3_path: Place) -> None:
    edit_manifest(local, lambda data: data["splits"]["train"].update(tokens=12))
    with pytest.raises(StoreError, match=r"s3://.*counts of train"):
        TokenStore.open(upload(local, s3_path))


def test_remote_store_shard_that_cannot_be_fetched_names_both_places(
    remote: Place, cache: Path, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    place = faulty_s3.front_of(remote)
    store = TokenStore.open(place, cache)
    faulty_s3.fault = lambda *_: HTTPStatus.FORBIDDEN
    with pytest.raises(StoreError) as caught:
        store.split("train").tokens(0, 1)
    expected = f"{place / 'train-00000.arrow'}: cannot be downloaded to {cache} ("
    assert str(caught.value).startswith(expected)
