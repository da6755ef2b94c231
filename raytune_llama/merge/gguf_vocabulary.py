"""Convert a tokenizer to GGUF: tokens, their types, and the rule by which llama.cpp splits text.

llama.cpp has two rules that LLaMAs use: "llama" is SentencePiece's merging by scores, "gpt2" merges
bytes by rank after a pre-tokenizer that the file only names. Any other tokenizer is rejected: it
would silently produce other ids.

Facts: https://github.com/ggml-org/llama.cpp (src/llama-vocab.cpp, conversion/base.py).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerFast

from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.loader import (
    build_reference_encoder,
    control_token_ids,
    load_tokenizer,
)
from raytune_llama.tokenizer.reference import SentencePieceReference, is_plain_merging

logger = logging.getLogger(__name__)

LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""LLaMA 3's pre-tokenizer pattern, from its tokenizer.json."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_ONLY_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA_3 = {
    "type": "Split",
    "pattern": {"Regex": LLAMA_3_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [_DIGITS, _BYTES],
    "llama-bpe": [_LLAMA_3, _ONLY_BYTES],
}
"""Pre-tokenizer steps of tokenizer.json, by llama.cpp's name for them."""
_IGNORES_MERGES = ("llama-bpe",)
"""Pre-tokenizers with which llama.cpp looks up a word as a token before it merges."""

_SCORE_OF_ADDED, _SCORE_OF_PADDING = -1000.0, -10000.0


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """A tokenizer in the form of GGUF's metadata."""

    model: str
    """llama.cpp's tokenization rule: llama or gpt2."""
    pre: str
    """llama.cpp's name for the pre-tokenizer."""
    tokens: list[str]
    """Tokens by id, one per row of the embedding."""
    types: list[int]
    """Type of each token, as `gguf.TokenType`."""
    scores: list[float] | None
    """Score of each token, for llama; else None."""
    merges: list[str] | None
    """Pairs of tokens by rank, for gpt2; else None."""
    ids: Mapping[str, int]
    """Ids of those of bos, eos, eot, unk and pad that exist; eot ends an answer besides eos."""
    adds_bos: bool
    """Whether the tokenizer prepends bos to a text."""
    adds_eos: bool
    """Whether the tokenizer appends eos to a text."""
    adds_space: bool | None
    """Whether the tokenizer prepends a space to a text, for llama; else None."""
    template: str | None
    """Chat template, if any."""

    def write(self, writer: GGUFWriter) -> None:
        """Write the tokenizer to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, id_ in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(id_)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.adds_space is not None:
            writer.add_add_space_prefix(self.adds_space)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(
    path: Path, num_rows: int, stop_ids: frozenset[int] = frozenset()
) -> GgufVocabulary:
    """Convert the tokenizer of a directory to GGUF's form.

    Args:
        path: Directory of the tokenizer.
        num_rows: Rows of the embedding; those after the tokenizer's ids become unused tokens.
        stop_ids: Ids that end an answer in the chat template.

    Raises:
        ValueError: llama.cpp would encode text to other ids.
    """
    tokenizer = load_tokenizer(path)
    reference = build_reference_encoder(tokenizer)
    if isinstance(reference, SentencePieceReference):
        parts = _pieces(path, reference, tokenizer, num_rows)
    else:
        parts = _byte_pairs(path, reference.engine, tokenizer, num_rows)
    num_unused = parts["types"].count(TokenType.UNUSED)
    if num_unused:
        logger.info("%d of %d embedding rows have no token", num_unused, num_rows)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    others = sorted(stop_ids - {ids["eos"]})
    ids["eot"] = others[0] if others else None
    text = tokenizer("a")["input_ids"]
    return GgufVocabulary(
        **parts,
        ids={name: id_ for name, id_ in ids.items() if id_ is not None},
        adds_bos=ids["bos"] is not None and text[0] == ids["bos"],
        adds_eos=ids["eos"] is not None and text[-1] == ids["eos"],
        template=_template(path, tokenizer),
    )


def _pieces(
    path: Path, reference: SentencePieceReference, tokenizer: PreTrainedTokenizerFast, num_rows: int
) -> dict[str, Any]:
    if not is_plain_merging(reference.proto):
        raise UserError(
            f"output_format: llama.cpp has no rule for the tokenizer.model of {path}, which is not "
            "a plain BPE with byte fallback and without normalization; use huggingface"
        )
    tokens, types = _rows(num_rows)
    scores = [_SCORE_OF_PADDING] * num_rows
    for id_, piece in enumerate(reference.proto.pieces):
        # SentencePiece and GGUF number the types of pieces alike.
        tokens[id_], types[id_], scores[id_] = piece.piece, int(piece.type), piece.score
    controls = control_token_ids(tokenizer)
    for id_, token in tokenizer.added_tokens_decoder.items():
        if id_ >= len(reference.proto.pieces):
            kind = TokenType.CONTROL if id_ in controls else TokenType.USER_DEFINED
            tokens[id_], types[id_], scores[id_] = token.content, int(kind), _SCORE_OF_ADDED
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "types": types,
        "scores": scores,
        "merges": None,
        "adds_space": bool(reference.proto.normalizer_spec.add_dummy_prefix),
    }


def _byte_pairs(
    path: Path, engine: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, num_rows: int
) -> dict[str, Any]:
    model = engine["model"]
    pre = _pre_tokenizer(path, engine)
    tokens, types = _rows(num_rows)
    for token, id_ in model["vocab"].items():
        tokens[id_], types[id_] = token, int(TokenType.NORMAL)
    controls = control_token_ids(tokenizer)
    for id_, token in tokenizer.added_tokens_decoder.items():
        kind = TokenType.CONTROL if id_ in controls else TokenType.USER_DEFINED
        tokens[id_], types[id_] = token.content, int(kind)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "types": types,
        "scores": None,
        "merges": [" ".join(pair) for pair in pairs],
        "adds_space": None,
    }


def _pre_tokenizer(path: Path, engine: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of an engine.

    Raises:
        ValueError: llama.cpp has no name for it.
    """
    known = f"llama.cpp knows {', '.join(PRE_TOKENIZERS)}; use output_format huggingface"
    model, first = engine["model"], engine["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    if model["type"] != "BPE" or model.get("byte_fallback") or engine["normalizer"] is not None:
        raise UserError(
            f"output_format: the tokenizer of {path} is not a byte-level BPE without a normalizer, "
            f"and {known}"
        )
    for name, wanted in PRE_TOKENIZERS.items():
        if len(steps) == len(wanted) and all(
            all(step.get(key) == value for key, value in goal.items())
            for step, goal in zip(steps, wanted, strict=True)
        ):
            if bool(model.get("ignore_merges")) != (name in _IGNORES_MERGES):
                break
            return name
    raise UserError(
        f"output_format: the pre-tokenizer of {path}, {[step.get('type') for step in steps]}, has "
        f"custom settings, and {known}"
    )


def _rows(num_rows: int) -> tuple[list[str], list[int]]:
    """Return unused tokens for all rows; their names must be unique."""
    return [f"[PAD{id_}]" for id_ in range(num_rows)], [int(TokenType.UNUSED)] * num_rows


def _template(path: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        logger.warning("%s has %d chat templates; writing only the default", path, len(template))
        template = template.get("default")
    return template
