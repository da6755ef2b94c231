"""Read, clean and encode plain-text documents, unit by unit.

for documents in TextUnitReader(encoder).read(unit, plan, tally, quarantine): ...
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from raytune_llama.config.settings import override
from raytune_llama.data.build.actors import read_sample_texts
from raytune_llama.data.build.duplicates_pass import DuplicateFilter, TextReader, read_unit_texts
from raytune_llama.data.build.unit_reader import (
    DocumentBatch,
    QuarantineWriter,
    Tally,
    read_unit_documents,
)
from raytune_llama.data.build.units import BuildPlan, WorkUnit
from raytune_llama.data.config import AnyDataConfig, DataConfig
from raytune_llama.data.filters.cleaning import Cleaner
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.manifest import MANIFEST_NAME, SplitName
from raytune_llama.data.store.shards import EncodedDocuments
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.encoder import TokenIdMismatchError
from raytune_llama.tokenizer.loader import leading_ids
from raytune_llama.tokenizer.reference import TextEncoder
from raytune_llama.tokenizer.split_points import UnsplittableTextError

logger = logging.getLogger(__name__)

_BATCH_DOCUMENTS = 8192
_BATCH_BYTES = 2 << 20


class TextUnitReader:
    """Picklable reader of text units; implements `unit_encoder.UnitReader`."""

    has_targets = False

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def read(
        self, unit: WorkUnit, plan: BuildPlan, tally: Tally, quarantine: QuarantineWriter
    ) -> Iterator[EncodedDocuments]:
        """Stream the encoded documents of a unit, accounting for every row."""
        duplicates = DuplicateFilter(unit, plan)
        for documents in read_unit_documents(
            unit, plan.files, tally, quarantine, Cleaner(plan.cleaning)
        ):
            for batch in _batched(duplicates.keep(documents, tally)):
                yield _encode_batch(batch, plan, self._encoder, tally)


def _encode_batch(
    documents: DocumentBatch, plan: BuildPlan, encoder: TextEncoder, tally: Tally
) -> EncodedDocuments:
    """Encode a batch; a text that yields no tokens is counted and dropped."""
    encoded = _encode(documents, plan, encoder, tally)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    has_tokens = lengths > 0
    tally.skipped["no_tokens"] += int((~has_tokens).sum())
    sides = choose_splits(documents.texts, plan.validation_fraction)
    is_validation = sides.get("validation", np.zeros(len(lengths), dtype=bool))
    return EncodedDocuments(
        file=documents.file,
        ids=encoded[0] if len(encoded) == 1 else np.concatenate(encoded),
        lengths=lengths[has_tokens],
        num_bytes=np.array(documents.num_bytes, dtype=np.int64)[has_tokens],
        offsets=np.array(documents.offsets, dtype=np.int64)[has_tokens],
        is_validation=is_validation[has_tokens],
    )


def _encode(
    documents: DocumentBatch, plan: BuildPlan, encoder: TextEncoder, tally: Tally
) -> list[NDArray[np.uint32]]:
    """Encode a batch; a text that cannot be split for encoding is counted and gets no ids."""
    file = plan.files[documents.file]
    place, unit = file.place, file.options.offset_unit
    try:
        return encoder.encode(documents.texts)
    except TokenIdMismatchError as error:
        offset = documents.offsets[error.index]
        raise SourceError(f"{place}: {unit} {offset}: {error}") from error
    except UnsplittableTextError:
        pass
    encoded: list[NDArray[np.uint32]] = []
    for text, offset in zip(documents.texts, documents.offsets, strict=True):
        try:
            encoded += encoder.encode([text])
        except UnsplittableTextError as error:
            logger.warning("%s: %s %d: document skipped: %s", place, unit, offset, error)
            tally.skipped["uncuttable"] += 1
            tally.skipped["no_tokens"] -= 1  # the caller adds 1 for every text without tokens
            encoded.append(np.empty(0, dtype=np.uint32))
    return encoded


def _batched(documents: DocumentBatch) -> Iterator[DocumentBatch]:
    """Split documents into batches large enough to amortize a call, in bounded memory."""
    ends = np.cumsum(documents.num_bytes)
    start = num_bytes = 0
    while start < len(documents.texts):
        full = int(np.searchsorted(ends, num_bytes + _BATCH_BYTES)) + 1
        stop = min(full, start + _BATCH_DOCUMENTS, len(documents.texts))
        yield _slice(documents, start, stop)
        start, num_bytes = stop, int(ends[stop - 1])


def _slice(documents: DocumentBatch, start: int, stop: int) -> DocumentBatch:
    return DocumentBatch(
        documents.file,
        documents.texts[start:stop],
        documents.offsets[start:stop],
        documents.num_bytes[start:stop],
    )


def choose_splits(
    texts: list[str], validation_fraction: float
) -> dict[SplitName, NDArray[np.bool_]]:
    """Assign documents to splits by their texts alone, so that equal texts stay together.

    A text goes to validation if the first 64 bits of its SHA-256, scaled to [0, 1), are below
    `validation_fraction`.

    Returns:
        A boolean mask over `texts` per split; only `train` if the fraction is 0.
    """
    if not validation_fraction:
        return {"train": np.ones(len(texts), dtype=bool)}
    bound = int(validation_fraction * 2**64).to_bytes(8, "big")
    below = (sha256(text.encode()).digest()[:8] < bound for text in texts)
    validation = np.fromiter(below, dtype=bool, count=len(texts))
    return {"train": ~validation, "validation": validation}


def document_ends(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[int | None, int | None]:
    """Return the ids that `bos` and `eos` put before and after each document; None: no id."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if config.bos == "auto":
        bos = next(iter(leading_ids(tokenizer)), None)
    return (
        bos if config.bos and isinstance(bos, int) else None,
        eos if config.eos and isinstance(eos, int) else None,
    )


def describe_document_ends(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what a document begins and ends with, in words."""
    begin, end = (
        "without a control token" if id_ is None else f"with {tokenizer.convert_ids_to_tokens(id_)}"
        for id_ in document_ends(config, tokenizer)
    )
    how = " (data.bos=auto: as the tokenizer does it)" if config.bos == "auto" else ""
    return f"begins {begin}{how} and ends {end}"


def check_document_ends(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return why a tokenizer cannot give what `bos` and `eos` ask for; empty if it can."""
    problems = [
        f"data.{field}: got true, but the tokenizer {tokenizer.name_or_path} has no {field} token; "
        "set it to false or use another tokenizer"
        for field, value in (("bos", config.bos), ("eos", config.eos))
        if value is True and getattr(tokenizer, f"{field}_token_id") is None
    ]
    begin = leading_ids(tokenizer) if config.bos == "auto" else ()
    if len(begin) > 1:
        problems.append(
            f"data.bos: got auto, but the tokenizer {tokenizer.name_or_path} puts {len(begin)} "
            f"tokens before a text ({', '.join(tokenizer.convert_ids_to_tokens(list(begin)))}), "
            "and a document begins with at most one; set it to true (only BOS) or false"
        )
    return problems


def keep_store_bos(
    config: AnyDataConfig, tokenizer: PreTrainedTokenizerFast, store: Place
) -> AnyDataConfig:
    """Return the config with `bos: true` if it is `auto` and the existing store recorded true.

    `true` was the default before `auto`, so the config that built such a store may not name the
    field. Any other difference makes the store stale.

    Args:
        config: Data settings of the job.
        tokenizer: Tokenizer of the store.
        store: Directory of the token store; it need not exist.
    """
    if not isinstance(config, DataConfig) or config.bos != "auto":
        return config
    file = store / MANIFEST_NAME
    recorded = file.read_json().get("inputs", {}).get("tokenizer", {}) if file.exists() else {}
    bos_id, own = recorded.get("bos_id"), document_ends(config, tokenizer)[0]
    if bos_id is None or bos_id == own or bos_id != tokenizer.bos_token_id:
        return config
    logger.info(
        "data.bos: the documents of the token store %s begin with %s, as it was built with true; "
        "that is kept. A new store would begin them with %s, as the tokenizer does",
        store,
        tokenizer.bos_token,
        "no token" if own is None else tokenizer.convert_ids_to_tokens(own),
    )
    return override(config, {"bos": True})


@dataclass(frozen=True)
class TextCorpus:
    """Plain-text documents; implements `Corpus`."""

    config: DataConfig
    """Data settings of the job."""
    files: list[SourceFile]
    """All source files, in store order."""

    def fingerprint_inputs(self, like: str | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Return the inputs that decide the documents; they include no hash of their own."""
        config = self.config
        return {
            "cleaning": config.cleaning.fingerprint_inputs,
            "duplicates": config.duplicates.fingerprint_inputs,
        }

    def sample_texts(self) -> list[str]:
        """Read the heads of some files, to select an encoder."""
        return read_sample_texts(self.files)

    def build_reader(self, encoder: TextEncoder) -> TextUnitReader:
        """Build the unit reader for the workers."""
        return TextUnitReader(encoder)

    @property
    def read_texts(self) -> TextReader:
        """Reader of the texts among which duplicates are searched."""
        return read_unit_texts
