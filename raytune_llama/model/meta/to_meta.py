"""A Hugging Face directory to Meta's `consolidated.*.pth`, one tensor in memory at a time.

Each shard is first a file of plain bytes, from a map of which PyTorch then writes the real one: it
writes a dictionary only as a whole.
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
    """How a model is said in Meta's form."""

    config: LlamaConfig
    """transformers' settings."""
    params: MetaParams
    """Meta's."""
    tensors: list[MetaTensor]
    """All weights, in transformers' order."""
    kept: Mapping[str, Any]
    """What was kept of the files that the model was made from; empty for others."""


def convert_to_meta(source: Path, target: Path, *, num_shards: int) -> None:
    """Write `consolidated.*.pth`, `params.json` and `loader.model`.

    Args:
        source: Directory of a LLaMA of transformers'.
        target: Directory to make; it must not exist or be empty.
        num_shards: Files, 1, 2, 4 or 8 in what Meta published.

    Raises:
        ValueError: Meta's form cannot hold the model, or not in so many shards; files are missing
            or damaged; the target is not empty.
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
    logger.info("%s became %d shards in %s", source, num_shards, target)


def plan_meta(
    specs: Mapping[str, TensorSpec],
    config: LlamaConfig,
    num_shards: int,
    *,
    where: str,
    kept: Mapping[str, Any] | None = None,
) -> MetaModelSpec:
    """Find out how a model is said in Meta's form.

    Args:
        specs: Its weights, under transformers' names.
        config: Its settings.
        num_shards: Files to cut it into.
        where: The config field and what it names, for errors.
        kept: What a model directory's manifest has under `converted_from`.

    Raises:
        ValueError: Meta's form cannot hold the model, or not in so many shards.
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
    """Copy `loader.model`; say so where there is none."""
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
            f"source: {source} is a {config.model_type}, and Meta's form holds LLaMA 1 and 2 alone"
        )
    return config


def _kept(source: Path) -> dict[str, Any]:
    """Return what was kept of the files that a directory was made from; nothing for others."""
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
            raise UserError(f"{where}: {name} is {got}, its config wants {list(wanted)}")
    known = {_source_name(tensor, config) for tensor in tensors}
    other = sorted(name for name in set(specs) - known if not name.endswith("rotary_emb.inv_freq"))
    if other and not (config.tie_word_embeddings and other == ["lm_head.weight"]):
        raise UserError(
            f"{where} holds {len(other)} tensors that Meta's form has no place for, the first is "
            f"{other[0]}"
        )


def _source_name(tensor: MetaTensor, config: LlamaConfig) -> str:
    if tensor.name == "output.weight" and config.tie_word_embeddings:
        return "model.embed_tokens.weight"
    return tensor.hf_name


_Place = tuple[int, torch.dtype, tuple[int, ...]]
"""Where a tensor lies in a raw file: offset, type, shape."""


def _write_shard_files(
    weights: Weights, config: LlamaConfig, tensors: list[MetaTensor], files: list[Path]
) -> list[dict[str, _Place]]:
    """Write every shard's part of every tensor into its raw file; return where they lie."""
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


def _parts(whole: Tensor, tensor: MetaTensor, num_shards: int) -> Iterator[Tensor]:
    if tensor.num_rotated_heads is not None:
        whole = to_interleaved_rows(whole, tensor.num_rotated_heads)
    for number in range(num_shards):
        if tensor.axis is None:
            yield whole
        else:
            start, stop = shard_ranges(whole.shape[tensor.axis], num_shards)[number]
            yield whole.narrow(tensor.axis, start, stop - start)


def _mapped(file: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Map a part of a raw file, so that PyTorch writes it without holding a shard in memory."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    data = np.memmap(file, dtype=np.uint8, mode="c", offset=offset, shape=(num_bytes,))
    return torch.from_numpy(data).view(dtype).reshape(shape)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
