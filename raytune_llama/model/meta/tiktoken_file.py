"""LLaMA 3's tokenizer.model, a file of tiktoken's: one line per token, its bytes and its rank.

    ranks = parse_tiktoken(path.read_bytes(), str(path))
    engine = build_engine(ranks, controls)          # a tokenizer of the `tokenizers` library
    path.write_bytes(dump_tiktoken(engine_ranks(json.loads(engine.to_str()), str(path))))

tiktoken merges the adjacent pair of tokens whose concatenation has the lowest rank, whatever the
two are. `tokenizers` merges listed pairs, in the order of the list: so all pairs of tokens that
concatenate to a token are listed, in the order of its rank.

Sources: https://github.com/openai/tiktoken (load.py), Meta's tokenizer.py (the pattern).
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from raytune_llama.config.errors import UserError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern by which LLaMA 3 splits a text before merging."""

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]+)")
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))


def _byte_characters() -> dict[int, str]:
    """Return the character that stands for each byte in a tokenizer.json, since GPT-2."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    shifted = {byte: chr(256 + number) for number, byte in enumerate(others)}
    return {byte: shifted.get(byte, chr(byte)) for byte in range(256)}


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def is_tiktoken(content: bytes) -> bool:
    """Whether a file begins as tiktoken's do."""
    return _LINE.fullmatch(content.split(b"\n", 1)[0].rstrip(b"\r")) is not None


def parse_tiktoken(content: bytes, name: str) -> dict[bytes, int]:
    """Parse a file of tiktoken's into the rank of each token, in the order of the ranks.

    Raises:
        ValueError: A line is damaged, or ranks or tokens are missing or double; the message begins
            with `name`.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        token = _decode(match[1]) if match else None
        if match is None or token is None:
            raise UserError(
                f"{name}: line {number} is {line[:40]!r}, not a token in base64 and its rank; the "
                "file is damaged, fetch it again"
            )
        if token in ranks:
            raise UserError(
                f"{name}: line {number} repeats the token {token!r} of rank {ranks[token]}; the "
                "file is damaged, fetch it again"
            )
        ranks[token] = int(match[2])
    if sorted(ranks.values()) != list(range(len(ranks))):
        missing = sorted(set(range(len(ranks))) - set(ranks.values()))
        raise UserError(
            f"{name}: has {len(ranks)} tokens, but none of rank {missing[0]}; the file is damaged, "
            "fetch it again"
        )
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise UserError(
            f"{name}: has no token for the byte 0x{lacking[0]:02X}, so that some texts have no "
            "ids; the file is damaged, fetch it again"
        )
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _decode(token: bytes) -> bytes | None:
    try:
        return base64.b64decode(token, validate=True)
    except binascii.Error:
        return None


def dump_tiktoken(ranks: Mapping[bytes, int]) -> bytes:
    """Return the content of a file of tiktoken's, as Meta publishes it."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def build_engine(ranks: Mapping[bytes, int], controls: Sequence[str]) -> Tokenizer:
    """Return a tokenizer whose ids are those of tiktoken with LLaMA 3's pattern.

    Args:
        ranks: Rank of each token: all numbers from 0.
        controls: Control tokens, with the ids after those; the first begins each text.
    """
    vocabulary = {_to_text(token): rank for token, rank in ranks.items()}
    engine = Tokenizer(models.BPE(vocabulary, list(_merges(ranks)), ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in controls]
    )
    bos = (controls[0], engine.token_to_id(controls[0]))
    engine.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos[0]}:0 $A:0",
                pair=f"{bos[0]}:0 $A:0 {bos[0]}:1 $B:1",
                special_tokens=[bos],
            ),
        ]
    )
    return engine


def _to_text(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[str, str]]:
    """Yield all pairs of tokens that concatenate to a token, lowest rank first."""
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        for left, right in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            yield _to_text(left), _to_text(right)


def engine_ranks(engine: Mapping[str, Any], name: str) -> dict[bytes, int]:
    """Return the ranks of a tokenizer.json, from which tiktoken gives the same ids.

    Args:
        engine: The content of a tokenizer.json.
        name: What it is, for errors.

    Raises:
        ValueError: Its ids cannot be those of a file of tiktoken's with LLaMA 3's pattern.
    """
    vocabulary: dict[str, int] = (engine.get("model") or {}).get("vocab") or {}
    if not isinstance(vocabulary, dict) or not all(set(text) <= set(_BYTES) for text in vocabulary):
        raise UserError(f"{name}: is not a byte-level BPE, as LLaMA 3's tokenizer is")
    ranks = {bytes(_BYTES[character] for character in text): n for text, n in vocabulary.items()}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{name}: the ids of its text tokens are not the numbers from 0, as ranks are"
        )
    wanted = _rules(json.loads(build_engine(ranks, ["<|begin_of_text|>"]).to_str()))
    found = _rules(engine)
    differing = [rule for rule, value in wanted.items() if found.get(rule) != value]
    if differing:
        raise UserError(
            f"{name}: splits or merges text otherwise than LLaMA 3's tokenizer (its "
            f"{', '.join(differing)} differ), which tokenizer.model cannot express"
        )
    return ranks


def _rules(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a tokenizer.json determines the ids of a text, in one form."""
    model = dict(engine.get("model") or {})
    vocabulary = model.get("vocab") or {}
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []
    ]
    results = [vocabulary.get("".join(merge), -1) for merge in merges]
    return {
        "normalizer": engine.get("normalizer"),
        "pre_tokenizer": _without_offsets(engine.get("pre_tokenizer")),
        "merges": set(merges),
        "order of merges": results == sorted(results),
        "ignore_merges": model.get("ignore_merges", False),
        "byte_fallback": model.get("byte_fallback", False),
        "dropout": model.get("dropout"),
        "affixes": [
            model.get(n) or "" for n in ("continuing_subword_prefix", "end_of_word_suffix")
        ],
    }


def _without_offsets(rule: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Drop how a rule reports positions in the text, which changes no id."""
    if isinstance(rule, dict):
        return {
            name: _without_offsets(value) for name, value in rule.items() if name != "trim_offsets"
        }
    return [_without_offsets(entry) for entry in rule] if isinstance(rule, list) else rule
