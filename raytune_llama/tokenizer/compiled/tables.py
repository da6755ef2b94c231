"""Turn a vocabulary into the lookup tables of the BPE kernel."""

import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.compiled import kernel
from raytune_llama.tokenizer.reference import (
    PieceProto,
    ReferenceEncoder,
    SentencePieceReference,
    is_plain_merging,
)
from raytune_llama.tokenizer.split_points import (
    SPACE,
    adjacent_character_pairs,
    find_split_pattern,
    is_whole_text_bpe,
)

_NUM_CODES = 0x110000
_PATTERNS = {
    "gpt2": kernel.GPT2,
    "gpt2-digits": kernel.GPT2_DIGITS,
    "words-1": kernel.WORDS_1,
    "words-3": kernel.WORDS_3,
}
_WHITE_SPACE = (
    *range(0x09, 0x0E),
    0x20,
    0x85,
    0xA0,
    0x1680,
    *range(0x2000, 0x200B),
    0x2028,
    0x2029,
    0x202F,
    0x205F,
    0x3000,
)
_LONG_S = 0x17F


class VocabularyTables(NamedTuple):
    """Read-only merge tables. A symbol is the unit of merging: a byte, a character or a piece."""

    pairs: np.ndarray
    """uint64: hash table of `left symbol << 32 | right symbol`; 2**64 - 1 marks a free slot."""
    pair_ranks: np.ndarray
    """int32: rank of the pair in the same slot; lower ranks merge first."""
    merged: np.ndarray
    """int32: the symbol that the pair in the same slot merges into."""
    ids: np.ndarray
    """int32: id of each symbol, or -1 - code point for a character that falls back to bytes."""
    spelling: np.ndarray
    """int32: symbol of each code point, or of each byte; -1 if it has none."""
    byte_ids: np.ndarray
    """int32: ids of the 256 bytes, for byte fallback; empty if `by_bytes`."""
    by_bytes: bool
    """Whether merging starts from bytes rather than characters."""


class SplitTables(NamedTuple):
    """Read-only tables of where texts are split."""

    pattern: int
    """Pattern that splits a text into words: `kernel.NO_WORDS`, `kernel.GPT2`, ..."""
    classes: np.ndarray
    """uint8: class of each code point, such as `kernel.LETTER`; empty with `NO_WORDS`."""
    rows: np.ndarray
    """int32: start of each code point's row in `joined`."""
    columns: np.ndarray
    """int32: column of each code point in `joined`."""
    joined: np.ndarray
    """uint8: one bit per pair, set if the two are adjacent in some piece; the first bit is 0."""


KernelTables = tuple[VocabularyTables, SplitTables]

MergeRule = tuple[int, int, int, int]
"""Left symbol, right symbol, rank (lowest first), symbol that they merge into."""


def build_tables(reference: ReferenceEncoder) -> KernelTables:
    """Return the kernel tables of a reference encoder.

    Raises:
        ValueError: The kernel does not support its kind; the message names the reason.
    """
    tables = _build_tables(reference)
    for array in (*tables[0], *tables[1]):
        if isinstance(array, np.ndarray):
            # As arrays in shared memory are: numba compiles a separate version for writable arrays.
            array.setflags(write=False)
    return tables


def _build_tables(reference: ReferenceEncoder) -> KernelTables:
    if isinstance(reference, SentencePieceReference):
        return _piece_tables(reference.proto)
    engine = reference.engine
    model = engine["model"]
    if reference.split_points is None or model["type"] != "BPE":
        raise UserError(
            "unsupported tokenizer.json: its model, normalizer, pre-tokenizer or added tokens"
        )
    return _llama_tables(engine) if is_whole_text_bpe(engine) else _byte_tables(engine)


def _piece_tables(proto: Any) -> KernelTables:  # noqa: ANN401  # created at import time by protobuf
    pieces = {
        piece.piece: (id_, piece.score)
        for id_, piece in enumerate(proto.pieces)
        if piece.type == PieceProto.NORMAL
    }
    if not is_plain_merging(proto) or SPACE not in pieces:
        raise UserError("unsupported SentencePiece model: not plain BPE on unchanged characters")
    if any(piece.type == PieceProto.USER_DEFINED for piece in proto.pieces):
        raise UserError("unsupported SentencePiece model: it has user-defined pieces")
    symbols = {piece: symbol for symbol, piece in enumerate(pieces)}
    ids = [id_ for id_, _ in pieces.values()]
    # Characters that occur only in longer pieces can merge, and fall back to bytes if they do not.
    for character in sorted({*"".join(pieces)} - symbols.keys()):
        symbols[character] = len(ids)
        ids.append(-1 - ord(character))
    # Pieces of equal score have equal ranks: the leftmost in the text is merged first.
    ranks = {
        score: rank for rank, score in enumerate(sorted({s for _, s in pieces.values()})[::-1])
    }
    merges = [
        (symbols[piece[:at]], symbols[piece[at:]], ranks[score], symbols[piece])
        for piece, (_, score) in pieces.items()
        for at in range(1, len(piece))
        if piece[:at] in symbols and piece[at:] in symbols
    ]
    byte_ids = {piece.piece: id_ for id_, piece in enumerate(proto.pieces)}
    return _character_tables(merges, ids, symbols, byte_ids)


def _llama_tables(engine: dict[str, Any]) -> KernelTables:
    vocabulary: dict[str, int] = engine["model"]["vocab"]
    ids = np.arange(max(vocabulary.values()) + 1).tolist()
    merges = _merges(engine["model"])
    byte_ids = {vocabulary[f"<0x{byte:02X}>"] for byte in range(256)}
    if any(left in byte_ids or right in byte_ids for left, right, _, _ in merges):
        raise UserError("unsupported tokenizer.json: it merges byte-fallback tokens")
    return _character_tables(merges, ids, vocabulary, vocabulary)


def _byte_tables(engine: dict[str, Any]) -> KernelTables:
    vocabulary: dict[str, int] = engine["model"]["vocab"]
    kind = find_split_pattern(engine)
    if kind is None:
        raise UserError("unsupported tokenizer.json: unknown split pattern")
    alphabet = byte_alphabet()
    return (
        VocabularyTables(
            *_pair_table(_merges(engine["model"])),
            ids=np.arange(max(vocabulary.values()) + 1, dtype=np.int32),
            spelling=np.array([vocabulary.get(c, -1) for c in alphabet], np.int32),
            byte_ids=np.zeros(0, np.int32),
            by_bytes=True,
        ),
        SplitTables(
            _PATTERNS[kind],
            _classes(any_case=kind.startswith("words")),
            *_joined_bytes({c: byte for byte, c in enumerate(alphabet)}, vocabulary),
        ),
    )


def _merges(model: dict[str, Any]) -> list[MergeRule]:
    vocabulary: dict[str, int] = model["vocab"]
    pairs = (
        tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in model["merges"]
    )
    return [
        (vocabulary[left], vocabulary[right], rank, vocabulary[left + right])
        for rank, (left, right) in enumerate(pairs)
    ]


def _character_tables(
    merges: list[MergeRule], ids: list[int], symbols: Mapping[str, int], byte_ids: Mapping[str, int]
) -> KernelTables:
    rows, columns, joined = _joined_characters(text for text in symbols if len(text) > 1)
    spelling = np.full(_NUM_CODES, -1, np.int32)
    for text, symbol in symbols.items():
        if len(text) == 1:
            spelling[ord(text)] = symbol
    for table in (rows, columns, spelling):
        table[ord(" ")] = table[ord(SPACE)]
    return (
        VocabularyTables(
            *_pair_table(merges),
            ids=np.array(ids, np.int32),
            spelling=spelling,
            byte_ids=np.array([byte_ids[f"<0x{byte:02X}>"] for byte in range(256)], np.int32),
            by_bytes=False,
        ),
        SplitTables(kernel.NO_WORDS, np.zeros(0, np.uint8), rows, columns, joined),
    )


def _pair_table(merges: list[MergeRule]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hash table of pairs, at most half full, with their ranks and merged symbols."""
    size = 1 << max(8, (2 * len(merges)).bit_length())
    table = (
        np.full(size, 2**64 - 1, np.uint64),
        np.zeros(size, np.int32),
        np.zeros(size, np.int32),
    )
    kernel.fill_pairs(np.array(merges, np.int64).reshape(-1, 4), *table)
    return table


def _joined_characters(pieces: Iterable[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `SplitTables` rows, columns and bits of the characters adjacent in some piece."""
    pairs = adjacent_character_pairs(list(pieces))
    rows, columns = np.zeros(_NUM_CODES, np.int32), np.zeros(_NUM_CODES, np.int32)
    lefts, rights = sorted({pair[0] for pair in pairs}), sorted({pair[1] for pair in pairs})
    width = len(rights) + 1
    # Row and column 0 belong to characters that are in no pair.
    rows[[ord(left) for left in lefts]] = width * np.arange(1, len(lefts) + 1)
    columns[[ord(right) for right in rights]] = np.arange(1, width)
    bits = np.zeros(width * (len(lefts) + 1), bool)
    bits[[rows[ord(left)] + columns[ord(right)] for left, right in pairs]] = True
    return rows, columns, np.packbits(bits, bitorder="little")


def _joined_bytes(
    alphabet: Mapping[str, int], vocabulary: Iterable[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, columns and bits for the last byte of a character and the first of the next."""
    codes = np.arange(_NUM_CODES, dtype=np.int32)
    lasts = np.where(codes < 0x80, codes, 0x80 | codes & 0x3F)
    leads = (0xC0 | codes >> 6, 0xE0 | codes >> 12, 0xF0 | codes >> 18)
    firsts = np.select(
        [codes < 0x80, codes < 0x800, codes < 0x10000], [codes, *leads[:2]], leads[2]
    )
    bits = np.zeros(1 << 17, bool)
    for left, right in adjacent_character_pairs(
        [token for token in vocabulary if alphabet.keys() >= {*token}]
    ):
        bits[256 * (alphabet[left] + 1) + alphabet[right]] = True
    return 256 * (lasts + 1), firsts, np.packbits(bits, bitorder="little")


@lru_cache
def _classes(*, any_case: bool) -> np.ndarray:
    """Return the class of each code point, by the Unicode categories that split patterns use."""
    classes = np.zeros(_NUM_CODES, np.uint8)
    for code in range(_NUM_CODES):
        category = unicodedata.category(chr(code))
        if category[0] in "LN":
            classes[code] = kernel.LETTER if category[0] == "L" else kernel.NUMBER
        elif category == "Cn":
            # Newer versions of Unicode may define it.
            classes[code] = kernel.UNKNOWN
    classes[list(_WHITE_SPACE)] = kernel.SPACE
    classes[[ord("\r"), ord("\n")]] = kernel.NEWLINE
    if any_case:
        classes[_LONG_S] = kernel.UNKNOWN  # matches s in a case-insensitive pattern
    return classes


def byte_alphabet() -> list[str]:
    """Return the character that represents each byte in a byte-level vocabulary."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
