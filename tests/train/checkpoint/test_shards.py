"""Promise: slices of any workers are the whole state, and any range of it can be read again."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint import shards as slices
from raytune_llama.train.checkpoint.layout import CheckpointError
from raytune_llama.train.checkpoint.shards import SliceReader, merge_worker_manifests, write_slices
from raytune_llama.train.engines.protocol import STATE_KEYS, StateSlice, even_ranges

SHAPES = {"a": [3, 5], "b": [1], "norm.c": [40], "d": [2, 3, 4]}


def state_of(name: str, start: int, stop: int) -> StateSlice:
    """Return a stretch of a parameter whose numbers say which they are."""
    whole = torch.arange(100.0) + 1000 * list(SHAPES).index(name)
    return StateSlice(name, start, *(whole[start:stop] + 0.25 * n for n in range(len(STATE_KEYS))))


def held_by(rank: int, world_size: int) -> Iterator[StateSlice]:
    sizes = [prod(shape) for shape in SHAPES.values()]
    for name, (start, stop) in zip(SHAPES, even_ranges(sizes, rank, world_size), strict=True):
        if start < stop:
            yield state_of(name, start, stop)


def write(folder: Path, world_size: int) -> list[dict[str, Any]]:
    place = Place.local(folder)
    return [
        write_slices(held_by(rank, world_size), place, f"rank-{rank}") for rank in range(world_size)
    ]


@given(
    sizes=st.lists(st.integers(0, 50), max_size=12),
    world_size=st.integers(1, 9),
)
def test_even_ranges_give_each_number_to_one_worker_and_as_many_to_each(
    sizes: list[int], world_size: int
) -> None:
    of_ranks = [even_ranges(sizes, rank, world_size) for rank in range(world_size)]
    for tensor, size in enumerate(sizes):
        numbers = [n for ranges in of_ranks for n in range(*ranges[tensor])]
        assert numbers == list(range(size))
    counts = [sum(stop - start for start, stop in ranges) for ranges in of_ranks]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=25)  # each flushes its files to the disk
@given(
    world_size=st.integers(1, 5),
    file_bytes=st.integers(100, 1500),
    name=st.sampled_from(list(SHAPES)),
    edges=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_slice_reader_gives_back_any_range_that_any_workers_wrote(
    world_size: int, file_bytes: int, name: str, edges: tuple[int, int]
) -> None:
    size = prod(SHAPES[name])
    start, stop = sorted(min(edge, size) for edge in edges)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "FILE_BYTES", file_bytes)
        manifest = merge_worker_manifests(write(Path(folder), world_size), SHAPES)
        for file, entry in manifest["files"].items():
            stored = load_file(Path(folder, file))
            assert sum(tensor.nbytes for tensor in stored.values()) <= file_bytes
            assert Path(folder, file).stat().st_size == entry["bytes"]
        wanted = state_of(name, start, stop)
        with SliceReader(Place.local(Path(folder)), manifest, Path("unused")) as reader:
            for part in STATE_KEYS:
                assert torch.equal(reader.read(part, name, start, stop), getattr(wanted, part))


def test_join_parts_lists_shape_and_stretches_of_each_parameter(tmp_path: Path) -> None:
    manifest = merge_worker_manifests(write(tmp_path, 3), SHAPES)
    assert {name: entry["shape"] for name, entry in manifest["tensors"].items()} == SHAPES
    assert {entry["dtype"] for entry in manifest["tensors"].values()} == {"float32"}
    for name, entry in manifest["tensors"].items():
        for stretch in entry["slices"]:
            stored = load_file(tmp_path / stretch["file"])[f"exp_avg/{stretch['key']}"]
            wanted = state_of(name, stretch["start"], stretch["stop"])
            assert torch.equal(stored, wanted.exp_avg)


@pytest.mark.parametrize("kept", [[0, 1], [1, 2], [0, 1, 1, 2]])
def test_join_parts_with_a_gap_or_twice_the_same_is_refused(
    tmp_path: Path, kept: list[int]
) -> None:
    parts = write(tmp_path, 3)
    with pytest.raises(CheckpointError, match="not cover the full tensor"):
        merge_worker_manifests([parts[rank] for rank in kept], SHAPES)
