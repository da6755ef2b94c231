"""Convert Meta's `consolidated.*.pth` to a model directory, one tensor in memory at a time.

What the files of a LLaMA 3 do not record is derived and logged: the version from `use_scaled_rope`,
the RoPE factor and tied embeddings from the weights. No code in a .pth file is run. The target
appears only when complete; its manifest holds the hashes of the source files, and the values that
transformers has no field for.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from raytune_llama.config.errors import UserError
from raytune_llama.model.meta.layout import (
    META_ROPE,
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
from raytune_llama.model.meta.llama3 import (
    CONTEXT_TOKENS,
    Llama3Version,
    control_tokens,
    end_tokens,
)
from raytune_llama.model.meta.params_file import ParamsFile, read_params
from raytune_llama.model.meta.tokenizer_files import (
    TOKENIZER,
    MetaTokenizer,
    find_tokenizer,
    write_tokenizer_files,
)
from raytune_llama.model.tensors import TensorSpec, WeightsWriter, load_pickled
from raytune_llama.model.vocab import EMBEDDING, HEAD
from raytune_llama.storage.files import (
    OUTPUT_MANIFEST,
    publish_directory,
    sha256_file,
    write_json_atomic,
)

logger = logging.getLogger(__name__)

_FORMAT = 1
_CONTEXT_TOKENS = 2048
_LLAMA3_ROWS = 128256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def convert_to_huggingface(
    source: Path,
    target: Path,
    *,
    max_position_embeddings: int | None,
    max_shard_bytes: int,
    instruct: bool | None = None,
    require_originals: bool = False,
) -> None:
    """Write a model directory that plain transformers loads.

    Args:
        source: Directory with `consolidated.*.pth`, `params.json` and `tokenizer.model`, which
            may also be in the parent directory, as Meta ships it.
        target: Output directory; it must be new or empty.
        max_position_embeddings: Context length in tokens; None: that of LLaMA 1, 3 or 3.1.
        max_shard_bytes: Maximum size of a safetensors file, unless one tensor is larger.
        instruct: Whether a LLaMA 3 is an instruct model; None for others.
        require_originals: Refuse weight files whose hash was not published.

    Raises:
        ValueError: A file is missing, damaged or a Git LFS pointer; shapes contradict params.json,
            the tokenizer or each other; `instruct` is missing or not for this model; the target is
            not empty.
    """
    check_target(target)
    paths = _find_shards(source)
    tokenizer = find_tokenizer(source)
    file = read_params(source, is_llama3=tokenizer.is_llama3)
    _check_instruct(tokenizer, instruct)
    weights = MetaWeights(paths, file.params)
    _check_vocabulary(file, tokenizer, weights.specs[HEAD].shape[0])
    hashes = {path.name: sha256_file(path) for path in paths}
    _check_originals(hashes, require=require_originals)
    model = _describe(file, tokenizer, weights, max_position_embeddings, instruct=bool(instruct))
    with publish_directory(target) as folder:
        with WeightsWriter(folder, model.specs, max_shard_bytes=max_shard_bytes) as writer:
            written = {name: writer.write(name, weights.read(name)) for name in model.specs}
        _write_settings(model.config, folder)
        write_tokenizer_files(
            tokenizer,
            folder,
            version=model.version,
            instruct=bool(instruct),
            context_tokens=model.config.max_position_embeddings,
        )
        manifest = {
            "format": _FORMAT,
            "kind": "model",
            "converted_from": {
                "files": {**hashes, TOKENIZER: sha256_file(tokenizer.path)},
                "params": file.content,
                ROPE_FREQUENCIES: weights.rope_frequencies(),
            },
            "tensors": written,
        }
        write_json_atomic(folder / OUTPUT_MANIFEST, manifest)
    logger.info(
        "converted %d shards of %s to %s: %d tensors", len(paths), source, target, len(written)
    )


def _write_settings(config: LlamaConfig, folder: Path) -> None:
    config.save_pretrained(folder)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    GenerationConfig(**ends).save_pretrained(folder)


@dataclass(frozen=True)
class _ModelSpec:
    """A model directory to be written."""

    config: LlamaConfig
    specs: dict[str, TensorSpec]
    """Its weights; without the output matrix if that is the embedding."""
    version: Llama3Version
    """Names of the control tokens, for LLaMA 3."""


def _describe(
    file: ParamsFile,
    tokenizer: MetaTokenizer,
    weights: "MetaWeights",
    context_tokens: int | None,
    *,
    instruct: bool,
) -> _ModelSpec:
    """Describe the model directory of Meta's files, and log what they do not say themselves."""
    is_tied = weights.is_tied()
    params = file.with_rope_factor(is_tied=is_tied)
    version: Llama3Version = "3.1" if params.use_scaled_rope else "3"
    bos, eos = 1, 2
    known = _CONTEXT_TOKENS
    if tokenizer.ranks is not None:
        controls = len(tokenizer.ranks)
        bos, eos = controls, _end_ids(controls, version, instruct=instruct)
        known = CONTEXT_TOKENS[version]
    if context_tokens is None:
        kind = f"LLaMA {version}" if tokenizer.is_llama3 else "LLaMA 1"
        logger.info(
            "context length: %d tokens, as of %s; set max_position_embeddings for another",
            known,
            f"{kind} and later" if version == "3.1" else kind,
        )
    original = META_ROPE["original_max_position_embeddings"]
    if params.use_scaled_rope and (context_tokens or known) <= original:
        raise UserError(
            f"max_position_embeddings: got {context_tokens}, but use_scaled_rope extends a context "
            f"of {original} tokens; set more, or leave it null for {known}"
        )
    head = weights.specs[HEAD]
    config = build_llama_config(
        params, head.shape[0], context_tokens or known, bos=bos, eos=eos, is_tied=is_tied
    )
    config.dtype = head.dtype
    if is_tied:
        logger.info("output.weight equals tok_embeddings.weight: stored once, as tied embeddings")
    specs = {name: spec for name, spec in weights.specs.items() if name != HEAD or not is_tied}
    return _ModelSpec(config, specs, version)


def _end_ids(first: int, version: Llama3Version, *, instruct: bool) -> int | list[int]:
    """Return the ids that end a generated text, as in the releases on Hugging Face."""
    names = control_tokens(version)
    ids = sorted(first + names.index(name) for name in end_tokens(version, instruct=instruct))
    return ids if instruct else ids[0]


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
        first = self._shards[0]["tok_embeddings.weight"].shape
        # LLaMA 3 splits the embedding by rows: each shard has the whole width.
        axis = 0 if len(paths) > 1 and first[-1:] == (params.dim,) else 1
        tensors = list(meta_tensors(params, embedding_axis=axis))
        vocabulary = sum(sum(shard["output.weight"].shape[:1]) for shard in self._shards)
        self._tensors = {tensor.hf_name: tensor for tensor in tensors}
        self.specs: dict[str, TensorSpec] = {
            tensor.hf_name: _spec(
                paths, self._shards, tensor, expected_shape(tensor, params, vocabulary)
            )
            for tensor in tensors
        }

    def read(self, name: str) -> Tensor:
        """See `Weights.read`."""
        return _join(self._shards, self._tensors[name], self._paths)

    def is_tied(self) -> bool:
        """Whether the output matrix equals the embedding, bit for bit."""
        if self.specs[HEAD] != self.specs[EMBEDDING]:
            return False
        row = torch.cat([shard["tok_embeddings.weight"][:1].reshape(-1) for shard in self._shards])
        head = self._shards[0]["output.weight"][0]
        if not torch.equal(row[: len(head)], head):
            return False
        return torch.equal(self.read(EMBEDDING), self.read(HEAD))

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
    # The values in which LLaMA 3 differs from its predecessors change no weight.
    return MetaWeights(_find_shards(source), read_params(source, is_llama3=True).params)


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


def _check_instruct(tokenizer: MetaTokenizer, instruct: bool | None) -> None:  # noqa: FBT001
    if tokenizer.is_llama3 and instruct is None:
        raise UserError(
            "instruct: a LLaMA 3's files do not say whether it is an instruct model; set "
            "instruct=true (turns end with <|eot_id|>, with Meta's chat template) or "
            "instruct=false (texts end with <|end_of_text|>)"
        )
    if instruct is not None and not tokenizer.is_llama3:
        raise UserError(
            f"instruct: is only for LLaMA 3, but {tokenizer.path} is a SentencePiece model, of "
            "LLaMA 1 or 2; remove it"
        )


def _check_vocabulary(file: ParamsFile, tokenizer: MetaTokenizer, rows: int) -> None:
    """Refuse a tokenizer or a params.json of another model."""
    stated, num_tokens = file.params.vocab_size, tokenizer.num_tokens
    if stated not in {-1, rows}:
        raise UserError(
            f"source: vocab_size of {file.path} is {stated}, but output.weight has {rows} rows; "
            "they belong to different models"
        )
    if tokenizer.ranks is not None and rows != num_tokens:
        raise UserError(
            f"source: {tokenizer.path} has {len(tokenizer.ranks)} tokens, to which LLaMA 3 adds "
            f"{num_tokens - len(tokenizer.ranks)} control tokens, but output.weight has {rows} "
            "rows, not the sum; the file is truncated or of another model"
        )
    is_llama3_size = rows == _LLAMA3_ROWS and not tokenizer.is_llama3
    if is_llama3_size or num_tokens > rows or (stated == -1 and num_tokens != rows):
        raise UserError(
            f"source: {tokenizer.path} is a SentencePiece model of {num_tokens} tokens, but "
            f"output.weight has {rows} rows; put the model's own tokenizer.model there"
            + (
                f", or set vocab_size to {rows} in {file.path.name} if its last rows have no token"
                if rows > num_tokens and not is_llama3_size
                else ""
            )
        )
    if rows > num_tokens:
        logger.info("%d of %d rows have no token", rows - num_tokens, rows)


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
                "a LLaMA 1 to 3; check that both belong to the same model"
            )


def _spec(
    paths: list[Path],
    shards: list[dict[str, Tensor]],
    tensor: MetaTensor,
    wanted: tuple[int, ...],
) -> TensorSpec:
    """Return dtype and shape of a weight, after checking those of its parts."""
    parts = [shard[tensor.name] for shard in shards]
    dtype = parts[0].dtype
    for path, part in zip(paths, parts, strict=True):
        if part.dtype not in _DTYPES or part.dtype != dtype:
            what = "float16, bfloat16 and float32" if part.dtype not in _DTYPES else str(dtype)
            raise UserError(
                f"source: {tensor.name} of {path} is of type {part.dtype}, wanted {what}; fetch "
                "files that are not quantized, all of one model"
            )
    shape = [*parts[0].shape]
    fits = all(part.dim() == len(wanted) for part in parts)
    if fits and tensor.axis is not None:
        shape[tensor.axis] = sum(part.shape[tensor.axis] for part in parts)
        others = [[*part.shape] for part in parts]
        for other in others:
            other[tensor.axis] = shape[tensor.axis]
        fits = all(other == shape for other in others)
    if not fits or tuple(shape) != wanted:
        raise UserError(
            f"source: {tensor.name} is {shape} over {len(shards)} shards, but params.json "
            f"requires {list(wanted)}; it is for another model, or shards are missing"
        )
    return TensorSpec(dtype, wanted)


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
