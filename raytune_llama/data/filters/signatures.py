"""Signatures that documents are compared by: a hash of the text, and MinHash bands of its words.

    num_documents = write_signatures(folder, unit, batches_of_texts, config)

Signatures are the same on every machine, and nothing else is compared: two texts are exact
duplicates if their hashes are equal, and near duplicates if at least one band is equal.
`duplicates.py` finds them.

A document is the set of its shingles, the n-grams of `shingle_words` words (`words.py`: a Chinese
character is one); case, punctuation and white space are ignored. The similarity of two documents is
s = shared shingles / all shingles of both. MinHash computes `bands` x `rows` values per document.
One value agrees with probability s, all rows of a band with s ** rows, and at least one band with
1 - (1 - s ** rows) ** bands, which rises steeply around (1 / bands) ** (1 / rows). Share of pairs
found, by similarity, and for a document and its copy with every 100th, 33rd or 20th word replaced:

    bands  rows  s = 0.5   0.6   0.7   0.8   0.9    1 in 100   1 in 33   1 in 20
      14     8      0.05  0.21  0.56  0.92  1.00      1.00       0.78      0.30
      20     5      0.47  0.80  0.98  1.00  1.00      1.00       1.00      0.88
       9    13      0.00  0.01  0.08  0.40  0.93      0.95       0.20      0.02

Matches are not verified: that needs all values of both documents in one place, four times the
bytes of the bands, and one more shuffle. For fewer false positives, raise `rows` instead.
"""

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_llama.data.filters.config import (
    DuplicatesConfig,
    NearDuplicatesConfig,
)
from raytune_llama.data.filters.words import TextBatch, batch_texts, find_words, mix_bits
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.storage.place import Place

HASH_BYTES = 16
"""Of an exact duplicate: two of 10**12 different texts agree with probability 10**-15."""

BATCH_DOCUMENTS = 1 << 14
"""Rows of a record batch of a signature file."""

_EMPTY = np.iinfo(np.uint32).max
_ROW_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def compute_signatures(texts: Sequence[str], config: DuplicatesConfig) -> pa.RecordBatch:
    """Return the signatures of documents, one row per document.

    Returns:
        Column `hash`, 16 bytes, if `exact` is on; column `bands`, a fixed-size list of 64-bit
        hashes, if `near` is on.
    """
    columns: list[pa.Array] = []
    if config.exact:
        digests = b"".join(_digest(text, HASH_BYTES) for text in texts)
        buffers = [None, pa.py_buffer(digests)]
        columns.append(pa.Array.from_buffers(pa.binary(HASH_BYTES), len(texts), buffers))
    if config.near is not None:
        flat = pa.array(_band_hashes(texts, config.near).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=_bands_type(config.near)))
    return pa.RecordBatch.from_arrays(columns, schema=signature_schema(config))


def signature_schema(config: DuplicatesConfig, batch_documents: int = BATCH_DOCUMENTS) -> pa.Schema:
    """Return the schema of a signature file; its metadata records the settings."""
    fields: list[pa.Field] = []
    if config.exact:
        fields.append(pa.field("hash", pa.binary(HASH_BYTES), nullable=False))
    if config.near is not None:
        fields.append(pa.field("bands", _bands_type(config.near), nullable=False))
    inputs = json.dumps(config.fingerprint_inputs, sort_keys=True)
    metadata = {"inputs": inputs, "batch_documents": str(batch_documents)}
    return pa.schema(fields, metadata=metadata)


def signature_file(folder: Place, unit: int) -> Place:
    """Return the path of the signature file of a work unit; an existing file is complete."""
    return folder / f"{unit:05d}.arrow"


def read_batch_layout(file: Place, config: DuplicatesConfig) -> tuple[int, int]:
    """Return the number of record batches of a signature file, and the rows of each but the last.

    Raises:
        StoreError: The file was made with other settings or by another version.
    """
    with file.open() as source:
        reader = pa.ipc.open_file(source)
        metadata = reader.schema.metadata or {}
        batch_documents = int(metadata.get(b"batch_documents", b"0"))
        if metadata != signature_schema(config, batch_documents).metadata:
            raise StoreError(
                f"{file}: was made with other settings of duplicates, or by another version; "
                "delete its folder and run again"
            )
        return reader.num_record_batches, batch_documents


def write_signatures(
    folder: Place,
    unit: int,
    batches: Iterable[Sequence[str]],
    config: DuplicatesConfig,
    *,
    batch_documents: int = BATCH_DOCUMENTS,
) -> int:
    """Write the signatures of a work unit: one row per document, in order.

    Args:
        folder: Folder of the signature files of all units.
        unit: Index of the unit among all units, which are in source order.
        batches: The texts of its documents in order, a bounded number at a time. The index of a
            document among them, from 0, is its ordinal in `DroppedDocuments.reason`.
        config: What to look for; `exact` or `near` must be on.
        batch_documents: Rows of every record batch but the last, the same for all units; does not
            affect the result.

    Returns:
        The number of documents.
    """
    assert config.fingerprint_inputs, "nothing to look for"
    num_documents = 0
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "signatures.arrow")
        rows = (compute_signatures(texts, config) for texts in batches)
        with pa.ipc.new_file(str(file), signature_schema(config, batch_documents)) as writer:
            for batch in _regrouped(rows, batch_documents):
                writer.write_batch(batch)
                num_documents += batch.num_rows
        signature_file(folder, unit).upload(file)
    return num_documents


def _regrouped(batches: Iterable[pa.RecordBatch], num_rows: int) -> Iterator[pa.RecordBatch]:
    """Regroup record batches to `num_rows` rows each; only the last one may be shorter."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(part.num_rows for part in pending) < num_rows:
            continue
        joined = pa.concat_batches(pending)
        stop = joined.num_rows // num_rows * num_rows
        for start in range(0, stop, num_rows):
            yield joined.slice(start, num_rows)
        pending = [joined.slice(stop)]
    if any(part.num_rows for part in pending):
        yield pa.concat_batches(pending)


def _bands_type(near: NearDuplicatesConfig) -> pa.DataType:
    return pa.list_(pa.field("item", pa.uint64(), nullable=False), near.bands)


def _digest(text: str, num_bytes: int) -> bytes:
    # Lone surrogates are rejected elsewhere.
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=num_bytes).digest()


def _band_hashes(texts: Sequence[str], near: NearDuplicatesConfig) -> NDArray[np.uint64]:
    """Return the hash of each band of each text, [T, bands]."""
    minima = _minima(texts, near)
    hashes = np.empty((len(texts), near.bands), dtype=np.uint64)
    for band in range(near.bands):
        # The band's index is hashed too, so that equal hashes are of the same band.
        sums = np.full(len(texts), band + 1, dtype=np.uint64)
        for row in minima[band * near.rows : (band + 1) * near.rows]:
            sums *= _ROW_FACTOR
            sums += row
        hashes[:, band] = mix_bits(sums)
    return hashes


def _minima(texts: Sequence[str], near: NearDuplicatesConfig) -> NDArray[np.uint32]:
    """Return the minimum of each hash function over the shingles of each text, [K, T]."""
    factors = _factors(near)
    minima = np.full((len(factors), len(texts)), _EMPTY, dtype=np.uint32)
    has_shingles = np.zeros(len(texts), dtype=np.bool_)
    for batch in batch_texts(texts):
        shingles, counts = _shingles(batch, near.shingle_words)
        filled = counts > 0
        if not filled.any():
            continue
        starts = (np.cumsum(counts) - counts)[filled]
        texts_T = batch.text[filled]
        has_shingles[texts_T] = True
        product = np.empty_like(shingles)
        least = np.empty((len(factors), len(texts_T)), dtype=np.uint32)
        for factor, row in zip(factors, least, strict=True):
            np.multiply(shingles, factor, out=product)
            np.minimum.reduceat(product, starts, out=row)
        # A text that was split occurs more than once.
        minima[:, texts_T] = np.minimum(minima[:, texts_T], least)
    for index in np.flatnonzero(~has_shingles).tolist():
        # Without words, two texts are similar only if they are equal.
        digest = int.from_bytes(_digest(texts[index], 4), "big")
        minima[:, index] = factors * np.uint32(digest)
    return minima


def _shingles(batch: TextBatch, num_words: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Hash the shingles of a batch, and count those of each of its texts.

    The hashes are as good as random, so that multiplying them by an odd number, which permutes the
    32-bit integers, is as good as drawing a new hash function, and far faster.
    """
    words = find_words(batch)
    bounds = np.searchsorted(words.text, np.arange(len(batch.text) + 1))
    num_in_text = np.diff(bounds)
    counts = np.where(num_in_text > 0, np.maximum(num_in_text - num_words + 1, 1), 0)
    places = np.arange(len(words.text)) - np.repeat(bounds[:-1], num_in_text)
    starts = np.flatnonzero(places < np.repeat(counts, num_in_text))
    stops = np.minimum(starts + num_words, bounds[1:][words.text[starts]])
    return (words.hash_ngrams(starts, stops) >> np.uint64(32)).astype(np.uint32), counts


@functools.cache
def _factors(near: NearDuplicatesConfig) -> NDArray[np.uint32]:
    """Draw the odd factors of the hash functions, without numpy's generators, which may change."""
    digests = (
        hashlib.blake2b(f"{near.seed}:{number}".encode(), digest_size=4).digest()
        for number in range(near.bands * near.rows)
    )
    return np.frombuffer(b"".join(digests), dtype=">u4").astype(np.uint32) | np.uint32(1)
