"""Write a merged LLaMA as one GGUF file for llama.cpp, and read it back, one tensor at a time.

    form = plan_gguf(plan, "q8_0")              # rejects what llama.cpp would compute differently
    write_gguf(path, plan, form)
    GgufWeights(path, form).read(name)          # with transformers' names and row order

llama.cpp rotates adjacent pairs of a head's dimensions, as Meta does: the rows of wq and wk are
stored in that order. Norms are float32 whatever the type of the rest.

Facts: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's
`conversion/llama.py`.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from raytune_llama.config.errors import UserError
from raytune_llama.merge.config import GgufType
from raytune_llama.merge.gguf_vocabulary import GgufVocabulary, read_vocabulary
from raytune_llama.merge.plan import MergePlan, row_slices
from raytune_llama.merge.proof import Q8_0_BLOCK_SIZE
from raytune_llama.model.meta.layout import to_half_split_rows, to_interleaved_rows
from raytune_llama.model.tensors import TensorSpec

logger = logging.getLogger(__name__)


ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of the factors by which LLaMA 3.1 divides each rotary frequency."""

_KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "f32": Kind.F32}
_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "f32": gguf.LlamaFileType.ALL_F32,
}
_DTYPES = {Kind.F16: torch.float16, Kind.F32: torch.float32, Kind.Q8_0: torch.uint8}
_CONSTANT = ".rotary_emb.inv_freq"
"""Suffix of a constant that old versions of transformers saved too; llama.cpp computes it."""
_BLOCK_BYTES = Q8_0_BLOCK_SIZE + 2


@dataclass(frozen=True)
class GgufTensor:
    """A weight in a GGUF file."""

    name: str
    """Name of the tensor in the file."""
    kind: Kind
    """GGML type of the tensor."""
    num_rotated_heads: int | None
    """Number of heads whose rows are stored in Meta's order; None: stored as in transformers."""
    spec: TensorSpec
    """Stored type and shape, with 8-bit blocks as rows of bytes."""


@dataclass(frozen=True)
class GgufModelSpec:
    """A merged model in the form of GGUF."""

    config: LlamaConfig
    """The model's config in transformers."""
    gguf_type: GgufType
    """Type of the matrices."""
    vocabulary: GgufVocabulary
    """The tokenizer in GGUF's form."""
    tensors: Mapping[str, GgufTensor]
    """Tensors by transformers' names, in file order."""

    @property
    def blocks(self) -> frozenset[str]:
        """Names of the weights that are written as 8-bit blocks."""
        return frozenset(name for name, t in self.tensors.items() if t.kind == Kind.Q8_0)


def gguf_dtype(gguf_type: GgufType, spec: TensorSpec) -> torch.dtype:
    """Return the type of a merged weight, before any quantization to blocks."""
    is_half = gguf_type == "f16" and len(spec.shape) > 1
    return torch.float16 if is_half else torch.float32


def plan_gguf(plan: MergePlan, gguf_type: GgufType) -> GgufModelSpec:
    """Plan the GGUF file of a merged model.

    Raises:
        ValueError: llama.cpp does not support this model, or not in this type.
    """
    if plan.settings.get("model_type") != "llama":
        raise UserError(
            f"output_format: {plan.base_dir} is a {plan.settings.get('model_type')}, but gguf is "
            "only supported for LLaMAs; use huggingface"
        )
    if plan.tokenizer_dir is None:
        raise UserError(
            f"output_format: gguf holds the tokenizer too, but neither {plan.base_dir} nor an "
            "adapter has one; copy it into the base's directory"
        )
    config = LlamaConfig.from_dict(dict(plan.settings))
    _check_config(plan.base_dir, config)
    tensors = dict(_tensors(plan, config, gguf_type))
    vocabulary = read_vocabulary(plan.tokenizer_dir, config.vocab_size, plan.stop_ids)
    return GgufModelSpec(config, gguf_type, vocabulary, tensors)


def _check_config(base_dir: Path, config: LlamaConfig) -> None:
    rope = _rope(config)
    problems = [
        f"output_format: llama.cpp does not support LLaMAs with {field} {value!r}, as in "
        f"{base_dir}; use huggingface"
        for field, value, known in (
            ("hidden_act", config.hidden_act, ("silu",)),
            ("rope_type", rope.get("rope_type"), ("default", "linear", "llama3")),
            ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        )
        if value not in known
    ]
    if problems:
        raise UserError("\n".join(problems))


def _tensors(
    plan: MergePlan, config: LlamaConfig, gguf_type: GgufType
) -> Iterator[tuple[str, GgufTensor]]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, spec in plan.specs.items():
        if name.endswith(_CONSTANT):
            logger.info("%s is skipped: llama.cpp computes it", name)
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name is None:
            raise UserError(
                f"output_format: {plan.base_dir} has a tensor {name}, which GGUF's LLaMA does not "
                "have; use huggingface"
            )
        kind = Kind.F32 if len(spec.shape) == 1 else _KINDS[gguf_type]
        shape = spec.shape
        if kind == Kind.Q8_0:
            if shape[-1] % Q8_0_BLOCK_SIZE:
                raise UserError(
                    f"gguf_type: q8_0 needs rows that are a multiple of {Q8_0_BLOCK_SIZE}, but the "
                    f"rows of {name} have {shape[-1]} values; use f16"
                )
            shape = (*shape[:-1], shape[-1] // Q8_0_BLOCK_SIZE * _BLOCK_BYTES)
        rotated = heads.get(name.removesuffix(".weight").rpartition(".")[2])
        yield name, GgufTensor(gguf_name, kind, rotated, TensorSpec(_DTYPES[kind], shape))


def write_gguf(path: Path, plan: MergePlan, form: GgufModelSpec) -> None:
    """Write the file; the weights of `plan` have the types of `gguf_dtype`.

    Raises:
        ValueError: A value exceeds float16's range.
    """
    writer = gguf.GGUFWriter(path, "llama")
    _write_settings(writer, form)
    factors = _rope_factors(form.config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in form.tensors.values():
        writer.add_tensor_info(
            tensor.name,
            tensor.spec.shape,
            np.dtype(str(tensor.spec.dtype).removeprefix("torch.")),
            tensor.spec.num_bytes,
            tensor.kind,
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name, tensor in form.tensors.items():
            stored = _blocks(plan, name, tensor) if name in form.blocks else plan.read(name)
            if tensor.num_rotated_heads is not None:
                stored = to_interleaved_rows(stored, tensor.num_rotated_heads)
            writer.write_tensor_data(stored.contiguous().numpy())
    finally:
        writer.close()


def _blocks(plan: MergePlan, name: str, tensor: GgufTensor) -> Tensor:
    """Compute a weight and quantize it to rows of 8-bit blocks."""
    stored = torch.empty(tensor.spec.shape, dtype=torch.uint8)
    for rows in row_slices(plan.specs[name].shape):
        part = plan.merge_exactly(name, rows, plan.read_source_rows(name, rows)).float()
        stored[rows] = torch.from_numpy(gguf.quantize(part.numpy(), Kind.Q8_0))
    return stored


def _write_settings(writer: gguf.GGUFWriter, form: GgufModelSpec) -> None:
    config, rope = form.config, _rope(form.config)
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[form.gguf_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    form.vocabulary.write(writer)


def _rope(config: LlamaConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def _rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """Return the divisors of the rotary frequencies; None unless the rope type is llama3."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    assert config.head_dim is not None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return (1.0 / (rope["rope_theta"] ** exponents) / scaled).numpy()


class GgufWeights:
    """The weights of a GGUF file, with transformers' names and row order."""

    def __init__(self, path: Path, form: GgufModelSpec) -> None:
        """Read the header.

        Raises:
            AssertionError: The tensors of the file differ from `form`.
        """
        self._path = path
        self._form = form
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._offsets: dict[str, int] = {}
        for name, tensor in form.tensors.items():
            stored = found.get(tensor.name)
            if stored is None or (stored.tensor_type, stored.n_bytes) != (
                tensor.kind,
                tensor.spec.num_bytes,
            ):
                raise AssertionError(f"{path.name}: {name} is missing, or has another type or size")
            self._offsets[name] = stored.data_offset

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See `Weights.specs`; 8-bit blocks are rows of bytes."""
        return {name: tensor.spec for name, tensor in self._form.tensors.items()}

    def read(self, name: str) -> Tensor:
        """See `Weights.read`; 8-bit blocks are rows of bytes."""
        tensor = self._form.tensors[name]
        data = np.fromfile(
            self._path, np.uint8, count=tensor.spec.num_bytes, offset=self._offsets[name]
        )
        stored = torch.from_numpy(data).view(tensor.spec.dtype).reshape(tensor.spec.shape)
        if tensor.num_rotated_heads is None:
            return stored
        return to_half_split_rows(stored, tensor.num_rotated_heads)
