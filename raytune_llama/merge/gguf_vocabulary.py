"""A tokenizer as GGUF says it: tokens, their kinds, and by what rule llama.cpp splits text.

llama.cpp has two rules that LLaMAs use: "llama" is SentencePiece's merging by scores, "gpt2" merges
bytes by rank behind a pre-tokenizer that the file only names. A tokenizer that does something else
is refused: it would get other ids without a word.

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
"""How LLaMA 3 splits text; it is a part of its tokenizer.json."""

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
"""The steps of tokenizer.json that llama.cpp knows by a name."""
_WHOLE_WORDS = ("llama-bpe",)
"""Those with which llama.cpp takes a word that is a token as it is, without merging."""

_SCORE_OF_ADDED, _SCORE_OF_PADDING = -1000.0, -10000.0


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """llama.cpp's rule: llama or gpt2."""
    pre: str
    """Its name for the pre-tokenizer."""
    tokens: list[str]
    """A token a row of the embedding, by id."""
    types: list[int]
    """Their kinds, as `gguf.TokenType`."""
    scores: list[float] | None
    """Their scores, for llama."""
    merges: list[str] | None
    """Pairs of tokens by rank, for gpt2."""
    ids: Mapping[str, int]
    """Ids of bos, eos, unk and pad, of those that there are."""
    adds_bos: bool
    """Whether the tokenizer puts bos before a text."""
    adds_eos: bool
    """Whether it puts eos behind it."""
    adds_space: bool | None
    """Whether a space goes before a text, for llama."""
    template: str | None
    """The chat template."""

    def write(self, writer: GGUFWriter) -> None:
        """Put all of it into a file's metadata."""
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


def read_vocabulary(path: Path, num_rows: int) -> GgufVocabulary:
    """Say a tokenizer's directory in GGUF's words.

    Args:
        path: The directory.
        num_rows: Rows of the embedding; those behind the tokenizer's ids become unused tokens.

    Raises:
        ValueError: llama.cpp would give a text other ids.
    """
    tokenizer = load_tokenizer(path)
    reference = build_reference_encoder(tokenizer)
    if isinstance(reference, SentencePieceReference):
        parts = _pieces(path, reference, tokenizer, num_rows)
    else:
        parts = _byte_pairs(path, reference.engine, tokenizer, num_rows)
    num_unused = parts["types"].count(TokenType.UNUSED)
    if num_unused:
        logger.info("%d of %d rows stand for no token", num_unused, num_rows)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
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
            f"output_format: llama.cpp has no rule for the tokenizer.model of {path}, which is no "
            "BPE with byte fallback of characters as they are; write huggingface"
        )
    tokens, types = _rows(num_rows)
    scores = [_SCORE_OF_PADDING] * num_rows
    for id_, piece in enumerate(reference.proto.pieces):
        # Both count kinds of pieces alike.
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
    """Return llama.cpp's name for how an engine splits text.

    Raises:
        ValueError: It has none.
    """
    known = f"llama.cpp knows {', '.join(PRE_TOKENIZERS)}; write huggingface, or use another name"
    model, first = engine["model"], engine["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    if model["type"] != "BPE" or model.get("byte_fallback") or engine["normalizer"] is not None:
        raise UserError(
            f"output_format: the tokenizer of {path} is no BPE of bytes without a normalizer, and "
            f"{known}"
        )
    for name, wanted in PRE_TOKENIZERS.items():
        if len(steps) == len(wanted) and all(
            all(step.get(key) == value for key, value in goal.items())
            for step, goal in zip(steps, wanted, strict=True)
        ):
            if bool(model.get("ignore_merges")) != (name in _WHOLE_WORDS):
                break
            return name
    raise UserError(
        f"output_format: the pre-tokenizer of {path} is {[step.get('type') for step in steps]} "
        f"with settings of its own, and {known}"
    )


def _rows(num_rows: int) -> tuple[list[str], list[int]]:
    """Return tokens that nothing has: their names have to differ."""
    return [f"[PAD{id_}]" for id_ in range(num_rows)], [int(TokenType.UNUSED)] * num_rows


def _template(path: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        logger.warning("%s has %d chat templates: only the default is written", path, len(template))
        template = template.get("default")
    return template
