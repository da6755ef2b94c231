"""Meta's form of a LLaMA: params.json, and how each tensor is named, turned and cut into shards.

Meta rotates neighbouring pairs of a head's dimensions, transformers its two halves. So the rows of
wq and wk stand in another order there; nothing is computed, and both ways are exact.

Facts: https://github.com/meta-llama/llama (model.py, LLaMA 1 and 2), and transformers'
`convert_llama_weights_to_hf.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor
from transformers import LlamaConfig

from raytune_llama.config.errors import UserError

PARAMS = "params.json"
ROPE_FREQUENCIES = "rope.freqs"
"""A constant that each of Meta's shards carries, and transformers computes."""

_PUBLISHED_SHARDS = {4096: 1, 5120: 2, 6656: 4, 8192: 8}
"""Files by width, of 7B, 13B, 33B and 65B or 70B."""
_MULTIPLES = (256, 4096, 1024, 512, 128, 64, 32, 16)
_CONFIG = pydantic.ConfigDict(extra="forbid")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_CONFIG)
class MetaParams:
    """What params.json holds."""

    dim: int
    """Width of the model."""
    n_layers: int
    """Layers."""
    n_heads: int
    """Heads of queries."""
    n_kv_heads: int | None = None
    """Heads of keys and values; None: as many."""
    vocab_size: int = -1
    """Rows of the embedding; -1 leaves it to the tokenizer."""
    multiple_of: int = 256
    """The width of the feed-forward layer is rounded up to a multiple of it."""
    ffn_dim_multiplier: float | None = None
    """That width is multiplied by it before."""
    norm_eps: float = 1e-5
    """Of the norms."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    max_seq_len: int | None = None
    """Not used; some files have it."""
    max_batch_size: int | None = None
    """Not used; some files have it."""

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.dim // self.n_heads

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layer, as Meta's code computes it."""
        width = 2 * (4 * self.dim) // 3
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    def rope_frequencies(self, dtype: torch.dtype) -> Tensor:
        """Return the rotary frequencies, [head_dim / 2]."""
        exponents = torch.arange(0, self.head_dim, 2)[: self.head_dim // 2].float()
        return (1.0 / (self.rope_theta ** (exponents / self.head_dim))).to(dtype)


@dataclass(frozen=True)
class MetaTensor:
    """A weight under both its names."""

    name: str
    """Meta's."""
    hf_name: str
    """transformers'."""
    axis: int | None
    """Along which shards cut it; None: each has all of it."""
    num_rotated_heads: int | None = None
    """Heads whose rows stand in another order there."""


def meta_tensors(params: MetaParams) -> Iterator[MetaTensor]:
    """Yield all weights of a model, in transformers' order."""
    yield MetaTensor("tok_embeddings.weight", "model.embed_tokens.weight", 1)
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
    """Return the shape of a whole weight."""
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
    """Bring the rows of wq or wk from Meta's order into transformers'."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def to_interleaved_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Do the reverse of `to_half_split_rows`."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def shard_ranges(length: int, num_shards: int) -> list[tuple[int, int]]:
    """Return where each shard's part of an axis starts and stops; the last one takes the rest."""
    each = length // num_shards
    starts = [number * each for number in range(num_shards)]
    return list(zip(starts, [*starts[1:], length], strict=True))


def count_published_shards(params: MetaParams) -> int:
    """Return into how many files Meta cut a model of this width; 1 for widths it never had."""
    return _PUBLISHED_SHARDS.get(params.dim, 1)


def build_llama_config(
    params: MetaParams, vocabulary: int, max_position_embeddings: int
) -> LlamaConfig:
    """Return transformers' config of a model."""
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
        rope_parameters={"rope_type": "default", "rope_theta": params.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def build_meta_params(config: LlamaConfig) -> MetaParams:
    """Return what Meta's params.json says of a model of transformers'.

    Raises:
        ValueError: Meta's form cannot say what the config does.
    """
    values: dict[str, Any] = config.to_dict()
    rope = values.get("rope_parameters") or {}
    problems: list[str] = []
    if values.get("model_type") != "llama":
        problems.append(f"model_type: got {values.get('model_type')!r}, wanted 'llama'")
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters: {rope['rope_type']!r} cannot be said in params.json")
    problems += [
        f"{name}: Meta's form has no biases"
        for name in ("attention_bias", "mlp_bias")
        if values.get(name)
    ]
    heads, dim = config.num_attention_heads, config.hidden_size
    if (values.get("head_dim") or dim // heads) * heads != dim:
        problems.append(f"head_dim: {heads} heads of {values['head_dim']} are not {dim} together")
    if problems:
        raise UserError("\n".join(problems))
    kv_heads = config.num_key_value_heads or heads
    fields: dict[str, Any] = {
        "dim": dim,
        "n_layers": config.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads if kv_heads != heads else None,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
    }
    return MetaParams(**fields, **_width_fields(dim, config.intermediate_size))


def _width_fields(dim: int, intermediate: int) -> dict[str, Any]:
    """Return fields from which Meta's code computes a width of the feed-forward layer."""
    for multiple in _MULTIPLES:
        for multiplier in (None, 1.3):
            fields = {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
            if MetaParams(dim=dim, n_layers=1, n_heads=1, **fields).intermediate == intermediate:
                return fields
    # Half a row more, so that rounding down always ends where it should.
    multiplier = (intermediate + 0.5) / (2 * (4 * dim) // 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}


def check_num_shards(params: MetaParams, num_shards: int) -> list[str]:
    """Return why a model cannot be cut into so many shards; empty where it can."""
    numbers = {
        "heads": params.n_heads,
        "heads of keys and values": params.num_kv_heads,
        "feed-forward dimensions": params.intermediate,
        "dimensions": params.dim,
    }
    return [
        f"num_shards: {number} {name} cannot be shared by {num_shards}; the largest number that "
        f"works is {math.gcd(*numbers.values())}"
        for name, number in numbers.items()
        if number % num_shards
    ]


def check_target(target: Path) -> None:
    """Refuse a target that holds anything; an empty directory makes room for it.

    Raises:
        ValueError: It is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"target: {target} exists and is not empty; choose another place")
    if target.is_dir():
        target.rmdir()
