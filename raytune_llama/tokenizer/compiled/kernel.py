"""The BPE kernel that `encoder.py` runs, compiled by numba at the first call.

Texts are an array of code points. They are split into words, if the tokenizer does so, and words
into segments: no merge crosses a segment boundary, since no piece of the vocabulary has the two
characters (or bytes, if merging starts from bytes) next to each other. Each segment is spelled in
symbols, and the adjacent pair of lowest rank is merged first, the leftmost of several: the rule of
`tokenizers`, and of SentencePiece for pieces of equal score. A memo caches the ids of segments.

Arrays are passed one by one: numba copies a tuple of arrays, and counts references, at each call.
All functions are in this file: numba's disk cache detects changes in this file only.
"""

# ruff: noqa: ANN001, ANN201, ANN202, PLR0917  # numba infers types, has no keywords

import numpy as np
from numba import njit

NO_WORDS, GPT2, GPT2_DIGITS, WORDS_1, WORDS_3 = range(5)
"""Patterns that split a text into words: `SplitTables.pattern`."""

OTHER, LETTER, NUMBER, SPACE, NEWLINE, UNKNOWN = range(6)
"""Classes of code points: `SplitTables.classes`."""

MAX_SYMBOLS = 2048
"""A longer segment is passed to the reference: merging is quadratic in its length."""

_MAX_MEMO_CODES = 32
_NEVER = np.int32(2**31 - 1)
_FREE = np.uint64(2**64 - 1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_APOSTROPHE = 0x27

_inlined = njit(inline="always")


def _jit(function):
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable cache folder: each process compiles, in seconds
        return njit(nogil=True)(function)


@_jit
def encode(codes, stops, vocabulary, memo, out, ends, skipped):
    """Encode segments.

    Args:
        codes: uint32, the code points of all segments.
        stops: int32, the end of each segment.
        vocabulary: `VocabularyTables`.
        memo: `SegmentCache`, updated in place.
        out: int32, at least four per code point: receives the ids.
        ends: int32, one per segment: receives the end of its ids.
        skipped: bool, one per segment: set where the kernel can't encode it.
    """
    pairs, pair_ranks, merged, ids, spelling, byte_ids, by_bytes = vocabulary
    slots, pool, used = memo
    symbols, ranks = np.empty(MAX_SYMBOLS, np.int32), np.empty(MAX_SYMBOLS, np.int32)
    start, at = 0, 0
    for segment in range(stops.shape[0]):
        stop = stops[segment]
        num, slot = -1, -1
        if stop - start == 1 and not by_bytes:
            num = _write_character(codes[start], spelling, ids, byte_ids, out, at)
        elif stop - start <= _MAX_MEMO_CODES:
            slot = _slot(codes, start, stop, slots, pool)
            num = _recall(slots[slot], pool, out, at)
        if num < 0:
            num = _spell(codes, start, stop, spelling, by_bytes, symbols)
            num = _merge(symbols, ranks, num, pairs, pair_ranks, merged)
            num = _write(symbols, num, ids, byte_ids, out, at)
            if slot >= 0 and num >= 0:
                slots[slot] = _remember(codes, start, stop, out, at, num, pool, used)
        at += max(num, 0)
        ends[segment] = at
        skipped[segment] = num < 0
        start = stop


@_jit
def _write(symbols, num, ids, byte_ids, out, at):
    """Write the ids of `num` symbols; return the number of ids, or -1 if `num` is -1."""
    written = at
    for index in range(num):
        id_ = ids[symbols[index]]
        if id_ >= 0:
            out[written] = id_
            written += 1
        else:
            written += _write_bytes(-1 - id_, byte_ids, out, written)
    return written - at if num >= 0 else -1


@_jit
def _spell(codes, start, stop, spelling, by_bytes, symbols):
    """Write the symbols of a segment; return their number, -1 if too many or one is unknown."""
    num = 0
    for index in range(start, stop):
        if num > MAX_SYMBOLS - 4:
            return -1
        if by_bytes:
            num += _utf8(codes[index], symbols, num)
        else:
            symbols[num] = codes[index]
            num += 1
    for index in range(num):
        symbols[index] = spelling[symbols[index]]
        if symbols[index] < 0:
            return -1
    return num


@_jit
def _merge(symbols, ranks, num, pairs, pair_ranks, merged):
    """Merge the first `num` symbols in place until no pair merges; return how many are left."""
    for index in range(num - 1):
        ranks[index] = _rank(symbols[index], symbols[index + 1], pairs, pair_ranks)
    while num > 1:
        best = 0
        for index in range(1, num - 1):
            if ranks[index] < ranks[best]:
                best = index
        if ranks[best] == _NEVER:
            break
        symbols[best] = merged[_find(symbols[best], symbols[best + 1], pairs)]
        num -= 1
        for index in range(best + 1, num):
            symbols[index] = symbols[index + 1]
            ranks[index - 1] = ranks[index]
        if best < num - 1:
            ranks[best] = _rank(symbols[best], symbols[best + 1], pairs, pair_ranks)
        if best > 0:
            ranks[best - 1] = _rank(symbols[best - 1], symbols[best], pairs, pair_ranks)
    return num


@_inlined
def _rank(left, right, pairs, pair_ranks):
    place = _find(left, right, pairs)
    return pair_ranks[place] if place >= 0 else _NEVER


@_inlined
def _find(left, right, pairs):
    """Return the slot of a pair in the hash table, or -1."""
    mask = pairs.shape[0] - 1
    key = (np.uint64(left) << np.uint64(32)) | np.uint64(right)
    place = np.int64(((key * _GOLDEN) >> np.uint64(32)) & np.uint64(mask))
    while pairs[place] != key:
        if pairs[place] == _FREE:
            return -1
        place = (place + 1) & mask
    return place


@_jit
def fill_pairs(merges, pairs, pair_ranks, merged):
    """Insert merges (int64 rows of left, right, rank, symbol) into an empty hash table.

    The last of equal pairs wins.
    """
    mask = pairs.shape[0] - 1
    for index in range(merges.shape[0]):
        key = (np.uint64(merges[index, 0]) << np.uint64(32)) | np.uint64(merges[index, 1])
        place = np.int64(((key * _GOLDEN) >> np.uint64(32)) & np.uint64(mask))
        while pairs[place] != _FREE and pairs[place] != key:
            place = (place + 1) & mask
        pairs[place] = key
        pair_ranks[place] = merges[index, 2]
        merged[place] = merges[index, 3]


@_inlined
def _slot(codes, start, stop, slots, pool):
    """Return the slot of a segment in the memo's hash table, or the free slot for it."""
    key = np.uint64(stop - start)
    for index in range(start, stop):
        key = (key ^ np.uint64(codes[index])) * _MIX
    mask = slots.shape[0] - 1
    key = (key ^ (key >> np.uint64(32))) * _GOLDEN
    slot = np.int64((key >> np.uint64(32)) & np.uint64(mask))
    while slots[slot] >= 0 and not _equal(codes, start, stop, slots[slot], pool):
        slot = (slot + 1) & mask
    return slot


@_inlined
def _equal(codes, start, stop, entry, pool):
    if pool[entry] != stop - start:
        return False
    place = entry + 2 - start
    at = start
    while at < stop and pool[place + at] == np.int32(codes[at]):
        at += 1
    return at == stop


@_inlined
def _recall(entry, pool, out, at):
    """Write the ids of a memo entry; return their number, -1 if there is no entry."""
    if entry < 0:
        return -1
    num = pool[entry + 1]
    place = entry + 2 + pool[entry]
    for index in range(num):
        out[at + index] = pool[place + index]
    return num


@_jit
def _remember(codes, start, stop, out, at, num_ids, pool, used):
    """Add an entry to the memo; return its offset in the pool, or -1 if it is full."""
    entry, num = used[1], stop - start
    if used[0] == used[2] or entry + 2 + num + num_ids > pool.shape[0]:
        return -1
    pool[entry], pool[entry + 1] = num, num_ids
    place = entry + 2
    for index in range(num):
        pool[place + index] = codes[start + index]
    for index in range(num_ids):
        pool[place + num + index] = out[at + index]
    used[0], used[1] = used[0] + 1, place + num + num_ids
    return entry


@_inlined
def _write_character(code, spelling, ids, byte_ids, out, at):
    symbol = spelling[code]
    id_ = ids[symbol] if symbol >= 0 else np.int32(-1) - np.int32(code)
    if id_ < 0:
        return _write_bytes(-1 - id_, byte_ids, out, at)
    out[at] = id_
    return 1


@_jit
def _write_bytes(code, byte_ids, out, at):
    num = _utf8(code, out, at)
    for index in range(at, at + num):
        out[index] = byte_ids[out[index]]
    return num


@_jit
def _utf8(code, out, at):
    """Write the UTF-8 bytes of a code point to `out[at:]`; return their number."""
    code = np.int32(code)
    if code < 0x80:
        out[at] = code
        return 1
    num = 2 if code < 0x800 else 3 if code < 0x10000 else 4
    for index in range(num - 1, 0, -1):
        out[at + index] = 0x80 | (code & 0x3F)
        code >>= 6
    out[at] = (0xF00 >> num) & 0xFF | code
    return num


@_jit
def split(codes, starts, boundaries, stops, apart):
    """Split texts into segments.

    Args:
        codes: uint32, the code points of the texts, concatenated.
        starts: int64, the start of each text, and the end of the last.
        boundaries: `SplitTables`.
        stops: int32, one per code point: receives the end of each segment; none spans two texts.
        apart: bool, one per text: set if it has a character of unknown class.

    Returns:
        The number of segments.
    """
    pattern, classes, rows, columns, joined = boundaries
    num = 0
    for text in range(starts.shape[0] - 1):
        at, end = starts[text], starts[text + 1]
        while at < end:
            word = end if pattern == NO_WORDS else _word_end(codes, at, end, classes, pattern)
            if word < 0:
                apart[text] = True
                word = end
            while at < word:
                at += 1
                # The first bit belongs to no pair and is 0.
                bit = rows[codes[at - 1]] + columns[codes[at]] if at < word else 0
                if not (joined[bit >> 3] >> (bit & 7)) & 1:
                    stops[num] = at
                    num += 1
    return num


@_jit
def _word_end(codes, start, end, classes, pattern):
    if pattern in (WORDS_1, WORDS_3):
        return _modern_end(codes, start, end, classes, 3 if pattern == WORDS_3 else 1)
    return _gpt2_end(codes, start, end, classes, pattern == GPT2_DIGITS)


@_jit
def _gpt2_end(codes, start, end, classes, digits):
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+.

    With `digits`, each digit is its own word, and the pattern sees the text as ending there.
    """
    stop = _contraction_end(codes, start, end, 0)
    if stop > start:
        return stop
    kind = np.int64(classes[codes[start]])
    if digits and kind == NUMBER:
        return start + 1
    word = start
    if codes[start] == 0x20 and start + 1 < end:
        following = np.int64(classes[codes[start + 1]])
        if not (digits and following == NUMBER):
            word, kind = start + 1, following
    if kind == UNKNOWN:
        return -1
    if kind not in (SPACE, NEWLINE):
        return _run_end(codes, word, end, classes, kind)
    stop = _blank_end(codes, start, end, classes)
    if digits and stop + 1 < end and classes[codes[stop + 1]] == NUMBER:
        stop = _space_end(codes, start, end, classes)
    return stop


@_jit
def _modern_end(codes, start, end, classes, most_digits):
    r"""(?i:'s|...)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|..."""
    stop = _contraction_end(codes, start, end, 0x20)
    if stop > start:
        return stop
    kind = np.int64(classes[codes[start]])
    following = np.int64(classes[codes[start + 1]] if start + 1 < end else NUMBER)
    if UNKNOWN in (kind, following):
        return -1
    if kind == LETTER or (following == LETTER and kind in (OTHER, SPACE)):
        return _run_end(codes, start + 1, end, classes, LETTER)
    if kind == NUMBER:
        return min(_run_end(codes, start, end, classes, NUMBER), start + most_digits)
    if kind == OTHER or (codes[start] == 0x20 and following == OTHER):
        stop = _run_end(codes, start + 1, end, classes, OTHER)
        return _run_end(codes, stop, end, classes, NEWLINE)
    # \s*[\r\n]+ before \s+(?!\S)|\s+: up to the last line break, if there is one.
    last = _space_end(codes, start, end, classes)
    while last > start and classes[codes[last - 1]] != NEWLINE:
        last -= 1
    return last if last > start else _blank_end(codes, start, end, classes)


@_jit
def _contraction_end(codes, start, end, low):
    """Return the end of 's, 't, 're, 've, 'm, 'll or 'd at `start`, or `start`.

    `low` is the bit that makes ASCII letters lowercase, or 0 to match case.
    """
    if codes[start] != _APOSTROPHE or start + 1 >= end:
        return start
    first = np.int64(codes[start + 1]) | low
    if first in (0x73, 0x74, 0x6D, 0x64):
        return start + 2
    if start + 2 >= end:
        return start
    second = np.int64(codes[start + 2]) | low
    if (first in (0x72, 0x76) and second == 0x65) or (first == 0x6C and second == 0x6C):
        return start + 3
    return start


@_jit
def _run_end(codes, start, end, classes, kind):
    """Return the end of a run of one class."""
    stop = start
    while stop < end and classes[codes[stop]] == kind:
        stop += 1
    return stop


@_jit
def _space_end(codes, start, end, classes):
    """Return the end of a run of spaces and line breaks."""
    stop = start
    while stop < end and classes[codes[stop]] in (SPACE, NEWLINE):
        stop += 1
    return stop


@_jit
def _blank_end(codes, start, end, classes):
    r"""\s+(?!\S)|\s+: the last of several spaces belongs to the next word."""
    stop = _space_end(codes, start, end, classes)
    return stop - 1 if stop < end and stop - start > 1 else stop
