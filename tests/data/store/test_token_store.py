"""Promise: a store proves what it holds, and a stale or damaged one is never used."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.store import shards as shards_module
from raytune_llama.data.store.manifest import (
    STORE_FORMAT_VERSION,
    Manifest,
    RowCounts,
    Shard,
    SplitManifest,
    StoreError,
    check_fingerprint,
    fingerprint_of,
    token_dtype,
    write_manifest,
)
from raytune_llama.data.store.shards import ShardWriter
from raytune_llama.data.store.token_store import TokenSplit, TokenStore
from raytune_llama.storage.place import Place

INPUTS: dict[str, Any] = {
    "format_version": 1,
    "sources": [
        {"source": 0, "name": "a.txt", "hash": "blake3:00"},
        {"source": 1, "name": "b.txt", "hash": "blake3:11"},
    ],
    "tokenizer": {"eos_id": 2},
}
DOCUMENTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]
NUM_BYTES = [30, 5, 7, 40, 9]


def write_shards(folder: Path, documents: list[list[int]], sizes: list[int]) -> SplitManifest:
    """Write documents into shards of `sizes` documents; document n has NUM_BYTES[n] bytes."""
    shards: list[Shard] = []
    start = 0
    for number, size in enumerate(sizes):
        with ShardWriter(folder / f"train-{number:05d}.arrow", "uint16", source=number) as writer:
            for row in range(start, start + size):
                writer.write(documents[row], NUM_BYTES[row % len(NUM_BYTES)], number, 100 * row)
        start += size
        if writer.shard:
            shards.append(writer.shard)
    return SplitManifest.from_shards(shards)


def write_store(path: Path) -> Path:
    path.mkdir()
    train = write_shards(path, DOCUMENTS, [2, 3])
    manifest = Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of(INPUTS),
        inputs=INPUTS,
        token_dtype="uint16",  # noqa: S106 - a type's name
        splits={"train": train, "validation": SplitManifest.from_shards([])},
        rows=RowCounts(),
        quarantine=None,
        lengths=[],
    )
    write_manifest(Place.local(path / "manifest.json"), manifest)
    return path


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((path / "manifest.json").read_bytes())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shard have several record batches: two documents each."""
    monkeypatch.setattr(shards_module, "_BATCH_DOCUMENTS", 2)


@pytest.mark.usefixtures("small_batches")
def test_tokens_every_range_equals_the_concatenated_documents(tmp_path: Path) -> None:
    split = TokenStore.open(write_store(tmp_path / "store")).split("train")
    flat = [token for ids in DOCUMENTS for token in ids]
    assert (split.num_tokens, split.num_documents, split.num_bytes) == (11, 5, 91)
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            assert split.tokens(start, stop).tolist() == flat[start:stop]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), data=st.data())
def test_document_starts_and_bytes_any_range_equal_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(lengths)))
    documents = [[1] * length for length in lengths]
    folder = tmp_path_factory.mktemp("split")
    split = TokenSplit(
        Place.local(folder), write_shards(folder, documents, [cut, len(lengths) - cut])
    )
    starts = np.cumsum([0, *lengths])
    low, high = sorted(data.draw(st.lists(st.integers(0, starts[-1]), min_size=2, max_size=2)))

    inside = [start for start in starts[:-1] if low <= start < high]
    assert split.document_starts(low, high).tolist() == inside
    share_of_token = [
        NUM_BYTES[row % len(NUM_BYTES)] / length
        for row, length in enumerate(lengths)
        for _ in range(length)
    ]
    assert split.bytes_between(low, high) == pytest.approx(sum(share_of_token[low:high]))


def test_bytes_between_whole_documents_is_exact(tmp_path: Path) -> None:
    split = TokenStore.open(write_store(tmp_path / "store")).split("train")
    assert split.bytes_between(3, 10) == 5 + 7 + 40
    assert split.bytes_between(0, split.num_tokens) == split.num_bytes


def test_tokens_within_a_batch_is_a_read_only_view(tmp_path: Path) -> None:
    split = TokenStore.open(write_store(tmp_path / "store")).split("train")
    view, whole = split.tokens(0, 2), split.tokens(0, 4)
    assert view.dtype == np.uint16
    assert np.shares_memory(view, whole)
    assert not view.flags.writeable


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 12), (3, 2)])
def test_tokens_outside_the_stream_is_refused(tmp_path: Path, start: int, stop: int) -> None:
    split = TokenStore.open(write_store(tmp_path / "store")).split("train")
    with pytest.raises(IndexError, match="stream of 11"):
        split.tokens(start, stop)


def test_split_pickled_after_use_reads_the_same(tmp_path: Path) -> None:
    split = TokenStore.open(write_store(tmp_path / "store")).split("train")
    unused = pickle.dumps(split)
    expected = split.tokens(0, 11).tolist()
    data = pickle.dumps(split)
    assert len(data) == len(unused)  # the tokens don't travel
    assert pickle.loads(data).tokens(0, 11).tolist() == expected  # noqa: S301


def test_split_many_shards_holds_no_file_open(tmp_path: Path) -> None:
    split = TokenStore.open(write_store(tmp_path / "store")).split("train")
    before = len(list(Path("/proc/self/fd").iterdir()))
    split.tokens(0, 11)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_shard_same_documents_give_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, DOCUMENTS, [5])
    files = [tmp_path / name / "train-00000.arrow" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_shard_writer_exception_leaves_no_file(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def write_some() -> None:
        with ShardWriter(tmp_path / "x.arrow", "uint32", source=0) as writer:
            for _ in range(70_000):
                writer.write([1], 1, 0, 0)
            assert list(tmp_path.iterdir())
            raise StopError

    with pytest.raises(StopError):
        write_some()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_token_dtype_is_the_smallest_that_holds_the_last_id(size: int, dtype: str) -> None:
    assert token_dtype(size) == dtype
    assert np.iinfo(dtype).max >= size - 1


def test_open_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        TokenStore.open(tmp_path)


def test_open_missing_shard_names_the_file(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    (store / "train-00001.arrow").unlink()
    with pytest.raises(StoreError, match=r"train-00001\.arrow is missing"):
        TokenStore.open(store)


def test_open_truncated_shard_names_the_file(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    shard = store / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"train-00000\.arrow has \d+ bytes"):
        TokenStore.open(store)


def test_verify_flipped_bit_names_the_file(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store")
    store = TokenStore.open(path)
    store.verify()
    shard = path / "train-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"train-00001\.arrow: its hash is BLAKE3"):
        TokenStore.open(path).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format_version=99), "got format_version 99"),
        (lambda data: data["inputs"]["tokenizer"].update(eos_id=3), "fingerprint"),
        (lambda data: data["splits"]["train"].update(tokens=12), "counts of train"),
        (lambda data: data.pop("rows"), "rows"),
        (lambda data: data.update(surplus=1), "surplus"),
    ],
)
def test_open_edited_manifest_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    store = write_store(tmp_path / "store")
    edit_manifest(store, change)
    with pytest.raises(StoreError, match=message):
        TokenStore.open(store)


def test_open_half_manifest_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    (store / "manifest.json").write_text('{"format_version": 1')
    with pytest.raises(StoreError, match=r"manifest\.json: not a manifest"):
        TokenStore.open(store)


def test_split_shard_of_other_length_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store")

    def shift_count(data: dict[str, Any]) -> None:
        first, second = data["splits"]["train"]["shards"]
        first["documents"], second["documents"] = 3, 2

    edit_manifest(path, shift_count)
    with pytest.raises(StoreError, match=r"train-00000\.arrow: has 2 documents"):
        TokenStore.open(path).split("train").tokens(0, 1)


def test_compare_fingerprint_equal_inputs_pass(tmp_path: Path) -> None:
    check_fingerprint(Place.local(tmp_path), INPUTS, json.loads(json.dumps(INPUTS)))


def test_compare_fingerprint_stale_store_names_field_and_both_values(tmp_path: Path) -> None:
    wanted = json.loads(json.dumps(INPUTS))
    wanted["sources"][1]["hash"] = "blake3:22"
    wanted["tokenizer"]["eos_id"] = None
    with pytest.raises(StoreError) as caught:
        check_fingerprint(Place.local(tmp_path), INPUTS, wanted)
    message = str(caught.value)
    assert "data.sources.1: b.txt: its content changed (BLAKE3 11 -> BLAKE3 22)" in message
    assert "data.eos: id after each document: 2 -> None" in message
    assert "sources.0" not in message


def test_source_ranges_cover_the_stream_without_gap(tmp_path: Path) -> None:
    """Two shards of one source between those of two others, one of which has none here."""
    shards: list[Shard] = []
    for number, source in enumerate([0, 2, 2, 3]):
        with ShardWriter(tmp_path / f"{number}.arrow", "uint16", source=source) as writer:
            writer.write([7] * (number + 1), 1, number, 0)
        assert writer.shard is not None
        shards.append(writer.shard)
    split = TokenSplit(Place.local(tmp_path), SplitManifest.from_shards(shards))
    assert split.source_ranges() == {0: range(1), 2: range(1, 6), 3: range(6, 10)}
    assert split.source_documents() == {0: range(1), 2: range(1, 3), 3: range(3, 4)}


@given(
    files=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=4),
    data=st.data(),
)
def test_documents_and_files_are_found_by_number(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], data: st.DataObject
) -> None:
    """Files of documents of given sizes, in small batches, one shard for two files."""
    folder = tmp_path_factory.mktemp("split")
    shards: list[Shard] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "_BATCH_DOCUMENTS", 4)
        for first in range(0, len(files), 2):
            with ShardWriter(folder / f"{first}.arrow", "uint16", source=0) as writer:
                for number, sizes in enumerate(files[first : first + 2], start=first):
                    for size in sizes:
                        writer.write([7] * size, 1, number, 0)
            assert writer.shard is not None
            shards.append(writer.shard)
    split = TokenSplit(Place.local(folder), SplitManifest.from_shards(shards))
    sizes = [size for file in files for size in file]
    starts = np.cumsum([0, *sizes])
    numbers = np.array(data.draw(st.lists(st.integers(0, len(sizes)), max_size=9)), dtype=np.int64)
    assert split.token_starts(numbers).tolist() == starts[numbers].tolist()
    file_of = [number for number, file in enumerate(files) for _ in file]
    start = data.draw(st.integers(0, len(sizes) - 1))
    stop = data.draw(st.integers(start + 1, len(sizes)))
    expected = [n for n in range(start, stop) if n == start or file_of[n] != file_of[n - 1]]
    assert split.file_starts(range(start, stop)).tolist() == expected


@pytest.mark.parametrize("number", [-1, 6])
def test_token_starts_outside_the_split_is_refused(tmp_path: Path, number: int) -> None:
    split = TokenSplit(Place.local(tmp_path), write_shards(tmp_path, DOCUMENTS, [2, 3]))
    with pytest.raises(IndexError, match=str(number)):
        split.token_starts(np.array([0, number]))
