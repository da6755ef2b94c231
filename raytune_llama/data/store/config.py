"""Settings shared by token stores of text and of conversations."""

from typing import Annotated

from pydantic import Field

from raytune_llama.config.settings import PLACEMENT, settings
from raytune_llama.tokenizer.config import EncoderKind


@settings
class StoreConfig:
    """Location and build settings of a token store, whether of text or of conversations."""

    store_dir: Annotated[str, PLACEMENT]
    """Directory of the token store, local or `s3://...`, `gs://...`, accessible from all nodes. It
    must not exist, unless it holds the store that would be built. Unfinished work is kept next to
    it in `<store_dir>.partial-...`."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of documents that go to the validation split, selected by a hash of their text."""
    max_document_mib: Annotated[int, Field(ge=1, le=1024)] = 256
    """Maximum document size in MiB; longer ones are quarantined. A worker needs about five times
    as much memory."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), PLACEMENT] = 0.001
    """Maximum fraction of quarantined rows; above it the job fails and lists the first ones."""
    range_mib: Annotated[int, Field(ge=1), PLACEMENT] = 64
    """Size in MiB of the ranges in which workers read large files in parallel. Affects how the
    store is sharded, not its content."""
    engine: Annotated[EncoderKind, PLACEMENT] = "auto"
    """Tokenizer implementation. `auto`: the fast engine if its ids match the reference's on a
    sample of this corpus; `compiled`: the fast engine, or an error; `reference`: SentencePiece or
    Hugging Face tokenizers themselves."""
    cache_dir: Annotated[str | None, PLACEMENT] = None
    """Directory on each node's local disk in which training caches the shards of a store in object
    storage, across runs; it may be deleted while no run is active. Null: `raytune_llama` in the
    user's cache directory."""
    num_workers: Annotated[Annotated[int, Field(ge=1)] | None, PLACEMENT] = None
    """Number of encoding processes, one CPU each. Null: one per CPU that is free at the start."""
