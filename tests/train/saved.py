"""Looking into checkpoints, and taking one without a run."""

import errno
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raytune_llama.config.settings import from_dict
from raytune_llama.storage.lease import Fence
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.config import CheckpointConfig
from raytune_llama.train.checkpoint.layout import CHECKPOINT_MANIFEST, RunState, SaveResult
from raytune_llama.train.checkpoint.saver import Saver
from raytune_llama.train.checkpoint.shards import SliceReader
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.protocol import STATE_KEYS, StateSlice, TrainEngine
from raytune_llama.train.loop import Session, open_session, read_batches, train_step
from raytune_llama.train.process_group import ProcessGroup

ALONE = ProcessGroup.single_process()
FULL = {"train": "full", "lora": None}


@dataclass(frozen=True)
class WholeState:
    """All of a parameter, flat."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class NoLog:
    """Is told what saving takes, and forgets it."""

    def saving(self) -> AbstractContextManager[None]:
        return nullcontext()

    def saved(self, result: SaveResult) -> None:
        pass


class FullDisk:
    """Refuses to flush files of a checkpoint as often as told."""

    def __init__(self, patch: pytest.MonkeyPatch, times: int, name: str = "state-") -> None:
        """Refuse from now on.

        Args:
            patch: takes it back.
            times: how often.
            name: what is in the paths of the files.
        """
        self.left = times
        fsync = os.fsync

        def refusing(descriptor: int) -> None:
            file = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            if name in file and self.left > 0:
                self.left -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        patch.setattr(os, "fsync", refusing)


def build(config: PretrainConfig, num_steps: int = 0) -> Session:
    """Open a run alone and take its first steps."""
    session = open_session(config, ALONE)
    batches = read_batches(session, 0)
    for _ in range(num_steps):
        batch = next(batches)
        train_step(session, batch, sum(batch.source_targets))
    return session


def open_saver(
    session: Session, run_dir: Place, *, fence: Fence | None = None, **fields: object
) -> Saver:
    """Return what saves a run alone."""
    config = from_dict(CheckpointConfig, fields)
    return Saver(run_dir, config, session.engine, replace(ALONE, fence=fence), NoLog())


def save(
    session: Session,
    run_dir: Place,
    state: RunState,
    *,
    fence: Fence | None = None,
    **fields: object,
) -> None:
    """Take one checkpoint and wait for it."""
    with open_saver(session, run_dir, fence=fence, **fields) as saver:
        saver.save(state)


def state_of(engine: TrainEngine) -> dict[str, WholeState]:
    """Return copies of what an engine alone would save."""
    slices: list[StateSlice] = list(engine.trainable_state())
    assert all(each.start == 0 for each in slices)
    return {
        each.name: WholeState(*(getattr(each, part).clone() for part in STATE_KEYS))
        for each in slices
    }


def assert_same(ours: TrainEngine, wanted: TrainEngine) -> None:
    """Compare all that two engines would save, bit for bit."""
    assert ours.scalar_state() == wanted.scalar_state()
    left, right = state_of(ours), state_of(wanted)
    assert list(left) == list(right)
    for name, state in right.items():
        for part in STATE_KEYS:
            tensor = getattr(state, part)
            assert tensor.dtype == torch.float32
            assert torch.equal(getattr(left[name], part), tensor), f"{part} of {name}"


def state_files(checkpoint: Place) -> list[Place]:
    """Return the files of a checkpoint but its manifest."""
    return [file for file in checkpoint.files() if file.name != CHECKPOINT_MANIFEST]


def hashes_of(checkpoint: Place) -> list[str]:
    """Return what the manifest says of the content of each file, in their order."""
    files = (checkpoint / CHECKPOINT_MANIFEST).read_json()["files"]
    assert files
    return [entry["hash"] for _, entry in sorted(files.items())]


def weights_in(checkpoint: Place) -> dict[str, Tensor]:
    """Read the whole weights of a checkpoint on the disk."""
    manifest = (checkpoint / CHECKPOINT_MANIFEST).read_json()
    shapes = {name: entry["shape"] for name, entry in manifest["tensors"].items()}
    with SliceReader(checkpoint, manifest, Path("unused")) as reader:
        return {
            name: reader.read("weight", name, 0, prod(shape)).view(shape)
            for name, shape in shapes.items()
        }


def assert_same_content(ours: Place, wanted: Place) -> None:
    """Compare every number of two checkpoints on the disk, whoever has written them."""
    manifests = [(place / CHECKPOINT_MANIFEST).read_json() for place in (ours, wanted)]
    for key in ("state", "scalars"):
        assert manifests[0][key] == manifests[1][key]
    shapes = [
        {name: entry["shape"] for name, entry in manifest["tensors"].items()}
        for manifest in manifests
    ]
    assert shapes[0] == shapes[1]
    with (
        SliceReader(ours, manifests[0], Path("unused")) as left,
        SliceReader(wanted, manifests[1], Path("unused")) as right,
    ):
        for name, shape in shapes[0].items():
            for part in STATE_KEYS:
                numbers = (part, name, 0, prod(shape))
                assert torch.equal(left.read(*numbers), right.read(*numbers)), f"{part} of {name}"
