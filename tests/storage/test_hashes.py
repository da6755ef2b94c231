"""Promise: hashes name their algorithm, and those of older releases are still checked."""

import hashlib
from pathlib import Path

import pytest

from raytune_llama.storage.hashes import (
    Hasher,
    algorithm_of,
    find_hash,
    hash_bytes,
    hash_file,
    hash_key,
    show_hash,
)

EMPTY = "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
"""BLAKE3 of no bytes, as published in the test vectors of its authors."""


def test_hash_is_that_of_the_published_vectors_and_names_its_algorithm() -> None:
    assert hash_bytes(b"") == EMPTY
    digits = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert hash_bytes(b"abc") == f"blake3:{digits}"


@pytest.mark.parametrize("num_bytes", [0, 1, 4 << 20, (4 << 20) + 1])
def test_hash_of_a_file_of_pieces_and_of_all_bytes_are_equal(
    tmp_path: Path, num_bytes: int
) -> None:
    data = b"\x07" * num_bytes
    (tmp_path / "file").write_bytes(data)
    pieces = Hasher()
    for start in range(0, num_bytes, 1_000_003):
        pieces.update(data[start : start + 1_000_003])
    assert hash_file(tmp_path / "file") == hash_bytes(data) == pieces.finish()


def test_hash_like_one_of_an_older_release_is_sha256(tmp_path: Path) -> None:
    recorded = hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_file(tmp_path / "file", like=recorded) == recorded
    assert hash_bytes(b"abd", like=recorded) == hashlib.sha256(b"abd").hexdigest()
    assert show_hash(recorded) == f"SHA-256 {recorded[:16]}"


def test_hash_of_an_unknown_algorithm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"xxh3:00.*the release that wrote it"):
        hash_bytes(b"", like="xxh3:00")


def test_find_hash_reads_the_current_key_and_the_one_of_older_releases() -> None:
    old = hashlib.sha256(b"").hexdigest()
    assert find_hash({"template_hash": EMPTY}, "template_hash") == EMPTY
    assert find_hash({"template_sha256": old}, "template_hash") == old
    assert find_hash({}, "template_hash") is None
    assert hash_key("template_hash", old) == "template_sha256"
    assert hash_key("template_hash", EMPTY) == hash_key("template_hash", None) == "template_hash"
    assert [algorithm_of(each) for each in (None, EMPTY, old)] == ["blake3", "blake3", "sha256"]
