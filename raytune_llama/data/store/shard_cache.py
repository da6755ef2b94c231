"""The shards of a token store as files of this node: where they are, or copies of them."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raytune_llama.data.store.manifest import REBUILD_HINT, Shard, StoreError
from raytune_llama.storage.buckets import NUM_CONNECTIONS
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import default_cache_dir, local_copy, local_copy_path

logger = logging.getLogger(__name__)


def local_shards(place: Place, shards: Sequence[Shard], cache_dir: Path | None) -> list[Path]:
    """Return where the shards lie on this node, in order; what is not there yet is fetched.

    Args:
        place: The store.
        shards: Those wanted.
        cache_dir: Local folder for copies; None: that in the user's cache folder.

    Raises:
        StoreError: A shard cannot be fetched, or has other bytes than the manifest says.
    """
    if place.is_local:
        return [place.path / shard.name for shard in shards]
    folder = cache_dir or default_cache_dir()
    paths = [local_copy_path(place / shard.name, shard.sha256, folder) for shard in shards]
    missing = [shard for shard, path in zip(shards, paths, strict=True) if not path.exists()]
    if missing:
        gib = sum(shard.file_bytes for shard in missing) / 2**30
        counts = f"{len(missing)} of {len(shards)}"
        logger.info("%s: copying %s shards, %.3f GiB, to %s", place, counts, gib, folder)

    def fetch(shard: Shard) -> Path:
        file = place / shard.name
        try:
            return local_copy(
                file, sha256=shard.sha256, num_bytes=shard.file_bytes, cache_dir=folder
            )
        except OSError as error:
            raise StoreError(f"{file}: cannot be copied to {folder} ({error})") from error
        except ValueError as error:
            raise StoreError(f"{error}; {REBUILD_HINT}") from error

    with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
        return list(threads.map(fetch, shards))
