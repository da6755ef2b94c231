"""Meta's computation of a LLaMA, and its tokenizers, written for the tests from Meta's own code."""

from typing import Any

import tiktoken
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from raytune_llama.model.meta.layout import MetaParams, shard_ranges

AXES = {
    "tok_embeddings": 1,
    "wo": 1,
    "w2": 1,
    "norm": None,
    "attention_norm": None,
    "ffn_norm": None,
}
"""Axis by which LLaMA 1 and 2 are sharded, 0 for the others."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

OTHERS = (*range(33), *range(127, 161), 173)
"""Bytes that the alphabet of a tokenizer.json writes as another character."""

LAYER = (
    *("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm"),
)


def random_tensors(
    params: MetaParams,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float16,
    is_tied: bool = False,
) -> dict[str, Tensor]:
    """Make the whole weights of a model, under Meta's names."""
    generator = torch.Generator().manual_seed(1)
    dim, kv_dim, wide = params.dim, params.num_kv_heads * params.head_dim, params.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (vocabulary, dim),
        "norm.weight": (dim,),
        "output.weight": (vocabulary, dim),
    }
    for layer in range(params.n_layers):
        for name, shape in {
            "attention.wq": (dim, dim),
            "attention.wk": (kv_dim, dim),
            "attention.wv": (kv_dim, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (wide, dim),
            "feed_forward.w2": (dim, wide),
            "feed_forward.w3": (wide, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.2).to(dtype)
        for name, shape in shapes.items()
    }
    if is_tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    return tensors


def shard(
    tensors: dict[str, Tensor], num_shards: int, *, embedding_axis: int = 1
) -> list[dict[str, Tensor]]:
    """Split whole weights as Meta's model parallelism does."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
    axes = AXES | {"tok_embeddings": embedding_axis}
    for name, tensor in tensors.items():
        axis = axes.get(name.split(".")[-2], 0)
        for number, part in enumerate(shards):
            if axis is None:
                part[name] = tensor.clone()
            else:
                start, stop = shard_ranges(tensor.shape[axis], num_shards)[number]
                part[name] = tensor.narrow(axis, start, stop - start).clone()
    return shards


def scaled(frequencies: Tensor, factor: float) -> Tensor:
    """Scale rotary frequencies as `apply_scaling` of Meta's code does, one after another."""
    low, high, context = 1.0, 4.0, 8192
    values = []
    for frequency in frequencies.tolist():
        wavelength = 2 * torch.pi / frequency
        if wavelength < context / high:
            values.append(frequency)
        elif wavelength > context / low:
            values.append(frequency / factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            values.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.tensor(values)


def meta_logits(
    weights: dict[str, Tensor], params: MetaParams, ids: Tensor, factor: float | None = None
) -> Tensor:
    """Compute a LLaMA as Meta's paper and model do: neighboring dimensions are rotated."""
    length, heads, size = len(ids), params.n_heads, params.head_dim
    frequencies = params.rope_theta ** (-torch.arange(0, size, 2).float() / size)
    if factor is not None:
        frequencies = scaled(frequencies, factor)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params.norm_eps) * weight

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    hidden = weights["tok_embeddings.weight"][ids]
    mask = torch.full((length, length), float("-inf")).triu(1)
    for layer in range(params.n_layers):
        own = {name: weights[f"layers.{layer}.{name}.weight"] for name in LAYER}
        x = norm(hidden, own["attention_norm"])
        q = rotated((x @ own["attention.wq"].T).view(length, heads, size))
        k = rotated((x @ own["attention.wk"].T).view(length, params.num_kv_heads, size))
        v = (x @ own["attention.wv"].T).view(length, params.num_kv_heads, size)
        k, v = (t.repeat_interleave(heads // params.num_kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1)
        hidden = hidden + mixed @ own["attention.wo"].T
        x = norm(hidden, own["ffn_norm"])
        gate = torch.nn.functional.silu(x @ own["feed_forward.w1"].T)
        hidden = hidden + (gate * (x @ own["feed_forward.w3"].T)) @ own["feed_forward.w2"].T
    return norm(hidden, weights["norm.weight"]) @ weights["output.weight"].T


def contents(folder: Any) -> list[dict[str, Tensor]]:  # noqa: ANN401 - a Path
    """Load all shards of a directory."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]


def train_ranks(texts: list[str], num_tokens: int) -> dict[bytes, int]:
    """Train a vocabulary for tiktoken: all bytes, and what merges of bytes give."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    # In a ByteLevel alphabet the printable bytes of Latin-1 are themselves, the others are moved.
    moved = dict(zip(sorted(c for c in alphabet if ord(c) > 255), OTHERS, strict=True))
    return {
        bytes(moved.get(character, ord(character)) for character in token): id_
        for token, id_ in trained.get_vocab().items()
    }


def meta_encoding(ranks: dict[bytes, int], controls: list[str]) -> tiktoken.Encoding:
    """Build the encoding of Meta's tokenizer.py."""
    return tiktoken.Encoding(
        "llama3",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + place for place, name in enumerate(controls)},
    )
