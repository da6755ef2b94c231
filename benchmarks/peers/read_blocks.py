"""One side of `loader.py`: the tokens of a store in a library's own files, and batches of them.

    read_blocks.py write|read SIDE SETTINGS.json

`write` makes blocks of consecutive tokens, as the peers' own recipes for pre-training do. `read`
prints how many tokens it read in how many seconds, behind a warm-up.
"""

import json
import sys
import time
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from typing_extensions import override

from raytune_llama.data.store.token_store import TokenStore

SEED = 1
WARM_UP_SECONDS = 1.0
BATCHES_PER_CLOCK_READ = 4


class BlockReader:
    """What a side writes and reads; sizes are those of the settings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.store = Path(settings["store"])
        self.folder = Path(settings["folder"])
        self.sequences: int = settings["sequences"]
        self.tokens: int = settings["tokens"]

    def blocks(self) -> Iterator[NDArray[np.int32]]:
        """Yield blocks of `tokens` ids, in the store's order."""
        split = TokenStore.open(self.store).split("train")
        for start in range(0, split.num_tokens - self.tokens + 1, self.tokens):
            yield split.tokens(start, start + self.tokens).astype(np.int32)

    def write(self) -> str:
        """Write the library's files; return what they are."""
        raise NotImplementedError

    def batches(self) -> Iterator[torch.Tensor]:
        """Yield one epoch of shuffled batches, int64 [sequences, tokens]."""
        raise NotImplementedError


class Ours(BlockReader):
    """`read_steps`, as a training worker calls it."""

    @override
    def write(self) -> str:
        store = TokenStore.open(self.store)
        return f"a token store of {store.split('train').num_tokens:,} tokens"

    @override
    def batches(self) -> Iterator[torch.Tensor]:
        from raytune_llama.data.batches.mixture import cut_sources
        from raytune_llama.data.batches.step_batches import BatchPlan, read_steps
        from raytune_llama.data.readers.config import SourceConfig

        store = TokenStore.open(self.store)
        sources = cut_sources(
            (SourceConfig(path="text.txt"),),
            store.split("train"),
            "isolated",
            self.tokens,
            fingerprint=store.fingerprint,
            seed=SEED,
        )
        plan = BatchPlan.create(
            [source.sequences.num_sequences for source in sources],
            sequence_tokens=self.tokens,
            sequences_per_step=self.sequences,
            micro_batch_sequences=self.sequences,
            seed=SEED,
            num_epochs=1,
        )
        sequences = [source.sequences for source in sources]
        for step in read_steps(sequences, store.fingerprint, plan, rank=0, world_size=1):
            yield step.micro_batches[0].ids_BT


class HfDatasets(BlockReader):
    """Arrow files by `save_to_disk`, read by PyTorch's loader; ids only, no copy of labels."""

    @override
    def write(self) -> str:
        from datasets import Dataset, Features, Sequence, Value

        features = Features({"input_ids": Sequence(Value("int32"), length=self.tokens)})
        dataset = Dataset.from_generator(
            lambda: ({"input_ids": block} for block in self.blocks()), features=features
        )
        dataset.save_to_disk(str(self.folder / "datasets"))
        return f"HF datasets: {len(dataset):,} blocks"

    @override
    def batches(self) -> Iterator[torch.Tensor]:
        from datasets import load_from_disk

        dataset: Any = load_from_disk(str(self.folder / "datasets")).with_format("torch")
        generator = torch.Generator().manual_seed(SEED)
        loader = DataLoader(
            dataset, batch_size=self.sequences, shuffle=True, generator=generator, drop_last=True
        )
        for batch in loader:
            yield batch["input_ids"].long()


class MosaicStreaming(BlockReader):
    """MDS shards with an array a block, as MosaicML's own recipe for tokens has."""

    @override
    def write(self) -> str:
        _stand_in_for_torchvision()
        from streaming import MDSWriter

        number = 0
        columns = {"tokens": f"ndarray:int32:{self.tokens}"}
        with MDSWriter(out=str(self.folder / "streaming"), columns=columns) as writer:
            for block in self.blocks():
                writer.write({"tokens": block})
                number += 1
        return f"MosaicML streaming: {number:,} blocks"

    @override
    def batches(self) -> Iterator[torch.Tensor]:
        _stand_in_for_torchvision()
        from streaming import StreamingDataset

        dataset = StreamingDataset(
            local=str(self.folder / "streaming"),
            shuffle=True,
            shuffle_seed=SEED,
            batch_size=self.sequences,
        )
        for batch in DataLoader(dataset, batch_size=self.sequences, drop_last=True):
            yield batch["tokens"].long()


class Litdata(BlockReader):
    """Chunks for litdata's tokens loader."""

    @override
    def write(self) -> str:
        import litdata
        from litdata.streaming import TokensLoader

        litdata.optimize(
            fn=torch.from_numpy,
            inputs=list(self.blocks()),
            output_dir=str(self.folder / "litdata"),
            num_workers=1,
            chunk_size=self.tokens * 2048,
            item_loader=TokensLoader(),
            verbose=False,
        )
        return "litdata: chunks of 2,048 blocks"

    @override
    def batches(self) -> Iterator[torch.Tensor]:
        from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader

        dataset = StreamingDataset(
            str(self.folder / "litdata"),
            item_loader=TokensLoader(block_size=self.tokens),
            shuffle=True,
            seed=SEED,
            drop_last=True,
        )
        for batch in StreamingDataLoader(dataset, batch_size=self.sequences, num_workers=0):
            yield batch.long()


SIDES: dict[str, type[BlockReader]] = {
    "ours": Ours,
    "HF datasets": HfDatasets,
    "MosaicML streaming": MosaicStreaming,
    "litdata": Litdata,
}


def _stand_in_for_torchvision() -> None:
    """Let `streaming` be imported where torchvision has no build for a torch without CUDA.

    Its package imports two names for its sets of images, which play no part here.
    """
    names = {
        "torchvision": (),
        "torchvision.datasets": ("VisionDataset",),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("to_tensor",),
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for member in members:
            setattr(module, member, object)
        sys.modules.setdefault(name, module)


def epochs(side: BlockReader) -> Iterator[torch.Tensor]:
    """Yield batches of one epoch after the other."""
    while True:
        yield from side.batches()


def read(side: BlockReader, num_seconds: float) -> dict[str, float]:
    """Read for some seconds behind a warm-up; return the tokens and the time."""
    batches = epochs(side)
    wanted = (side.sequences, side.tokens)
    stop = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < stop:
        batch = next(batches)
        assert batch.dtype == torch.int64, batch.dtype
        assert tuple(batch.shape) == wanted, batch.shape
    number, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < num_seconds:
        for _ in range(BATCHES_PER_CLOCK_READ):
            number += next(batches).numel()
    return {"tokens": number, "seconds": seconds}


def main() -> None:
    """Do what the arguments say."""
    task, name, file = sys.argv[1:]
    settings: dict[str, Any] = json.loads(Path(file).read_text())
    side = SIDES[name](settings)
    # One thread each: the comparison is of libraries, not of how many cores they take.
    torch.set_num_threads(1)
    result = side.write() if task == "write" else json.dumps(read(side, settings["seconds"]))
    sys.stdout.write(result + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
