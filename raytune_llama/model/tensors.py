"""The weights of a model directory as a stream: one tensor in memory at a time.

    weights = open_weights(directory)                 # safetensors, or PyTorch's .bin
    with WeightsWriter(folder, weights.specs, max_shard_bytes=5 << 30) as writer:
        for name in weights.specs:
            writer.write(name, weights.read(name))

Files are read, not memory-mapped: mapped pages count as the process's memory, and hide how much it
needs. The format is safetensors' (https://github.com/huggingface/safetensors): eight bytes with the
length of a JSON header, the header, then the tensors without gaps.
"""

import ctypes
import json
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import torch
from torch import Tensor

from raytune_llama.config.errors import UserError
from raytune_llama.storage.files import parse_json, sync
from raytune_llama.storage.hashes import hash_bytes

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the pointer file that Git LFS leaves in place of the real one."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """The dtype and shape of a tensor."""

    dtype: torch.dtype
    """Type of the elements."""
    shape: tuple[int, ...]
    """Size of each dimension."""

    @property
    def num_bytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Size of a row, an element of the first dimension, in bytes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Weights(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors, by name, in file order."""
        ...

    def read(self, name: str) -> Tensor:
        """Read a tensor into its own memory, on the CPU."""
        ...


class SafetensorsFile:
    """A single safetensors file."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ValueError: The file is not a safetensors file, is truncated, or is a Git LFS pointer.
        """
        self.path = path
        with path.open("rb") as file:
            refuse_lfs_pointer(path, file)
            header, self._start = _read_header(path, file)
        self._ends: dict[str, tuple[int, int]] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        try:
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                self.specs[name] = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
                start, stop = entry["data_offsets"]
                self._ends[name] = (start, stop)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: has an invalid or unsupported header ({error!r})") from None
        _check_extent(path, self._start, self._ends, self.specs)

    def read(self, name: str) -> Tensor:
        """See `Weights.read`."""
        shape = self.specs[name].shape
        return self._read(name, 0, shape)

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, from a start to a stop, into their own memory."""
        spec = self.specs[name]
        first = rows.start * spec.row_bytes
        return self._read(name, first, (rows.stop - rows.start, *spec.shape[1:]))

    def _read(self, name: str, offset: int, shape: tuple[int, ...]) -> Tensor:
        read = torch.empty(shape, dtype=self.specs[name].dtype)
        view = bytes_of(read)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self._ends[name][0] + offset)
            while view:
                num_bytes = file.readinto(view)
                if not num_bytes:
                    raise UserError(f"{self.path}: is truncated inside {name}; fetch it again")
                view = view[num_bytes:]
        return read


class PickledFile:
    """A single PyTorch file (.bin or .pth); only tensors are unpickled, never code."""

    def __init__(self, path: Path) -> None:
        """Open the file; its tensors are memory-mapped.

        Raises:
            ValueError: The file is not a PyTorch file, is truncated, holds more than tensors, or is
                a Git LFS pointer.
        """
        self.path = path
        self._tensors = load_pickled(path)
        self.specs = {
            name: TensorSpec(tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """See `Weights.read`."""
        return self._tensors[name].clone()

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, from a start to a stop, into their own memory."""
        return self._tensors[name][rows].clone()


class ShardedWeights:
    """The weights of several files, read as one."""

    def __init__(self, files: Mapping[Path, SafetensorsFile | PickledFile]) -> None:
        """Collect the tensors of the files.

        Raises:
            ValueError: A tensor is in more than one file.
        """
        self.files = list(files)
        self.specs: dict[str, TensorSpec] = {}
        self._where: dict[str, SafetensorsFile | PickledFile] = {}
        for file in files.values():
            for name, spec in file.specs.items():
                if name in self._where:
                    other = self._where[name].path
                    raise UserError(f"{file.path}: {name} is also in {other}; keep one of them")
                self.specs[name] = spec
                self._where[name] = file

    def read(self, name: str) -> Tensor:
        """See `Weights.read`."""
        return self._where[name].read(name)

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, from a start to a stop, into their own memory."""
        return self._where[name].read_rows(name, rows)


def open_weights(directory: Path, *, what: str = "model") -> ShardedWeights:
    """Open the weights of a model directory: safetensors, or otherwise PyTorch's .bin files.

    Args:
        directory: A Hugging Face model directory.
        what: The config field that names it, for errors.

    Raises:
        ValueError: No weights exist, or a file is missing, damaged, or contradicts the index.
    """
    for single, index, kind in (
        (SAFETENSORS, SAFETENSORS_INDEX, SafetensorsFile),
        (PICKLED, PICKLED_INDEX, PickledFile),
    ):
        if (directory / index).is_file():
            return _open_indexed(directory, index, kind, what)
        if (directory / single).is_file():
            path = directory / single
            return ShardedWeights({path: kind(path)})
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{what}: {directory} is an adapter, not a model; name the base that it was trained on"
        )
    raise UserError(
        f"{what}: {directory} has no weights, none of {SAFETENSORS}, {SAFETENSORS_INDEX}, "
        f"{PICKLED}, {PICKLED_INDEX}; name a Hugging Face model directory"
    )


def _open_indexed(
    directory: Path, index: str, kind: type[SafetensorsFile] | type[PickledFile], what: str
) -> ShardedWeights:
    content = parse_json((directory / index).read_bytes(), str(directory / index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{what}: {directory / index} has no weight_map; fetch it again")
    paths = [directory / name for name in dict.fromkeys(weight_map.values())]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{what}: {directory} lacks {len(missing)} of the {len(paths)} files that {index} "
            f"names, the first is {missing[0]}; fetch them"
        )
    weights = ShardedWeights({path: kind(path) for path in paths})
    lacking = sorted(set(weight_map) - set(weights.specs))
    if lacking:
        raise UserError(
            f"{what}: {index} names {len(lacking)} tensors that no file holds, the first is "
            f"{lacking[0]}; files and index belong to different models"
        )
    return weights


def load_pickled(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a PyTorch file, memory-mapped; no code in it is run.

    Raises:
        ValueError: The file is not a PyTorch file, is truncated, holds more than tensors, or is a
            Git LFS pointer.
    """
    with path.open("rb") as file:
        refuse_lfs_pointer(path, file)
    try:
        content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors and was not loaded, since that could run code "
            f"({str(error).splitlines()[0]})"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: is damaged or truncated ({error}); fetch it again") from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: is not a dictionary of tensors; name a weights file")
    return content


def refuse_lfs_pointer(path: Path, file: BinaryIO) -> None:
    """Raise `ValueError` if a file is only a Git LFS pointer; otherwise rewind it."""
    if file.read(len(LFS_POINTER)) == LFS_POINTER:
        raise UserError(f"{path}: is a Git LFS pointer, not the file; run git lfs pull there")
    file.seek(0)


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < size <= _MAX_HEADER_BYTES:
        raise UserError(f"{path}: is not a safetensors file; fetch it again")
    data = file.read(size)
    if len(data) < size:
        raise UserError(f"{path}: is truncated inside its header; fetch it again")
    header = parse_json(data, str(path))
    if not isinstance(header, dict):
        raise UserError(  # the file is wrong, not an argument's type
            f"{path}: is not a safetensors file; fetch it again"
        )
    return header, 8 + size


def _check_extent(
    path: Path, start: int, ends: Mapping[str, tuple[int, int]], specs: Mapping[str, TensorSpec]
) -> None:
    position = 0
    for name, (first, stop) in ends.items():
        if first != position or stop - first != specs[name].num_bytes:
            raise UserError(f"{path}: its header is inconsistent at {name}; fetch it again")
        position = stop
    size = path.stat().st_size
    if size != start + position:
        raise UserError(
            f"{path}: has {size} bytes, but its header requires {start + position}; fetch it again"
        )


class WeightsWriter(AbstractContextManager["WeightsWriter"]):
    """Writes `model*.safetensors` and the index, one tensor at a time, in the order of `specs`."""

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        *,
        max_shard_bytes: int,
    ) -> None:
        """Plan the files.

        Args:
            folder: Directory to write to; it must exist.
            specs: All tensors, in the order of the calls to `write`.
            max_shard_bytes: Maximum size of a file, unless one tensor is larger.
        """
        self._folder = folder
        self._specs = dict(specs)
        self._files = plan_files(self._specs, max_shard_bytes)
        self._order: Iterator[tuple[str, str]] = (
            (file, name) for file, names in self._files.items() for name in names
        )
        self._open: BinaryIO | None = None

    def write(self, name: str, tensor: Tensor) -> str:
        """Append the next tensor; return the hash of its bytes."""
        file, expected = next(self._order)
        spec = self._specs[name]
        assert name == expected, f"got {name}, expected {expected}"
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name
        if self._open is None or self._open.name != str(self._folder / file):
            self._open = self._start_file(file)
        data = bytes_of(tensor.detach().contiguous())
        self._open.write(data)
        return hash_bytes(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._end_file()
        if kind is None:
            assert next(self._order, None) is None, "tensors are missing"
            write_index(self._folder, self._specs, self._files)

    def _start_file(self, file: str) -> BinaryIO:
        self._end_file()
        opened = (self._folder / file).open("wb")
        opened.write(safetensors_header({name: self._specs[name] for name in self._files[file]}))
        return opened

    def _end_file(self) -> None:
        if self._open is not None:
            self._open.close()
            sync(Path(self._open.name))
            self._open = None


class ShardFile(AbstractContextManager["ShardFile"]):
    """A new safetensors file whose tensors are written and read back by rows, in any order.

    Threads may write different tensors at once. The file is not synced.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Write the header of a file with these tensors, in this order."""
        self._specs = dict(specs)
        self._starts: dict[str, int] = {}
        header = safetensors_header(specs)
        position = len(header)
        for name, spec in specs.items():
            self._starts[name] = position
            position += spec.num_bytes
        self._file = path.open("x+b", buffering=0)
        self._file.write(header)
        self._file.truncate(position)

    def write_rows(self, name: str, start: int, values: Tensor) -> None:
        """Write rows of a tensor, from row `start` on."""
        view, offset = bytes_of(values.contiguous()), self._offset(name, start)
        while view:
            num_bytes = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[num_bytes:], offset + num_bytes

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Read rows of a tensor back from the file."""
        spec = self._specs[name]
        read = torch.empty((rows.stop - rows.start, *spec.shape[1:]), dtype=spec.dtype)
        view, offset = bytes_of(read), self._offset(name, rows.start)
        while view:
            num_bytes = os.preadv(self._file.fileno(), [view], offset)
            assert num_bytes, f"{self._file.name}: is truncated inside {name}"
            view, offset = view[num_bytes:], offset + num_bytes
        return read

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._file.close()

    def _offset(self, name: str, row: int) -> int:
        return self._starts[name] + row * self._specs[name].row_bytes


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def plan_files(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> dict[str, list[str]]:
    """Return the tensor names of each file that `WeightsWriter` writes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.num_bytes
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def write_index(folder: Path, specs: Mapping[str, TensorSpec], files: dict[str, list[str]]) -> None:
    """Write the index of a sharded model; a single file has none."""
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in specs.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def safetensors_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return the header of a safetensors file with these tensors, length prefix included."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in specs.items():
        stop = position + spec.num_bytes
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def release_free_memory() -> None:
    """Make glibc return free pages to the system; do nothing on other platforms.

    After tensors of many sizes it keeps a third more than is in use, and peak memory would depend
    on their order.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
