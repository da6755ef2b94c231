"""A split of given ids, for what is cut from it."""

from collections.abc import Callable

import pytest

from raytune_llama.data.store.manifest import Shard, SplitManifest
from raytune_llama.data.store.shards import ShardWriter
from raytune_llama.data.store.token_store import TokenSplit
from raytune_llama.storage.place import Place

Documents = list[list[int]]
MakeSplit = Callable[..., TokenSplit]

BYTES_PER_TOKEN = 3


@pytest.fixture(scope="session")
def make_split(tmp_path_factory: pytest.TempPathFactory) -> MakeSplit:
    """Write a split: each argument is a source, a list of files, which are lists of documents.

    A file has two shards, so that ranges cross them. A document has `BYTES_PER_TOKEN` bytes for
    each of its tokens; its offset in the file is its number there.
    """
    root = tmp_path_factory.mktemp("splits")

    def make(*sources: list[Documents]) -> TokenSplit:
        folder = root / str(len(list(root.iterdir())))  # so that none is overwritten
        folder.mkdir()
        shards: list[Shard] = []
        file_number = 0
        for source, files in enumerate(sources):
            for documents in files:
                half = len(documents) // 2
                numbered = list(enumerate(documents))
                for part in (numbered[:half], numbered[half:]):
                    path = folder / f"train-{len(shards):05d}.arrow"
                    with ShardWriter(path, "uint16", source=source) as writer:
                        for number, ids in part:
                            writer.write(ids, BYTES_PER_TOKEN * len(ids), file_number, number)
                    if writer.shard:
                        shards.append(writer.shard)
                file_number += 1
        return TokenSplit(Place.local(folder), SplitManifest.from_shards(shards))

    return make
