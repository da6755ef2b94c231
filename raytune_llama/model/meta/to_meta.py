"""Convert a model directory to Meta's `consolidated.*.pth`, one tensor in memory at a time.

PyTorch saves a dictionary only in one call, so each shard is first written as a raw file, which is
memory-mapped and saved.
"""

import json
import logging
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
from raytune_llama.model.meta.llama3 import Llama3Version
from raytune_llama.model.meta.params_file import LLAMA3_THETA, infer_rope_factor, parse_params
from raytune_llama.model.meta.tokenizer_files import (
    TOKENIZER,
    MetaTokenizer,
    plan_tokenizer_model,
)
from raytune_llama.model.tensors import TensorSpec, Weights, open_weights
from raytune_llama.model.vocab import EMBEDDING
from raytune_llama.storage.files import publish_directory, read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetaModelSpec:
    """A model to be written in Meta's format."""

    config: LlamaConfig
    """The model's transformers config."""
    params: MetaParams
    """The meaning of the model's params.json."""
    tensors: list[MetaTensor]
    """All weights, in transformers' order."""
    content: Mapping[str, Any]
    """The params.json to write."""
    rope_frequencies: Tensor | None
    """The constant to write into each shard; None in LLaMA 3, and where the original had none."""


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
    config = _read_config(source)
    build_meta_params(config)  # first, since it refuses what the tokenizer's version depends on
    tokenizer = plan_tokenizer(source, config)
    is_llama3 = _is_llama3(config) if tokenizer is None else tokenizer.is_llama3
    if tokenizer is not None:
        _check_rows(tokenizer, config.vocab_size)
    form = plan_meta(
        weights.specs,
        config,
        num_shards,
        where=f"source: {source}",
        kept=_kept(source, config, tokenizer),
        is_llama3=is_llama3,
    )
    with publish_directory(target) as folder:
        write_meta(folder, weights, form, num_shards=num_shards)
        write_tokenizer_model(tokenizer, source, folder)
    logger.info(
        "converted %s to %d shards in %s; the format has no place for the context length (%d), "
        "the tokens that end a text, and a chat template",
        source,
        num_shards,
        target,
        config.max_position_embeddings,
    )


def plan_meta(
    specs: Mapping[str, TensorSpec],
    config: LlamaConfig,
    num_shards: int,
    *,
    where: str,
    kept: Mapping[str, Any] | None = None,
    is_llama3: bool | None = None,
) -> MetaModelSpec:
    """Plan how to write a model in Meta's format.

    Args:
        specs: The model's weights, under transformers' names.
        config: The model's config.
        num_shards: Number of files to write.
        where: The config field and its value, for errors.
        kept: The model manifest's `converted_from`, if any.
        is_llama3: Whether the shards are those of LLaMA 3; None: as the rotary positions suggest.

    Raises:
        ValueError: Meta's format cannot hold the model, or not in this number of shards.
    """
    if is_llama3 is None:
        is_llama3 = _is_llama3(config)
    params = build_meta_params(config)
    content: Mapping[str, Any] = _without_none(asdict(params))
    problems = check_num_shards(params, num_shards)
    if is_llama3 and config.vocab_size % num_shards:
        problems.append(
            f"num_shards: {config.vocab_size} rows of the embedding cannot be split into "
            f"{num_shards} shards, as LLaMA 3's are; use a divisor"
        )
    if problems:
        raise UserError("\n".join(problems))
    tensors = list(meta_tensors(params, embedding_axis=0 if is_llama3 else 1))
    _check_weights(where, specs, config, params, tensors)
    frequencies = None if is_llama3 else params.rope_frequencies(specs[EMBEDDING].dtype)
    if kept and _means(kept["params"], params, config, is_llama3=is_llama3, where=where):
        content, frequencies = kept["params"], _from_hex(kept.get(ROPE_FREQUENCIES))
    return MetaModelSpec(config, params, tensors, content, frequencies)


def _version_of(config: LlamaConfig) -> Llama3Version:
    """Return which names Meta's code gives the control tokens of a LLaMA 3."""
    return "3.1" if (config.rope_parameters or {}).get("rope_type") == "llama3" else "3"


def _is_llama3(config: LlamaConfig) -> bool:
    """Whether rotary positions are as in LLaMA 3, and unlike those of its predecessors."""
    theta = (config.rope_parameters or {}).get("rope_theta")
    return _version_of(config) == "3.1" or theta == LLAMA3_THETA


def _means(
    content: Mapping[str, Any],
    params: MetaParams,
    config: LlamaConfig,
    *,
    is_llama3: bool,
    where: str,
) -> bool:
    """Whether a params.json, kept from before, still describes the model."""
    kept = parse_params(dict(content), where=where, is_llama3=is_llama3)
    tied = bool(config.tie_word_embeddings)

    def meaning(values: MetaParams) -> tuple[object, ...]:
        factor = values.rope_scaling_factor or infer_rope_factor(values, is_tied=tied)
        return (
            *(values.dim, values.n_layers, values.n_heads, values.num_kv_heads),
            *(values.intermediate, values.norm_eps, values.rope_theta),
            factor if values.use_scaled_rope else None,
            config.vocab_size if values.vocab_size == -1 else values.vocab_size,
        )

    if meaning(kept) == meaning(params):
        return True
    logger.info(
        "%s has another config.json than was converted from Meta's files: params.json is written "
        "from config.json",
        where,
    )
    return False


def write_meta(folder: Path, weights: Weights, form: MetaModelSpec, *, num_shards: int) -> None:
    """Write `consolidated.*.pth` and `params.json` into an existing folder."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = [Path(scratch, f"{number}.raw") for number in range(num_shards)]
        layouts = _write_shard_files(weights, form.config, form.tensors, files)
        for number, (file, layout) in enumerate(zip(files, layouts, strict=True)):
            content = {name: _mapped(file, *place) for name, place in layout.items()}
            if form.rope_frequencies is not None:
                content[ROPE_FREQUENCIES] = form.rope_frequencies
            torch.save(content, folder / f"consolidated.{number:02d}.pth")
            file.unlink()
    (folder / PARAMS).write_text(json.dumps(dict(form.content)))


def plan_tokenizer(source: Path, config: LlamaConfig) -> MetaTokenizer | None:
    """Return the tokenizer.model to write; None if there is none.

    Args:
        source: Directory of the tokenizer.
        config: The model's config.

    Raises:
        ValueError: The model is a LLaMA 3, and Meta's format cannot hold its tokenizer.
    """
    try:
        return plan_tokenizer_model(source, _version_of(config))
    except UserError as error:
        if _is_llama3(config):
            raise
        logger.warning("%s", error)
        return None


def _check_rows(tokenizer: MetaTokenizer, rows: int) -> None:
    """Refuse a model that Meta's code could not load with its tokenizer."""
    if tokenizer.num_tokens > rows or (tokenizer.is_llama3 and tokenizer.num_tokens != rows):
        needed = "exactly" if tokenizer.is_llama3 else "at least"
        raise UserError(
            f"source: the embedding has {rows} rows (vocab_size of config.json), but "
            f"{tokenizer.path} has {tokenizer.num_tokens} tokens, and Meta's code needs {needed} "
            "as many rows; convert a model with its own tokenizer"
        )
    if tokenizer.num_tokens < rows:
        logger.warning(
            "%d of %d rows have no token in %s: tokens of other files are not written",
            rows - tokenizer.num_tokens,
            rows,
            tokenizer.path,
        )


def write_tokenizer_model(tokenizer: MetaTokenizer | None, source: Path, folder: Path) -> None:
    """Write a tokenizer.model, or log that there is none.

    Args:
        tokenizer: Result of `plan_tokenizer`.
        source: Directory of the tokenizer, for the log.
        folder: Directory to write to.
    """
    if tokenizer is None:
        logger.warning("%s has no %s: none is written", source, TOKENIZER)
    else:
        (folder / TOKENIZER).write_bytes(tokenizer.content)


def _from_hex(constant: Mapping[str, str] | None) -> Tensor | None:
    if constant is None:
        return None
    data = bytearray.fromhex(constant["hex"])
    return torch.frombuffer(data, dtype=getattr(torch, constant["dtype"]))


def _read_config(source: Path) -> LlamaConfig:
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    if not isinstance(config, LlamaConfig):
        raise UserError(  # the directory is wrong, not an argument's type
            f"source: {source} is a {config.model_type}, but Meta's format holds only LLaMA 1 to 3"
        )
    return config


def _kept(
    source: Path, config: LlamaConfig, tokenizer: MetaTokenizer | None
) -> Mapping[str, Any] | None:
    """Return what was kept from the Meta files that a directory was converted from, if any."""
    kept = read_manifest(source).get("converted_from") or None
    # A size of -1 means the tokenizer's, which rows without a token would contradict.
    if kept and tokenizer is not None and tokenizer.num_tokens != config.vocab_size:
        kept = None if kept["params"].get("vocab_size", -1) == -1 else kept
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
