"""A merged LLaMA as one GGUF file for llama.cpp, written and read back one tensor at a time.

    form = plan_gguf(plan, "q8_0")              # refuses what llama.cpp would compute differently
    write_gguf(path, plan, form)
    GgufWeights(path, form).read(name)          # under transformers' names, in its order of rows

llama.cpp rotates neighbouring pairs of a head's dimensions, as Meta does: the rows of wq and wk
stand in that order. Norms are float32 whatever the type of the rest.

Facts: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's
`conversion/llama.py`.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from raytune_llama.config.errors import UserError
from raytune_llama.merge.gguf_vocabulary import GgufVocabulary, read_vocabulary
from raytune_llama.merge.plan import MergePlan
from raytune_llama.merge.proof import Q8_0_BLOCK_SIZE
from raytune_llama.model.meta.layout import to_half_split_rows, to_interleaved_rows
from raytune_llama.model.tensors import TensorSpec

logger = logging.getLogger(__name__)

GgufType = Literal["f16", "q8_0", "f32"]

ROPE_FACTORS = "rope_freqs.weight"
"""By what LLaMA 3.1 divides each rotary frequency."""

_KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "f32": Kind.F32}
_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "f32": gguf.LlamaFileType.ALL_F32,
}
_DTYPES = {Kind.F16: torch.float16, Kind.F32: torch.float32, Kind.Q8_0: torch.uint8}
_CONSTANT = ".rotary_emb.inv_freq"
"""What old versions of transformers wrote beside the weights; llama.cpp computes it."""
_BLOCK_BYTES = Q8_0_BLOCK_SIZE + 2


@dataclass(frozen=True)
class GgufTensor:
    """A weight in the file."""

    name: str
    """Its name there."""
    kind: Kind
    """Its type there."""
    num_rotated_heads: int | None
    """Heads whose rows stand in another order there."""
    spec: TensorSpec
    """How it is stored: blocks of 8-bit numbers as rows of bytes."""


@dataclass(frozen=True)
class GgufModelSpec:
    """How a merged model is said in GGUF."""

    config: LlamaConfig
    """transformers' settings."""
    gguf_type: GgufType
    """Type of the matrices."""
    vocabulary: GgufVocabulary
    """The tokenizer."""
    tensors: Mapping[str, GgufTensor]
    """By transformers' names, in the order of the file."""

    @property
    def blocks(self) -> frozenset[str]:
        """The weights that are written as 8-bit blocks."""
        return frozenset(name for name, t in self.tensors.items() if t.kind == Kind.Q8_0)


def gguf_dtype(gguf_type: GgufType, spec: TensorSpec) -> torch.dtype:
    """Return the type that a merged weight has before it becomes blocks, if it does."""
    is_half = gguf_type == "f16" and len(spec.shape) > 1
    return torch.float16 if is_half else torch.float32


def plan_gguf(plan: MergePlan, gguf_type: GgufType) -> GgufModelSpec:
    """Find out how a merged model is said in GGUF.

    Raises:
        ValueError: llama.cpp has no LLaMA like it, or not in this type.
    """
    if plan.settings.get("model_type") != "llama":
        raise UserError(
            f"output_format: {plan.base_dir} is a {plan.settings.get('model_type')}, and gguf is "
            "written of LLaMAs alone; write huggingface"
        )
    if plan.tokenizer_dir is None:
        raise UserError(
            f"output_format: gguf holds the tokenizer too, and neither {plan.base_dir} nor an "
            "adapter has one; put it into the base's directory"
        )
    config = LlamaConfig.from_dict(dict(plan.settings))
    _check_config(plan.base_dir, config)
    tensors = dict(_tensors(plan, config, gguf_type))
    vocabulary = read_vocabulary(plan.tokenizer_dir, config.vocab_size)
    return GgufModelSpec(config, gguf_type, vocabulary, tensors)


def _check_config(base_dir: Path, config: LlamaConfig) -> None:
    rope = _rope(config)
    problems = [
        f"output_format: llama.cpp knows no LLaMA with {field} {value!r}, as {base_dir} has it; "
        "write huggingface"
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
            logger.info("%s is left out: llama.cpp computes it", name)
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name is None:
            raise UserError(
                f"output_format: {plan.base_dir} holds {name}, for which a LLaMA of GGUF has no "
                "place; write huggingface"
            )
        kind = Kind.F32 if len(spec.shape) == 1 else _KINDS[gguf_type]
        shape = spec.shape
        if kind == Kind.Q8_0:
            if shape[-1] % Q8_0_BLOCK_SIZE:
                raise UserError(
                    f"gguf_type: q8_0 has blocks of {Q8_0_BLOCK_SIZE}, and the rows of {name} are "
                    f"{shape[-1]} long; take f16"
                )
            shape = (*shape[:-1], shape[-1] // Q8_0_BLOCK_SIZE * _BLOCK_BYTES)
        rotated = heads.get(name.removesuffix(".weight").rpartition(".")[2])
        yield name, GgufTensor(gguf_name, kind, rotated, TensorSpec(_DTYPES[kind], shape))


def write_gguf(path: Path, plan: MergePlan, form: GgufModelSpec) -> None:
    """Write the file; `plan` has the types that `gguf_dtype` says.

    Raises:
        ValueError: A value is beyond what float16 holds.
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
    """Compute a weight as rows of 8-bit blocks."""
    stored = torch.empty(tensor.spec.shape, dtype=torch.uint8)
    for rows, part in plan.iterate_row_slices(name):
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
    """Return by what the frequencies are divided; None where they are as the base has them."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    assert config.head_dim is not None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return (1.0 / (rope["rope_theta"] ** exponents) / scaled).numpy()


class GgufWeights:
    """The weights of a GGUF file under transformers' names and in its order of rows."""

    def __init__(self, path: Path, form: GgufModelSpec) -> None:
        """Read the header.

        Raises:
            AssertionError: The file does not hold what `form` says.
        """
        self._path = path
        self._form = form
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._offsets: dict[str, int] = {}
        for name, tensor in form.tensors.items():
            there = found.get(tensor.name)
            if there is None or (there.tensor_type, there.n_bytes) != (
                tensor.kind,
                tensor.spec.num_bytes,
            ):
                raise AssertionError(f"{path.name} does not hold {name} as it was to be written")
            self._offsets[name] = there.data_offset

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
