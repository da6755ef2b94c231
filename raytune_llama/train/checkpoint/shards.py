"""The files of a checkpoint: each worker writes slices of parameters, a reader reads any range.

A file is a safetensors file of bounded size, with the tensors `weight/<key>`, `exp_avg/<key>` and
`exp_avg_sq/<key>` of each of its slices. `merge_worker_manifests` merges the entries of all
workers' files into the manifest of one checkpoint.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from raytune_llama.model.tensors import TensorSpec, safetensors_header
from raytune_llama.storage.hashes import Hasher
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import CheckpointError, local_file_path
from raytune_llama.train.engines.protocol import STATE_KEYS, StateKey, StateSlice

FILE_BYTES = 2 * 2**30
"""Maximum bytes of a file; also the free TMPDIR bytes per worker to save to object storage."""

_BLOCK_BYTES = 8 * 2**20
_ELEMENT_BYTES = len(STATE_KEYS) * torch.float32.itemsize


def write_slices(slices: Iterable[StateSlice], folder: Place, stem: str) -> dict[str, Any]:
    """Write slices into files of bounded size, and return their locations.

    Args:
        slices: slices to write, consumed one file's worth at a time.
        folder: where the files are written and synced; created if missing.
        stem: prefix of the file names.

    Returns:
        `tensors`: the slices of each parameter, each with `file`, `key`, `start` and `stop`;
        `files`: the `bytes` and `hash` of each file.

    Raises:
        OSError: a write failed; files written before it remain.
    """
    tensors: dict[str, list[dict[str, Any]]] = {}
    files: dict[str, dict[str, Any]] = {}
    if folder.is_local:
        folder.path.mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(_groups(slices)):
        file = f"{stem}-{number:05d}.safetensors"
        files[file] = _write_file(group, folder / file)
        for each in group:
            entry = {"file": file, "key": _key(each), "start": each.start, "stop": each.stop}
            tensors.setdefault(each.name, []).append(entry)
    return {"tensors": tensors, "files": files}


def _groups(slices: Iterable[StateSlice]) -> Iterator[list[StateSlice]]:
    """Group slices into files of at most `FILE_BYTES`, splitting those that are larger."""
    most = max(FILE_BYTES // _ELEMENT_BYTES, 1)
    group: list[StateSlice] = []
    room = most
    for each in slices:
        start = each.start
        while start < each.stop:
            if room == 0:
                yield group
                group, room = [], most
            stop = min(start + room, each.stop)
            parts = [
                getattr(each, part)[start - each.start : stop - each.start] for part in STATE_KEYS
            ]
            group.append(StateSlice(each.name, start, *parts))
            start, room = stop, room - (stop - start)
    if group:
        yield group


def _key(one: StateSlice) -> str:
    return f"{one.name}[{one.start}:{one.stop}]"


def _write_file(slices: Sequence[StateSlice], place: Place) -> dict[str, Any]:
    if place.is_local:
        return _write_local(slices, place.path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, place.name)
        entry = _write_local(slices, path)
        place.upload(path)
    return entry


def _write_local(slices: Sequence[StateSlice], path: Path) -> dict[str, Any]:
    hasher, num_bytes = Hasher(), 0
    with path.open("xb") as file:
        for block in _blocks(slices):
            # Both release the GIL, so training continues.
            file.write(block)
            hasher.update(block)
            num_bytes += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "hash": hasher.finish()}


def _blocks(slices: Sequence[StateSlice]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file in blocks."""
    tensors: dict[str, Tensor] = {
        f"{part}/{_key(each)}": getattr(each, part) for each in slices for part in STATE_KEYS
    }
    yield safetensors_header(
        {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    )
    for tensor in tensors.values():
        data = tensor.cpu().contiguous().view(torch.uint8).numpy().data
        for start in range(0, len(data), _BLOCK_BYTES):
            yield data[start : start + _BLOCK_BYTES]


def merge_worker_manifests(
    parts: Iterable[Mapping[str, Any]], shapes: Mapping[str, list[int]]
) -> dict[str, dict[str, Any]]:
    """Merge what each worker has written into the manifest's `tensors` and `files`.

    Args:
        parts: every worker's result of `write_slices`.
        shapes: full shapes of the parameters, by name.

    Raises:
        CheckpointError: the slices of a parameter do not cover each element exactly once.
    """
    slices: dict[str, list[dict[str, Any]]] = {name: [] for name in shapes}
    files: dict[str, Any] = {}
    for part in parts:
        files |= part["files"]
        for name, entries in part["tensors"].items():
            slices[name] += entries
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        entries = sorted(slices[name], key=lambda entry: entry["start"])
        edges = [0, *(entry["stop"] for entry in entries)]
        starts = [*(entry["start"] for entry in entries), torch.Size(shape).numel()]
        if edges != starts:
            raise CheckpointError(
                f"{name} of shape {shape}: the workers' slices end at {edges[1:]} and begin at "
                f"{starts[:-1]}, which do not cover the full tensor exactly once; remove keys of "
                "engine.deepspeed that change how parameters are partitioned"
            )
        tensors[name] = {"shape": shape, "dtype": "float32", "slices": entries}
    return {"tensors": tensors, "files": files}


class SliceReader(contextlib.AbstractContextManager["SliceReader"]):
    """Reads ranges of parameters from the files of a checkpoint."""

    def __init__(self, path: Place, manifest: Mapping[str, Any], copies: Path) -> None:
        """Prepare to read; files are opened on first use.

        Args:
            path: The checkpoint, already verified.
            manifest: Its manifest.
            copies: Local folder for copies of its files, if it is in object storage.
        """
        self._path, self._manifest, self._copies = path, manifest, copies
        self._open: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, part: StateKey, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a parameter's weight or moment; see `ReadState`."""
        values = torch.empty(stop - start)
        for entry in self._manifest["tensors"][name]["slices"]:
            first, last = max(start, entry["start"]), min(stop, entry["stop"])
            if first < last:
                stored = self._file(entry["file"]).get_slice(f"{part}/{entry['key']}")
                found = stored[first - entry["start"] : last - entry["start"]]
                values[first - start : last - start] = found
        return values

    def _file(self, name: str) -> Any:  # noqa: ANN401  # safetensors exports no type for it
        if name not in self._open:
            path = local_file_path(self._path, name, self._manifest["files"][name], self._copies)
            self._open[name] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[name]
