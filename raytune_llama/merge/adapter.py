"""An adapter as a change of weights: which weights it changes, and how.

    adapter = Adapter.open(path)
    changed = adapter.apply_update(name, weight, rows)      # float32, some rows of a weight

Read straight from PEFT's files, whatever version wrote them: adapter_model.safetensors or .bin,
keys with or without `.default`. W becomes W + s B A with s = alpha / r, or alpha / sqrt(r) with
rsLoRA (arXiv:2312.03732); with DoRA (arXiv:2402.09353) each row of that is scaled to its learned
magnitude; a fully trained module replaces the base's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_llama.config.errors import UserError
from raytune_llama.model.tensors import PickledFile, SafetensorsFile, TensorSpec
from raytune_llama.storage.files import read_json

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_WRAPPERS = (".modules_to_save", ".base_layer")
"""Names that PEFT inserts between a module's name and its weight's."""
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq")
"""Initializations that modify the base, so that it differs from the one on disk."""


@dataclass(kw_only=True)
class LowRankUpdate:
    """The low-rank update of one weight: keys of its tensors in the file, and its scale."""

    keys: dict[str, str] = field(default_factory=dict)
    """Keys by part: a and b, or embedding_a and embedding_b, and magnitude with DoRA."""
    scale: float = 0.0
    """The scale s of s B A."""

    @property
    def is_embedding(self) -> bool:
        """Whether it updates an embedding table."""
        return "embedding_a" in self.keys


class Adapter:
    """A LoRA adapter in a directory written by PEFT."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        file: SafetensorsFile | PickledFile,
        prefix: str = "",
    ) -> None:
        """Sort the file's tensors by the weights they change; see `open`."""
        self.path = path
        self.settings = settings
        self.low_rank: dict[str, LowRankUpdate] = {}
        self.replaced: dict[str, str] = {}
        self._file = file
        self._prefix = prefix
        self._transposed = bool(settings.get("fan_in_fan_out"))
        for key in file.specs:
            self._sort(key)
        for name, update in self.low_rank.items():
            self._check(name, update)
        # One weight at a time is changed, by rows.
        self._factors = lru_cache(maxsize=1)(self._read_factors)

    @classmethod
    def open(cls, path: Path, prefix: str = "") -> "Adapter":
        """Read an adapter's settings and the header of its weights.

        Args:
            path: Directory of the adapter.
            prefix: Prefix of its names that the base's files lack; see `BaseWeightNames`.

        Raises:
            ValueError: It is not an adapter, or its effect is not W + s B A; or files are missing,
                damaged, or contradict each other.
        """
        if not (path / ADAPTER_CONFIG_FILE).is_file():
            raise UserError(
                f"adapters: {path} has no {ADAPTER_CONFIG_FILE}; set a directory written by PEFT"
            )
        settings = read_json(path / ADAPTER_CONFIG_FILE)
        files = [path / name for name in ADAPTER_WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise UserError(f"adapters: {path} has none of {', '.join(ADAPTER_WEIGHT_FILES)}")
        _refuse_unknown(path, settings)
        kind = SafetensorsFile if files[0].suffix == ".safetensors" else PickledFile
        adapter = cls(path, settings, kind(files[0]), prefix)
        if not adapter.low_rank and not adapter.replaced:
            raise UserError(
                f"adapters: {files[0]} contains no tensors, so that merging it would change "
                "nothing; it was saved by a PEFT version that does not match the training code: "
                "train again, or recover the weights from a checkpoint"
            )
        return adapter

    @property
    def weight_names(self) -> set[str]:
        """Names of the weights that the adapter changes, as in the base."""
        return set(self.low_rank) | set(self.replaced)

    def spec(self, name: str) -> TensorSpec:
        """Return the type and shape of a fully trained weight that replaces the base's."""
        return self._file.specs[self.replaced[name]]

    def read_replaced(self, name: str) -> Tensor:
        """Read a fully trained weight that replaces the base's."""
        return self._file.read(self.replaced[name])

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape of the weight that a low-rank update applies to."""
        keys = self.low_rank[name].keys
        if self.low_rank[name].is_embedding:
            rows = self._file.specs[keys["embedding_a"]].shape[1]
            return rows, self._file.specs[keys["embedding_b"]].shape[0]
        rows, columns = self._file.specs[keys["b"]].shape[0], self._file.specs[keys["a"]].shape[1]
        return (columns, rows) if self._transposed else (rows, columns)

    def delta(self, name: str, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return s B A for some rows of a weight, before DoRA's scaling."""
        left, right, _ = self._factors(name)
        return (left[rows].to(dtype) @ right.to(dtype)) * self.low_rank[name].scale

    def absolute_delta(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return s |B| |A|, to which the rounding error of `delta` is relative."""
        left, right, _ = self._factors(name)
        sizes = left[rows].abs().to(dtype) @ right.abs().to(dtype)
        return sizes.mul_(abs(self.low_rank[name].scale))

    def apply_update(self, name: str, weight: Tensor, rows: slice) -> Tensor:
        """Apply the low-rank update to some rows of a weight, in the type of `weight`."""
        return self.apply_dora_magnitudes(name, weight + self.delta(name, rows, weight.dtype), rows)

    def apply_dora_magnitudes(self, name: str, updated: Tensor, rows: slice) -> Tensor:
        """Scale the rows of W + s B A to DoRA's magnitudes; without DoRA, return them unchanged."""
        magnitude = self._factors(name)[2]
        if magnitude is None:
            return updated
        learned = magnitude[rows].to(updated.dtype)
        return updated * (learned / torch.linalg.vector_norm(updated, dim=1))[:, None]

    def _sort(self, key: str) -> None:
        name = key.removeprefix(_PREFIX).removeprefix(self._prefix).replace(".default", "")
        for ending, part in _PARTS.items():
            if name.endswith(f".{ending}"):
                weight = name.removesuffix(ending) + "weight"
                self.low_rank.setdefault(weight, LowRankUpdate()).keys[part] = key
                return
        if ".lora_" in name:
            raise UserError(f"adapters: {self._file.path}: unsupported LoRA tensor {key}")
        if ".original_module." in name:
            return  # the table before training, which PEFT saves as well if it was resized
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        self.replaced[name] = key

    def _check(self, name: str, update: LowRankUpdate) -> None:
        """Check that the tensors of an update belong together, and compute its scale."""
        where = f"adapters: {self._file.path}: {name.removesuffix('.weight')}"
        pair = ("embedding_a", "embedding_b") if update.is_embedding else ("a", "b")
        if not all(part in update.keys for part in pair):
            raise UserError(f"{where}: A or B is missing; the file is incomplete")
        if ("magnitude" in update.keys) != bool(self.settings.get("use_dora")):
            raise UserError(f"{where}: use_dora of {ADAPTER_CONFIG_FILE} contradicts the weights")
        first, second = (self._file.specs[update.keys[part]].shape for part in pair)
        full_name = self._prefix + name  # as in PEFT's patterns
        rank = _by_pattern(self.settings, "rank_pattern", full_name, self.settings["r"])
        if not first[0] == second[1] == rank:
            raise UserError(
                f"{where}: A is {list(first)}, B is {list(second)}, and {ADAPTER_CONFIG_FILE} says "
                f"rank {rank}; the files are of different adapters"
            )
        alpha = _by_pattern(self.settings, "alpha_pattern", full_name, self.settings["lora_alpha"])
        update.scale = alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read the factors, oriented so that left @ right is the update, and DoRA's magnitudes."""
        update = self.low_rank[name]
        if update.is_embedding:
            first = self._file.read(update.keys["embedding_a"]).float()
            second = self._file.read(update.keys["embedding_b"]).float()
            left, right = first.T, second.T
        else:
            first = self._file.read(update.keys["a"]).float()
            second = self._file.read(update.keys["b"]).float()
            left, right = (first.T, second.T) if self._transposed else (second, first)
        key = update.keys.get("magnitude")
        return left, right, None if key is None else self._file.read(key).float().reshape(-1)


def _by_pattern(settings: Mapping[str, Any], field_name: str, weight: str, default: Any) -> Any:  # noqa: ANN401  # JSON's numbers
    """Return the value of a setting for a module, matching patterns as PEFT does."""
    module = weight.removesuffix(".weight")
    for pattern, value in (settings.get(field_name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _refuse_unknown(path: Path, settings: Mapping[str, Any]) -> None:
    """Reject an adapter whose effect is not W + s B A."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"adapters: {path} has peft_type {kind}, but only LORA can be merged")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float):
            problem = (
                f"adapters: {path / ADAPTER_CONFIG_FILE}: {name} is missing; the file is incomplete"
            )
            raise UserError(problem)  # the file is wrong, not an argument's type
    for name in ("lora_bias", "layer_replication", "megatron_config", "arrow_config"):
        if settings.get(name):
            raise UserError(
                f"adapters: {path / ADAPTER_CONFIG_FILE}: {name} cannot be merged here; use PEFT"
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise UserError(
            f"adapters: {path / ADAPTER_CONFIG_FILE}: init_lora_weights {start!r} modified the "
            "base before training; convert it to a plain LoRA with PEFT first"
        )
