"""Meta's format of a LLaMA: params.json, and how each tensor is named, permuted and sharded.

Meta rotates adjacent pairs of a head's dimensions, transformers its two halves. The rows of wq and
wk are therefore in another order; conversion only permutes them, and is exact in both directions.
The shards of LLaMA 1 and 2 split the embedding by columns, those of LLaMA 3 by rows.

Sources: https://github.com/meta-llama/llama (model.py, LLaMA 1 and 2),
https://github.com/meta-llama/llama-models (models/llama3), and transformers'
`convert_llama_weights_to_hf.py`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor
from transformers import LlamaConfig

from raytune_llama.config.errors import UserError

PARAMS = "params.json"
ROPE_FREQUENCIES = "rope.freqs"
"""Name of a constant that each of Meta's shards stores, and transformers computes."""

_PUBLISHED_SHARDS = {4096: 1, 5120: 2, 6656: 4, 8192: 8, 16384: 8}
"""Number of files by model width: 7B or 8B, 13B, 33B, 65B or 70B, and 405B."""
_MULTIPLES = (256, 4096, 1024, 512, 128, 64, 32, 16)
_MULTIPLIERS = (None, 1.3, 1.5, 1.2)
_CONFIG = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

META_ROPE_FACTOR = 8.0
"""RoPE factor of `use_scaled_rope` in Meta's code, which no params.json of a release names."""
META_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The other parameters of `use_scaled_rope`, which Meta's code fixes, under transformers' names."""

_Count = Annotated[int, pydantic.Field(ge=1)]
_Positive = Annotated[float, pydantic.Field(gt=0)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_CONFIG)
class MetaParams:
    """The content of params.json."""

    dim: _Count
    """Width of the model."""
    n_layers: _Count
    """Number of layers."""
    n_heads: _Count
    """Number of query heads."""
    n_kv_heads: _Count | None = None
    """Number of key-value heads; None: the number of query heads."""
    vocab_size: int = -1
    """Number of embedding rows; -1: the size of the tokenizer."""
    multiple_of: _Count = 256
    """The feed-forward width is rounded up to a multiple of this value."""
    ffn_dim_multiplier: _Positive | None = None
    """Factor of the feed-forward width before rounding; None: 1."""
    norm_eps: _Positive = 1e-5
    """Epsilon of the RMS norms."""
    rope_theta: _Positive = 10000.0
    """Base of the rotary frequencies."""
    use_scaled_rope: bool = False
    """Whether the rotary frequencies are scaled, as in LLaMA 3.1 and later."""
    rope_scaling_factor: Annotated[float, pydantic.Field(ge=1)] | None = None
    """Factor of `use_scaled_rope`; None: `META_ROPE_FACTOR`."""
    max_seq_len: int | None = None
    """Not used; some files have it."""
    max_batch_size: int | None = None
    """Not used; some files have it."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "MetaParams":
        if self.dim % (2 * self.n_heads):
            raise ValueError(
                f"dim {self.dim} is not an even number for each of {self.n_heads} heads"
            )
        if self.n_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.n_heads} heads cannot share {self.num_kv_heads} key-value heads"
            )
        if self.vocab_size != -1 and self.vocab_size < 1:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted a number of rows or -1")
        if self.rope_scaling_factor is not None and not self.use_scaled_rope:
            raise ValueError("rope_scaling_factor is set, but use_scaled_rope is not")
        return self

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """Number of dimensions per head."""
        return self.dim // self.n_heads

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layer, as Meta's code computes it."""
        width = 2 * (4 * self.dim) // 3
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    def rope_frequencies(self, dtype: torch.dtype) -> Tensor:
        """Return the rotary frequencies, shape (head_dim / 2,)."""
        exponents = torch.arange(0, self.head_dim, 2)[: self.head_dim // 2].float()
        return (1.0 / (self.rope_theta ** (exponents / self.head_dim))).to(dtype)


@dataclass(frozen=True)
class MetaTensor:
    """A weight in both formats."""

    name: str
    """Name in Meta's format."""
    hf_name: str
    """Name in transformers."""
    axis: int | None
    """Axis along which it is sharded; None: each shard has a full copy."""
    num_rotated_heads: int | None = None
    """Number of heads whose rows the formats order differently; None: the row order is the same."""


def meta_tensors(params: MetaParams, *, embedding_axis: int = 1) -> Iterator[MetaTensor]:
    """Yield all weights of a model, in transformers' order.

    Args:
        params: The content of params.json.
        embedding_axis: Axis along which the embedding is sharded: 1 in LLaMA 1 and 2, 0 in LLaMA 3.
    """
    yield MetaTensor("tok_embeddings.weight", "model.embed_tokens.weight", embedding_axis)
    for layer in range(params.n_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for name, hf_name, axis, heads in (
            ("attention.wq", "self_attn.q_proj", 0, params.n_heads),
            ("attention.wk", "self_attn.k_proj", 0, params.num_kv_heads),
            ("attention.wv", "self_attn.v_proj", 0, None),
            ("attention.wo", "self_attn.o_proj", 1, None),
            ("feed_forward.w1", "mlp.gate_proj", 0, None),
            ("feed_forward.w3", "mlp.up_proj", 0, None),
            ("feed_forward.w2", "mlp.down_proj", 1, None),
            ("attention_norm", "input_layernorm", None, None),
            ("ffn_norm", "post_attention_layernorm", None, None),
        ):
            yield MetaTensor(f"{ours}.{name}.weight", f"{theirs}.{hf_name}.weight", axis, heads)
    yield MetaTensor("norm.weight", "model.norm.weight", None)
    yield MetaTensor("output.weight", "lm_head.weight", 0)


def expected_shape(tensor: MetaTensor, params: MetaParams, vocabulary: int) -> tuple[int, ...]:
    """Return the shape of an unsharded weight."""
    dim, kv_dim = params.dim, params.num_kv_heads * params.head_dim
    kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (vocabulary, dim),
        "output": (vocabulary, dim),
        "wq": (dim, dim),
        "wk": (kv_dim, dim),
        "wv": (kv_dim, dim),
        "wo": (dim, dim),
        "w1": (params.intermediate, dim),
        "w3": (params.intermediate, dim),
        "w2": (dim, params.intermediate),
    }
    return shapes.get(kind, (dim,))


def to_half_split_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Permute the rows of wq or wk from Meta's order to transformers'."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def to_interleaved_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Permute the rows of wq or wk from transformers' order to Meta's."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def shard_ranges(length: int, num_shards: int) -> list[tuple[int, int]]:
    """Return the start and stop of each shard along an axis; the last takes the remainder."""
    each = length // num_shards
    starts = [number * each for number in range(num_shards)]
    return list(zip(starts, [*starts[1:], length], strict=True))


def count_published_shards(params: MetaParams) -> int:
    """Return the number of files that Meta published for this width; 1 if it published none."""
    return _PUBLISHED_SHARDS.get(params.dim, 1)


def build_llama_config(
    params: MetaParams,
    vocabulary: int,
    max_position_embeddings: int,
    *,
    bos: int = 1,
    eos: int | list[int] = 2,
    is_tied: bool = False,
) -> LlamaConfig:
    """Return transformers' config of a model with these params."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta}
    if params.use_scaled_rope:
        factor = params.rope_scaling_factor or META_ROPE_FACTOR
        rope |= {"rope_type": "llama3", "factor": factor, **META_ROPE}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=params.dim,
        intermediate_size=params.intermediate,
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.num_kv_heads,
        rms_norm_eps=params.norm_eps,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=rope,
        tie_word_embeddings=is_tied,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=None,
    )


def build_meta_params(config: LlamaConfig) -> MetaParams:
    """Return the params.json of a model, from its transformers config.

    Raises:
        ValueError: Meta's format cannot express the config.
    """
    values: dict[str, Any] = config.to_dict()
    rope = values.get("rope_parameters") or {}
    problems = [*_check_rope(rope)]
    if values.get("model_type") != "llama":
        problems.append(f"model_type: got {values.get('model_type')!r}, wanted 'llama'")
    if values.get("hidden_act", "silu") not in {"silu", "swish"}:
        problems.append(
            f"hidden_act: got {values['hidden_act']!r}, but Meta's format has only silu"
        )
    problems += [
        f"{name}: Meta's format has no biases"
        for name in ("attention_bias", "mlp_bias")
        if values.get(name)
    ]
    heads, dim = config.num_attention_heads, config.hidden_size
    if (values.get("head_dim") or dim // heads) * heads != dim:
        problems.append(
            f"head_dim: {heads} heads of {values['head_dim']} do not add up to hidden_size {dim}"
        )
    if problems:
        raise UserError("\n".join(problems))
    kv_heads = config.num_key_value_heads or heads
    fields: dict[str, Any] = {
        "dim": dim,
        "n_layers": config.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads if kv_heads != heads else None,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
    }
    if rope.get("rope_type", "default") == "llama3":
        # Named even where it is Meta's own: without it, it would depend on tied embeddings.
        fields |= {"use_scaled_rope": True, "rope_scaling_factor": float(rope["factor"])}
    return MetaParams(**fields, **_width_fields(dim, config.intermediate_size))


def _check_rope(rope: Mapping[str, Any]) -> list[str]:
    """Return what of a model's rotary parameters params.json cannot express."""
    kind = rope.get("rope_type", "default")
    if kind not in {"default", "llama3"}:
        return [
            f"rope_parameters: {kind!r} cannot be expressed in params.json, which has only "
            "use_scaled_rope, transformers' 'llama3'"
        ]
    wanted = META_ROPE if kind == "llama3" else {}
    problems = [
        f"rope_parameters.{name}: got {rope.get(name)}, but use_scaled_rope of params.json always "
        f"means {value:g}"
        for name, value in wanted.items()
        if rope.get(name) != value
    ]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            "rope_parameters.partial_rotary_factor: Meta's format rotates all of a head"
        )
    return problems


def _width_fields(dim: int, intermediate: int) -> dict[str, Any]:
    """Return the fields from which Meta's code computes this feed-forward width."""
    for multiple in _MULTIPLES:
        for multiplier in _MULTIPLIERS:
            fields = {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
            if MetaParams(dim=dim, n_layers=1, n_heads=1, **fields).intermediate == intermediate:
                return fields
    # Half a row extra, so that rounding down gives the exact width.
    multiplier = (intermediate + 0.5) / (2 * (4 * dim) // 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}


def check_num_shards(params: MetaParams, num_shards: int) -> list[str]:
    """Return why a model cannot be split into this number of shards; empty if it can."""
    counts = {
        "heads": params.n_heads,
        "key-value heads": params.num_kv_heads,
        "feed-forward dimensions": params.intermediate,
        "dimensions": params.dim,
    }
    return [
        f"num_shards: {number} {name} cannot be split into {num_shards} shards; the largest number "
        f"that works is {math.gcd(*counts.values())}"
        for name, number in counts.items()
        if number % num_shards
    ]


def check_target(target: Path) -> None:
    """Refuse a target that is not empty, and remove one that is.

    Raises:
        ValueError: The target exists and is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"target: {target} exists and is not empty; choose another directory")
    if target.is_dir():
        target.rmdir()


_ORIGINALS = {
    "700df0d3013b703a806d2ae7f1bfb8e59814e3d06ae78be0c66368a50059f33d": "LLaMA 7B, file 1 of 1",
    "745bf4e29a4dd6f411e72976d92b452da1b49168a4f41c951cfcc8051823cf08": "LLaMA 13B, file 1 of 2",
    "d5ccbcc465c71c0de439a5aeffebe8344c68a519bce70bc7f9f92654ee567085": "LLaMA 13B, file 2 of 2",
    "e23294a58552d8cdec5b7e8abb87993b97ea6eced4178ff2697c02472539d067": "LLaMA 33B, file 1 of 4",
    "4e077b7136c7ae2302e954860cf64930458d3076fcde9443f4d0e939e95903ff": "LLaMA 33B, file 2 of 4",
    "24a87f01028cbd3a12de551dcedb712346c0b5cbdeff1454e0ddf2df9b675378": "LLaMA 33B, file 3 of 4",
    "1adfcef71420886119544949767f6a56cb6339b4d5fcde755d80fe68b49de93b": "LLaMA 33B, file 4 of 4",
    "0087155d6df07106c1d910bfeb6aab1be8e612dfbf2b56ddfb4ccbde7dbd50d0": "LLaMA 7B of transformers",
    "461bc5e50200db7813ff99cc0b9316c48ccbd6aaaa31bf8cf7bee0b64bc3eda3": "LLaMA 7B of transformers",
}


def find_published_name(sha256: str) -> str | None:
    """Return the name of the published file with this hash, or None."""
    return _ORIGINALS.get(sha256)
