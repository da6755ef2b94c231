"""Check for silent data corruption: replicated tensors must be equal on all workers.

A memory cell or an arithmetic unit that fails silently leaves one worker with different weights;
the loss may not show it for days.
"""

import socket
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from raytune_llama.train.process_group import ProcessGroup

_WORD_BYTES = 8


class ReplicaError(FloatingPointError):
    """Replicated weights differ between workers, so a worker's results cannot be trusted."""


def compare_replicas(
    step: int, tensors: Iterable[tuple[str, Tensor]], workers: ProcessGroup
) -> None:
    """Compare tensors that must be equal on all workers; collective.

    The bits of each tensor are summed as integers on its own device, which detects any single
    flipped bit, and the sums are all-gathered: 8 bytes per tensor and worker. It reads every weight
    once: 5 GB/s were measured with two CPU threads, so 0.1 s for a model of 135M parameters in
    fp32; sums of a type narrower than 64 bits were 40 times slower.

    Args:
        step: optimizer steps done, for the message.
        tensors: tensors by name, in the same order on every worker.
        workers: all workers of the run.

    Raises:
        ReplicaError: some tensor differs; names the workers that differ from the majority, with
            their hosts. Raised on every worker.
    """
    named = [(name, checksum(tensor)) for name, tensor in tensors]
    if workers.world_size == 1 or not named:
        return
    sums_RN = workers.all_gather_rows(torch.stack([total for _, total in named]))
    counts = Counter(map(tuple, sums_RN))
    if len(counts) == 1:
        return
    usual, count = counts.most_common(1)[0]
    is_most = 2 * count > workers.world_size
    others = [rank for rank, sums in enumerate(sums_RN) if not is_most or tuple(sums) != usual]
    hosts = workers.all_gather(socket.gethostname())
    columns = zip(*sums_RN, strict=True)
    differing = [name for (name, _), sums in zip(named, columns, strict=True) if len(set(sums)) > 1]
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    who = ", ".join(f"worker {rank} on {hosts[rank]}" for rank in others)
    verdict = (
        f"weights differ from those of most of the {workers.world_size} workers: {who}"
        if is_most
        else f"weights differ between workers, and no majority shows which are right: {who}"
    )
    raise ReplicaError(
        f"after step {step}: {verdict} ({differing[0]}{more}). A device or its memory is faulty: "
        "remove the node from the cluster, and run the same command again to resume from the "
        "newest checkpoint"
    )


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as 64-bit words, modulo 2**64; an int64 scalar tensor."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % _WORD_BYTES:
        # A view that starts inside a word of its buffer, as ZeRO's weights may.
        flat = flat.clone()
    flat = flat.view(torch.uint8)
    rest = flat.numel() % _WORD_BYTES
    total = flat[: flat.numel() - rest].view(torch.int64).sum()
    if not rest:
        return total
    last = torch.nn.functional.pad(flat[-rest:], (0, _WORD_BYTES - rest))
    return total + last.view(torch.int64).sum()
