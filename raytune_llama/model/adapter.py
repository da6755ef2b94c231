"""An adapter as a change of weights: which weights it changes, and how.

    adapter = Adapter.open(path)
    changed = adapter.apply_update(name, weight, rows)      # float32, some rows of a weight

The only reader of adapter directories, for training on, merging and serving. It reads PEFT's files,
whatever version wrote them: adapter_model.safetensors or .bin, keys with or without `.default`.
Every tensor of the file is used, known to have no effect, or refused; whether the file holds all
that its config promises for a base is checked by `model.lora.check_adapter_fits`.

W becomes W + s B A with s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732); with DoRA
(arXiv:2402.09353) each row of that is scaled to its learned magnitude; a fully trained module or
bias replaces the base's; so do trained rows of an embedding table (`trainable_token_indices`).
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
from raytune_llama.model.adapter_config import ADAPTER_CONFIG_FILE, read_adapter_config
from raytune_llama.model.tensors import PickledFile, SafetensorsFile, TensorSpec

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
_ROWS_KEY = ".token_adapter.trainable_tokens_delta"
"""End of the key of trained rows of an embedding table, in place of `.weight`."""


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
        prefix: str,
        field: str,
    ) -> None:
        """Sort the file's tensors by the weights they change; see `open`."""
        self.path = path
        """Directory of the adapter."""
        self.settings = settings
        """Its adapter_config.json."""
        self.low_rank: dict[str, LowRankUpdate] = {}
        """Low-rank updates by the name of the weight."""
        self.replaced: dict[str, str] = {}
        """Keys of the tensors that replace a weight or bias, by its name."""
        self.token_rows: dict[str, str] = {}
        """Keys of the tensors that replace rows of an embedding table, by its name."""
        self._twins: list[tuple[str, str]] = []
        self._where = f"{field}: {file.path}"
        self._file = file
        self._prefix = prefix
        for key in file.specs:
            self._sort(key)
        self._check_not_empty()
        for name, update in self.low_rank.items():
            self._check(name, update)
        for name, key in self.token_rows.items():
            self._check_token_rows(name, key)
        # A few weights at a time are changed, by rows.
        self.factors = lru_cache(maxsize=4)(self._read_factors)
        self._trained_rows = lru_cache(maxsize=4)(self._file.read)

    @classmethod
    def open(cls, path: Path, prefix: str = "", *, field: str = "adapters") -> "Adapter":
        """Read an adapter's settings and the header of its weights.

        Args:
            path: Directory of the adapter.
            prefix: Prefix of its names that the base's files lack; see `BaseWeightNames`.
            field: Config field that names the directory, for errors.

        Raises:
            ValueError: It is not a LoRA adapter, or its effect is not implemented; or files are
                missing, damaged, or contradict each other.
        """
        settings = read_adapter_config(path, field)
        files = [path / name for name in ADAPTER_WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise UserError(f"{field}: {path} has none of {', '.join(ADAPTER_WEIGHT_FILES)}")
        kind = SafetensorsFile if files[0].suffix == ".safetensors" else PickledFile
        return cls(path, settings, kind(files[0]), prefix, field)

    @property
    def file(self) -> Path:
        """File of its weights."""
        return self._file.path

    @property
    def max_rank(self) -> int:
        """Largest rank of its low-rank updates; 0 if it has none."""
        shapes = [
            self._file.specs[update.keys["embedding_a" if update.is_embedding else "a"]].shape
            for update in self.low_rank.values()
        ]
        return max((shape[0] for shape in shapes), default=0)

    @property
    def has_plain_updates(self) -> bool:
        """Whether all that it does, besides replacing weights, is to add s B A to linear layers."""
        plain = all(set(update.keys) == {"a", "b"} for update in self.low_rank.values())
        return plain and not self.token_rows

    def check_values(self) -> None:
        """Read every tensor and refuse values that are not finite, or contradict each other.

        Raises:
            ValueError: A tensor holds NaN or infinite values, or a weight is saved twice with
                different values; names it.
        """
        for one, other in self._twins:
            if not torch.equal(self._file.read(one), self._file.read(other)):
                raise UserError(f"{self._where}: {one} and {other} differ, but are the same weight")
        for key in self._file.specs:
            if not bool(self._file.read(key).isfinite().all()):
                raise UserError(
                    f"{self._where}: {key} holds values that are not finite; the training diverged"
                )

    def read_state(self) -> dict[str, Tensor]:
        """Read all tensors that have an effect, by the keys that today's PEFT gives them."""
        return {self.peft_key(key): self._file.read(key) for key in self._used()}

    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what `read_state` reads."""
        return {self.peft_key(key): self._file.specs[key].shape for key in self._used()}

    @staticmethod
    def peft_key(key: str) -> str:
        """Return the key that today's PEFT gives a tensor."""
        key = key.replace(".default", "").replace(".modules_to_save", "")
        return key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")

    def _used(self) -> list[str]:
        parts = [key for update in self.low_rank.values() for key in update.keys.values()]
        return [*parts, *self.replaced.values(), *self.token_rows.values()]

    @property
    def weight_names(self) -> set[str]:
        """Names of the weights that the adapter changes, as in the base."""
        return {*self.low_rank, *self.replaced, *self.token_rows}

    def updates(self, name: str) -> bool:
        """Whether it changes a weight without replacing all of it."""
        return name in self.low_rank or name in self.token_rows

    def token_ids(self, name: str) -> list[int]:
        """Return the rows of an embedding table that it replaces, in the order of its tensor."""
        given = self.settings.get("trainable_token_indices") or []
        module = (self._prefix + name).removesuffix(".weight")
        if isinstance(given, dict):
            given = next((ids for end, ids in given.items() if module.endswith(end)), [])
        return [int(row) for row in given]

    def spec(self, name: str) -> TensorSpec:
        """Return the type and shape of a fully trained weight that replaces the base's."""
        return self._file.specs[self.replaced[name]]

    def read_replaced(self, name: str) -> Tensor:
        """Read a fully trained weight that replaces the base's."""
        return self._file.read(self.replaced[name])

    def read_replaced_rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows of a fully trained weight that replaces the base's."""
        return self._file.read_rows(self.replaced[name], rows)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an update applies to a weight of a shape."""
        if name in self.low_rank:
            return self.shape(name) == shape
        columns = self._file.specs[self.token_rows[name]].shape[1]
        return columns == shape[1] and max(self.token_ids(name)) < shape[0]

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape of the weight that a low-rank update applies to."""
        keys = self.low_rank[name].keys
        if self.low_rank[name].is_embedding:
            rows = self._file.specs[keys["embedding_a"]].shape[1]
            return rows, self._file.specs[keys["embedding_b"]].shape[0]
        return self._file.specs[keys["b"]].shape[0], self._file.specs[keys["a"]].shape[1]

    def delta(self, name: str, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return s B A for some rows of a weight, before DoRA's scaling."""
        left, right, _ = self.factors(name)
        return (left[rows].to(dtype) @ right.to(dtype)) * self.low_rank[name].scale

    def absolute_delta(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return s |B| |A|, to which the rounding error of `delta` is relative."""
        left, right, _ = self.factors(name)
        sizes = left[rows].abs().to(dtype) @ right.abs().to(dtype)
        return sizes.mul_(abs(self.low_rank[name].scale))

    def apply_update(self, name: str, weight: Tensor, rows: slice) -> Tensor:
        """Apply the update to some rows of a weight, in the type of `weight`."""
        if name in self.token_rows:
            return self.replace_token_rows(name, weight, rows)
        return self.apply_dora_magnitudes(name, weight + self.delta(name, rows, weight.dtype), rows)

    def replace_token_rows(self, name: str, weight: Tensor, rows: slice) -> Tensor:
        """Return some rows of an embedding table with the trained ones among them replaced."""
        trained, changed = self._trained_rows(self.token_rows[name]), weight.clone()
        for number, row in enumerate(self.token_ids(name)):
            if rows.start <= row < rows.stop:
                changed[row - rows.start] = trained[number].to(weight.dtype)
        return changed

    def apply_dora_magnitudes(self, name: str, updated: Tensor, rows: slice) -> Tensor:
        """Scale the rows of W + s B A to DoRA's magnitudes; without DoRA, return them unchanged."""
        magnitude = self.factors(name)[2]
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
        if name.endswith(_ROWS_KEY):
            self.token_rows[name.removesuffix(_ROWS_KEY) + ".weight"] = key
            return
        if ".original_module." in name:
            return  # the table before training, which PEFT saves as well if it was resized
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        is_weight = name.endswith((".weight", ".bias")) and ".lora_" not in name
        if not key.startswith(_PREFIX) or not is_weight:
            raise UserError(f"{self._where}: the tensor {key} is of no kind that is supported here")
        if name in self.replaced:
            # PEFT saves a table that was resized and trained under both names.
            self._twins.append((self.replaced[name], key))
            key = min(self.replaced[name], key, key=len)
        self.replaced[name] = key

    def _check_not_empty(self) -> None:
        empty = [key for key, spec in self._file.specs.items() if 0 in spec.shape]
        if empty:
            raise UserError(
                f"{self._where}: {len(empty)} of {len(self._file.specs)} tensors are empty, such "
                f"as {empty[0]}: it was saved under ZeRO 3 without gathering the weights; export "
                "it again from a checkpoint"
            )
        if not self.weight_names:
            raise UserError(
                f"{self._where} contains no tensors, so that it would change nothing; it was saved "
                "by a PEFT version that does not match the training code: train again, or recover "
                "the weights from a checkpoint"
            )

    def _check_token_rows(self, name: str, key: str) -> None:
        """Check that trained rows are listed in the config, and changed by nothing else."""
        shape, rows = self._file.specs[key].shape, self.token_ids(name)
        where = f"{self._where}: {name.removesuffix('.weight')}"
        if len(shape) != 2 or shape[0] != len(rows):
            raise UserError(
                f"{where}: {key} has shape {list(shape)}, but trainable_token_indices of "
                f"{ADAPTER_CONFIG_FILE} lists {len(rows)} rows for it"
            )
        if name in self.low_rank or name in self.replaced:
            raise UserError(f"{where}: both trained rows and another change are not supported")

    def _check(self, name: str, update: LowRankUpdate) -> None:
        """Check that the tensors of an update belong together, and compute its scale."""
        where = f"{self._where}: {name.removesuffix('.weight')}"
        pair = ("embedding_a", "embedding_b") if update.is_embedding else ("a", "b")
        if not all(part in update.keys for part in pair):
            raise UserError(f"{where}: A or B is missing; the file is incomplete")
        if "magnitude" in update.keys and update.is_embedding:
            raise UserError(
                f"{where}: use_dora of an embedding is not supported; merge the adapter with PEFT"
            )
        if ("magnitude" in update.keys) != bool(self.settings.get("use_dora")):
            raise UserError(f"{where}: use_dora of {ADAPTER_CONFIG_FILE} contradicts the weights")
        first, second = (self._file.specs[update.keys[part]].shape for part in pair)
        if len(first) != 2 or len(second) != 2:
            raise UserError(f"{where}: A is {list(first)} and B {list(second)}, not matrices")
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
            left, right = second, first
        key = update.keys.get("magnitude")
        return left, right, None if key is None else self._file.read(key).float().reshape(-1)


def _by_pattern(settings: Mapping[str, Any], field_name: str, weight: str, default: Any) -> Any:  # noqa: ANN401  # JSON's numbers
    """Return the value of a setting for a module, matching patterns as PEFT does."""
    module = weight.removesuffix(".weight")
    for pattern, value in (settings.get(field_name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
