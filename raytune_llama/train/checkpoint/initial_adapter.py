"""Initial values of a run's adapter, stored with the run if its result depends on them (PiSSA).

A run resumed on any machine continues from the same bits that it started with.
"""

import logging
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from raytune_llama.model.pissa import principal_factors
from raytune_llama.storage.files import OUTPUT_MANIFEST, write_json_atomic
from raytune_llama.storage.hashes import find_hash, hash_file
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import is_published, local_copy, publish_place
from raytune_llama.train.checkpoint.layout import CheckpointError, list_checkpoints
from raytune_llama.train.checkpoint.restore import node_folder
from raytune_llama.train.process_group import ProcessGroup

logger = logging.getLogger(__name__)

_FILE = "initial.safetensors"


def initial_factors(
    run_dir: Place, attached: PeftModel, workers: ProcessGroup
) -> dict[str, Tensor]:
    """Return the initial factors of a run's adapter, the same on every worker; collective.

    Rank 0 computes and stores them at the run's first start; every worker reads the stored file.

    Args:
        run_dir: directory of the run.
        attached: base model with the adapter, full weights, on the CPU.
        workers: all workers of the run.

    Raises:
        CheckpointError: the file is damaged, or the run has checkpoints and the file is missing.
    """
    if workers.is_rank_zero:
        _store_once(run_dir, attached)
    # If rank 0 fails, the other workers fail here.
    workers.barrier()
    with node_folder(workers) as copies:
        return read_initial_factors(run_dir, copies)


def read_initial_factors(run_dir: Place, copies: Path) -> dict[str, Tensor]:
    """Read the initial factors of a run's adapter.

    Args:
        run_dir: directory of the run.
        copies: local folder for a copy, if the run is in object storage.

    Raises:
        CheckpointError: the file is damaged.
    """
    place = _place(run_dir)
    entry = (place / OUTPUT_MANIFEST).read_json()["files"][_FILE]
    wanted = find_hash(entry)
    assert wanted is not None
    path = local_copy(place / _FILE, wanted=wanted, num_bytes=entry["bytes"], cache_dir=copies)
    if hash_file(path, like=wanted) != wanted:
        raise CheckpointError(
            f"{place / _FILE}: its content does not match its recorded hash, and the run cannot "
            "resume without the initial adapter; restore it from a backup, or use another run_dir"
        )
    return load_file(path)


def _place(run_dir: Place) -> Place:
    return run_dir / "initial"


def _store_once(run_dir: Place, attached: PeftModel) -> None:
    place = _place(run_dir)
    if is_published(place, OUTPUT_MANIFEST):
        return
    if list_checkpoints(run_dir):
        raise CheckpointError(
            f"{place} is missing, and the run's checkpoints cannot be resumed without the initial "
            "adapter; restore it from a backup, or use another run_dir"
        )
    tensors = principal_factors(attached)
    with publish_place(place, last=OUTPUT_MANIFEST) as folder:
        save_file(tensors, folder / _FILE)
        path = folder / _FILE
        entry = {"bytes": path.stat().st_size, "hash": hash_file(path)}
        write_json_atomic(folder / OUTPUT_MANIFEST, {"format": 1, "files": {_FILE: entry}})
    logger.info("stored %d tensors of the initial adapter in %s", len(tensors), place)
