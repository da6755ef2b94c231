"""Convert a model directory to Meta's `consolidated.*.pth`, one tensor in memory at a time.

PyTorch saves a dictionary only in one call, so each shard is first written as a raw file, which is
memory-mapped and saved.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from raytune_llama.config.errors import UserError
from raytune_llama.model.meta.from_meta import TOKENIZER
from raytune_llama.model.meta.layout import (
    PARAMS,
    ROPE_FREQUENCIES,
    MetaParams,
    MetaTensor,
    build_meta_params,
    check_num_shards,
    check_target,
    expected_shape,
    meta_tensors,
    shard_ranges,
    to_interleaved_rows,
)
from raytune_llama.model.tensors import TensorSpec, Weights, open_weights
from raytune_llama.storage.files import publish_directory, read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetaModelSpec:
    """A model to be written in Meta's format."""

    config: LlamaConfig
    """The model's transformers config."""
    params: MetaParams
    """The model's params.json."""
    tensors: list[MetaTensor]
    """All weights, in transformers' order."""
    kept: Mapping[str, Any]
    """Values kept from the Meta files that the model was converted from; empty if it was not."""


def convert_to_meta(source: Path, target: Path, *, num_shards: int) -> None:
    """Write `consolidated.*.pth`, `params.json` and `tokenizer.model`.

    Args:
        source: Model directory of a LLaMA.
        target: Output directory; it must be new or empty.
        num_shards: Number of files; Meta published 1, 2, 4 or 8.

    Raises:
        ValueError: Meta's format cannot hold the model, or not in this number of shards; files are
            missing or damaged; the target is not empty.
    """
    check_target(target)
    weights = open_weights(source, what="source")
    form = plan_meta(
        weights.specs,
        _read_config(source),
        num_shards,
        where=f"source: {source}",
        kept=_kept(source),
    )
    with publish_directory(target) as folder:
        write_meta(folder, weights, form, num_shards=num_shards)
        copy_tokenizer_model(source, folder)
    logger.info("converted %s to %d shards in %s", source, num_shards, target)


def plan_meta(
    specs: Mapping[str, TensorSpec],
    config: LlamaConfig,
    num_shards: int,
    *,
    where: str,
    kept: Mapping[str, Any] | None = None,
) -> MetaModelSpec:
    """Plan how to write a model in Meta's format.

    Args:
        specs: The model's weights, under transformers' names.
        config: The model's config.
        num_shards: Number of files to write.
        where: The config field and its value, for errors.
        kept: The model manifest's `converted_from`, if any.

    Raises:
        ValueError: Meta's format cannot hold the model, or not in this number of shards.
    """
    params = MetaParams(**kept["params"]) if kept else build_meta_params(config)
    problems = check_num_shards(params, num_shards)
    if problems:
        raise UserError("\n".join(problems))
    tensors = list(meta_tensors(params))
    _check_weights(where, specs, config, params, tensors)
    return MetaModelSpec(config, params, tensors, kept or {})


def write_meta(folder: Path, weights: Weights, form: MetaModelSpec, *, num_shards: int) -> None:
    """Write `consolidated.*.pth` and `params.json` into an existing folder."""
    params = form.params
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = [Path(scratch, f"{number}.raw") for number in range(num_shards)]
        layouts = _write_shard_files(weights, form.config, form.tensors, files)
        for number, (file, layout) in enumerate(zip(files, layouts, strict=True)):
            content = {name: _mapped(file, *place) for name, place in layout.items()}
            if ROPE_FREQUENCIES in form.kept:
                content[ROPE_FREQUENCIES] = _from_hex(form.kept[ROPE_FREQUENCIES])
            else:
                dtype = next(iter(content.values())).dtype
                content[ROPE_FREQUENCIES] = params.rope_frequencies(dtype)
            torch.save(content, folder / f"consolidated.{number:02d}.pth")
            file.unlink()
    values = form.kept["params"] if form.kept else _without_none(asdict(params))
    (folder / PARAMS).write_text(json.dumps(values))


def copy_tokenizer_model(source: Path, folder: Path) -> None:
    """Copy `tokenizer.model`; log a warning if it does not exist."""
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    else:
        logger.warning("%s has no %s: none is written", source, TOKENIZER)


def _from_hex(constant: Mapping[str, str]) -> Tensor:
    data = bytearray.fromhex(constant["hex"])
    return torch.frombuffer(data, dtype=getattr(torch, constant["dtype"]))


def _read_config(source: Path) -> LlamaConfig:
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    if not isinstance(config, LlamaConfig):
        raise UserError(  # the directory is wrong, not an argument's type
            f"source: {source} is a {config.model_type}, but Meta's format holds only LLaMA 1 and 2"
        )
    return config


def _kept(source: Path) -> dict[str, Any]:
    """Return the values kept from the Meta files that a directory was converted from, if any."""
    kept = dict(read_manifest(source).get("converted_from") or {})
    if kept.get(ROPE_FREQUENCIES) is None:
        kept.pop(ROPE_FREQUENCIES, None)
    return kept


def _check_weights(
    where: str,
    specs: Mapping[str, TensorSpec],
    config: LlamaConfig,
    params: MetaParams,
    tensors: list[MetaTensor],
) -> None:
    for tensor in tensors:
        name = _source_name(tensor, config)
        spec = specs.get(name)
        wanted = expected_shape(tensor, params, config.vocab_size)
        if spec is None or spec.shape != wanted:
            got = "missing" if spec is None else list(spec.shape)
            raise UserError(f"{where}: {name} is {got}, but its config requires {list(wanted)}")
    known = {_source_name(tensor, config) for tensor in tensors}
    other = sorted(name for name in set(specs) - known if not name.endswith("rotary_emb.inv_freq"))
    if other and not (config.tie_word_embeddings and other == ["lm_head.weight"]):
        raise UserError(
            f"{where} holds {len(other)} tensors that Meta's format has no place for, the first is "
            f"{other[0]}"
        )


def _source_name(tensor: MetaTensor, config: LlamaConfig) -> str:
    if tensor.name == "output.weight" and config.tie_word_embeddings:
        return "model.embed_tokens.weight"
    return tensor.hf_name


_Place = tuple[int, torch.dtype, tuple[int, ...]]
"""Place of a tensor in a raw file: byte offset, dtype, shape."""


def _write_shard_files(
    weights: Weights, config: LlamaConfig, tensors: list[MetaTensor], files: list[Path]
) -> list[dict[str, _Place]]:
    """Write every shard's part of every tensor into its raw file; return their places."""
    layouts: list[dict[str, _Place]] = [{} for _ in files]
    with ExitStack() as stack:
        opened = [stack.enter_context(file.open("wb")) for file in files]
        for tensor in tensors:
            parts = _parts(weights.read(_source_name(tensor, config)), tensor, len(files))
            for file, layout, part in zip(opened, layouts, parts, strict=True):
                layout[tensor.name] = (file.tell(), part.dtype, tuple(part.shape))
                flat = part.contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(flat.data)
    return layouts


def _parts(full: Tensor, tensor: MetaTensor, num_shards: int) -> Iterator[Tensor]:
    if tensor.num_rotated_heads is not None:
        full = to_interleaved_rows(full, tensor.num_rotated_heads)
    for number in range(num_shards):
        if tensor.axis is None:
            yield full
        else:
            start, stop = shard_ranges(full.shape[tensor.axis], num_shards)[number]
            yield full.narrow(tensor.axis, start, stop - start)


def _mapped(file: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Memory-map a part of a raw file, so that PyTorch saves it without loading the shard."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    data = np.memmap(file, dtype=np.uint8, mode="c", offset=offset, shape=(num_bytes,))
    return torch.from_numpy(data).view(dtype).reshape(shape)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
