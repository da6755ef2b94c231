"""Convert Meta's `consolidated.*.pth` to a model directory, one tensor in memory at a time.

No code in a .pth file is run. The target appears only when complete; its manifest holds the hashes
of the source files, and the values that transformers has no field for.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor
from transformers import GenerationConfig

from raytune_llama.config.errors import UserError
from raytune_llama.model.meta.layout import (
    PARAMS,
    ROPE_FREQUENCIES,
    MetaParams,
    MetaTensor,
    build_llama_config,
    check_target,
    expected_shape,
    find_published_name,
    meta_tensors,
    to_half_split_rows,
)
from raytune_llama.model.tensors import TensorSpec, WeightsWriter, load_pickled
from raytune_llama.storage.files import (
    OUTPUT_MANIFEST,
    publish_directory,
    read_json,
    sha256_file,
    write_json_atomic,
)

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.model"
"""File name of the SentencePiece model, in both formats."""

LLAMA_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
}
"""Content of a tokenizer_config.json for the class that splits text as LLaMA's SentencePiece model
does."""

_FORMAT = 1


def convert_to_huggingface(
    source: Path,
    target: Path,
    *,
    max_position_embeddings: int,
    max_shard_bytes: int,
    require_originals: bool = False,
) -> None:
    """Write a model directory that plain transformers loads.

    Args:
        source: Directory with `consolidated.*.pth`, `params.json` and `tokenizer.model`, which
            may also be in the parent directory, as Meta ships it.
        target: Output directory; it must be new or empty.
        max_position_embeddings: Context length in tokens, which the files do not record.
        max_shard_bytes: Maximum size of a safetensors file, unless one tensor is larger.
        require_originals: Refuse weight files whose hash was not published.

    Raises:
        ValueError: A file is missing, damaged or a Git LFS pointer; shapes contradict params.json
            or each other; the target is not empty.
    """
    check_target(target)
    paths = _find_shards(source)
    params = _read_params(source)
    tokenizer = _find_tokenizer(source)
    hashes = {path.name: sha256_file(path) for path in paths}
    _check_originals(hashes, require=require_originals)
    weights = MetaWeights(paths, params)
    specs = weights.specs
    with publish_directory(target) as folder:
        with WeightsWriter(folder, specs, max_shard_bytes=max_shard_bytes) as writer:
            written = {name: writer.write(name, weights.read(name)) for name in specs}
        head = specs["lm_head.weight"]
        config = build_llama_config(params, head.shape[0], max_position_embeddings)
        config.dtype = head.dtype
        config.save_pretrained(folder)
        GenerationConfig(bos_token_id=1, eos_token_id=2).save_pretrained(folder)
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        _write_tokenizer_config(folder, max_position_embeddings)
        manifest = {
            "format": _FORMAT,
            "kind": "model",
            "converted_from": {
                "files": {**hashes, TOKENIZER: sha256_file(tokenizer)},
                "params": _read_json_object(source / PARAMS),
                ROPE_FREQUENCIES: weights.rope_frequencies(),
            },
            "tensors": written,
        }
        write_json_atomic(folder / OUTPUT_MANIFEST, manifest)
    logger.info(
        "converted %d shards of %s to %s: %d tensors", len(paths), source, target, len(specs)
    )


class MetaWeights:
    """The weights of Meta's files under transformers' names and in its row order."""

    def __init__(self, paths: list[Path], params: MetaParams) -> None:
        """Memory-map the files of a model.

        Args:
            paths: All shards, in order.
            params: The content of params.json.

        Raises:
            ValueError: A file is damaged, or shapes contradict `params` or each other.
        """
        self._paths = paths
        self._shards = [load_pickled(path) for path in paths]
        _check_names(paths, self._shards, params)
        vocabulary = _full_shape(self._shards, MetaTensor("output.weight", "", 0))[0]
        self._tensors = {tensor.hf_name: tensor for tensor in meta_tensors(params)}
        self.specs: dict[str, TensorSpec] = {
            name: _spec(self._shards, tensor, params, vocabulary)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """See `Weights.read`."""
        return _join(self._shards, self._tensors[name], self._paths)

    def rope_frequencies(self) -> dict[str, str] | None:
        """Return the dtype and hex bytes of the rotary frequencies, for converting back, if any."""
        values = self._shards[0].get(ROPE_FREQUENCIES)
        if values is None:
            return None
        data = values.contiguous().view(torch.uint8).numpy().tobytes().hex()
        return {"dtype": str(values.dtype).removeprefix("torch."), "hex": data}


def open_meta(source: Path) -> MetaWeights:
    """Open a directory in Meta's format.

    Raises:
        ValueError: A file is missing or damaged, or files contradict each other.
    """
    return MetaWeights(_find_shards(source), _read_params(source))


def _find_shards(source: Path) -> list[Path]:
    found = sorted(source.glob("consolidated.*.pth"))
    if not found:
        raise UserError(
            f"source: {source} has no consolidated.*.pth; name a directory in Meta's format"
        )
    wanted = [f"consolidated.{number:02d}.pth" for number in range(len(found))]
    missing = sorted(set(wanted) - {path.name for path in found})
    if missing:
        raise UserError(f"source: {source} lacks {missing[0]}, but has {found[-1].name}; fetch it")
    return found


def _read_json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"source: {path} is missing; fetch it")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"source: {path} is not a JSON object; fetch it again")
    return content


def _read_params(source: Path) -> MetaParams:
    content = _read_json_object(source / PARAMS)
    try:
        return pydantic.TypeAdapter(MetaParams).validate_python(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"source: {source / PARAMS}: {problems}") from None


def _find_tokenizer(source: Path) -> Path:
    for path in (source / TOKENIZER, source.parent / TOKENIZER):
        if path.is_file():
            return path
    raise UserError(
        f"source: neither {source} nor its parent directory has {TOKENIZER}; put it there"
    )


def _check_originals(hashes: Mapping[str, str], *, require: bool) -> None:
    unknown = [name for name, digest in hashes.items() if find_published_name(digest) is None]
    for name, digest in hashes.items():
        if name not in unknown:
            logger.info("%s is the original file: %s", name, find_published_name(digest))
    if unknown and require:
        raise UserError(
            f"require_originals: {', '.join(unknown)}: SHA256 {hashes[unknown[0]]} is not a "
            "published one; fetch the files again, or set require_originals=false"
        )


def _check_names(paths: list[Path], shards: list[dict[str, Tensor]], params: MetaParams) -> None:
    wanted = {tensor.name for tensor in meta_tensors(params)}
    for path, shard in zip(paths, shards, strict=True):
        missing, other = wanted - set(shard), set(shard) - wanted - {ROPE_FREQUENCIES}
        if missing or other:
            what = f"lacks {min(missing)}" if missing else f"holds the unknown tensor {min(other)}"
            raise UserError(
                f"source: {path} {what}, but params.json describes {params.n_layers} layers of "
                "a LLaMA 1 or 2; check that both belong to the same model"
            )


def _full_shape(shards: list[dict[str, Tensor]], tensor: MetaTensor) -> tuple[int, ...]:
    shape = list(shards[0][tensor.name].shape)
    if tensor.axis is not None:
        shape[tensor.axis] = sum(shard[tensor.name].shape[tensor.axis] for shard in shards)
    return tuple(shape)


def _spec(
    shards: list[dict[str, Tensor]], tensor: MetaTensor, params: MetaParams, vocabulary: int
) -> TensorSpec:
    shape, dtype = _full_shape(shards, tensor), shards[0][tensor.name].dtype
    wanted = expected_shape(tensor, params, vocabulary)
    if shape != wanted:
        raise UserError(
            f"source: {tensor.name} is {list(shape)} over {len(shards)} shards, but params.json "
            f"requires {list(wanted)}; it is for another model, or shards are missing"
        )
    return TensorSpec(dtype, shape)


def _join(shards: list[dict[str, Tensor]], tensor: MetaTensor, paths: list[Path]) -> Tensor:
    parts = [shard[tensor.name] for shard in shards]
    if tensor.axis is None:
        for path, part in zip(paths, parts, strict=True):
            if not torch.equal(part, parts[0]):
                raise UserError(
                    f"source: {tensor.name} of {path} differs from that of {paths[0].name}, but "
                    "must be the same in all shards; they belong to different models"
                )
        return parts[0].clone()
    full = torch.cat(parts, dim=tensor.axis)
    if tensor.num_rotated_heads is None:
        return full
    return to_half_split_rows(full, tensor.num_rotated_heads)


def _write_tokenizer_config(folder: Path, max_position_embeddings: int) -> None:
    settings = LLAMA_TOKENIZER | {"model_max_length": max_position_embeddings}
    write_json_atomic(folder / "tokenizer_config.json", settings)
