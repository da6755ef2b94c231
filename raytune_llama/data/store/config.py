"""Where a token store is and how it is made, whatever from."""

from typing import Annotated

from pydantic import Field

from raytune_llama.config.settings import PLACEMENT, settings
from raytune_llama.tokenizer.encoder import EncoderKind


@settings
class StoreConfig:
    """A token store and how it is made, whatever from."""

    store_dir: Annotated[str, PLACEMENT]
    """Directory of the token store, local or `s3://...`, `gs://...`; it must not exist, or hold
    the store that would be built. All nodes must see it. Beside it, `<store_dir>.partial-...`
    keeps unfinished work."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the documents that go to the validation split, chosen by a hash of their text."""
    max_document_mib: Annotated[int, Field(ge=1, le=1024)] = 256
    """A longer document goes to quarantine. A worker needs about five times as much memory."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), PLACEMENT] = 0.001
    """Share of the rows that may be in quarantine; with more the job fails and says why."""
    range_mib: Annotated[int, Field(ge=1), PLACEMENT] = 64
    """Size of the ranges in which large files are read by many workers at once. Decides how the
    store is cut into files, not what it holds."""
    engine: Annotated[EncoderKind, PLACEMENT] = "auto"
    """What makes the ids. `auto`: a fast engine, where its ids were compared with the reference's
    on a sample of this corpus; `reference`: SentencePiece or tokenizers themselves."""
    cache_dir: Annotated[str | None, PLACEMENT] = None
    """Folder on each node's own disk where training keeps copies of the shards of a store in
    object storage, for the next run too; it may be deleted when none runs. Null: `raytune_llama`
    in the user's cache folder."""
    num_workers: Annotated[Annotated[int, Field(ge=1)] | None, PLACEMENT] = None
    """Encoding processes, one CPU each. Null: one for each CPU that is free at the start."""
