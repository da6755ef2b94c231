"""The proof of a merge: what a file holds is read back and compared with a computation of its own.

    num_changed = prove(written, plan, names)

Changed weights are compared with a computation in float32, or in float64 where float32 is stored;
replaced and untouched ones with their sources, bit for bit. Of weights that were written as 8-bit
blocks each value is within half a step of its block of the exact value, which no other 8-bit number
of that block is.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from raytune_llama.merge.freed import release_free_memory
from raytune_llama.merge.plan import MergePlan, row_slices
from raytune_llama.model.tensors import Weights

Q8_0_BLOCK_SIZE = 32
"""Neighbours in a row that share the size of a step, in GGUF's Q8_0."""

_SLACK = 1e-5
"""Float32's own rounding, relative to the sum of the terms' sizes."""
_LARGEST = 127
"""The 8-bit number of the largest value of a block."""
_HALF_ROUNDING, _HALF_SMALLEST = 2.0**-11, 2.0**-25
"""By how much float16, in which a step is stored, rounds: relative, and near zero."""


def verify_weights(
    written: Weights, plan: MergePlan, names: Iterable[str], *, blocks: frozenset[str] = frozenset()
) -> int:
    """Compare what was written with its sources.

    Args:
        written: What is in the files, by the names of the plan.
        plan: What was meant to be written.
        names: The weights to look at.
        blocks: Those that were written as 8-bit blocks; they are read as rows of bytes.

    Returns:
        How many weights differ from the base.

    Raises:
        AssertionError: A weight is not what it should be.
    """
    changed = 0
    for name in names:
        release_free_memory()
        stored = written.read(name)
        if name in blocks or plan.recipes[name].updates:
            changed += _verify_values(name, stored, plan, is_blocks=name in blocks)
            continue
        source = plan.read_source(name)
        if not torch.equal(stored, source.to(stored.dtype)):
            raise AssertionError(f"{name} was not written as it is in its source")
        changed += _replaces_base(name, plan)
    return changed


def _verify_values(name: str, stored: Tensor, plan: MergePlan, *, is_blocks: bool) -> bool:
    """Compare values with exact ones; return whether they differ from the base."""
    source, updates = plan.read_source(name), plan.recipes[name].updates
    # A half-precision number has 2**-9 or 2**-12 of rounding: beside it, float32's is none.
    is_half = stored.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if is_half else torch.float64
    differs = False
    for rows in row_slices(source):
        exact = source[rows].to(dtype)
        size = exact.abs()
        for adapter in updates:
            size += adapter.absolute_delta(name, rows, dtype)
            added = adapter.delta(name, rows, dtype).add_(exact)
            exact = adapter.apply_dora_magnitudes(name, added, rows)
            if exact is not added:
                size *= _lengths(exact) / _lengths(added)  # DoRA scales errors too
        part = stored[rows]
        if is_blocks:
            # Where 8 bits round a change away, it is one all the same.
            differs |= not torch.equal(exact, source[rows].double())
            _compare(name, _decode_blocks(part), exact, size, _block_rounding(exact))
        else:
            differs |= not torch.equal(part, source[rows].to(part.dtype))
            _compare(name, part, exact, size)
    return differs if updates else _replaces_base(name, plan)


def _replaces_base(name: str, plan: MergePlan) -> bool:
    """Whether a weight that no update is added to is another one than the base's."""
    recipe = plan.recipes[name]
    if recipe.source is None or name not in plan.base.specs:
        return recipe.source is not None
    before, after = plan.base.read(name), plan.read_source(name)
    dtype = recipe.spec.dtype
    return before.shape != after.shape or not torch.equal(before.to(dtype), after.to(dtype))


def _lengths(rows: Tensor) -> Tensor:
    least = torch.finfo(rows.dtype).tiny
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(least)


def _decode_blocks(rows: Tensor) -> Tensor:
    """Return the values of rows of blocks: a float16 step, then 8-bit numbers, each block."""
    parts = rows.reshape(len(rows), -1, Q8_0_BLOCK_SIZE + 2)
    step = parts[:, :, :2].contiguous().view(torch.float16).float()
    numbers = parts[:, :, 2:].contiguous().view(torch.int8).float()
    return (step * numbers).reshape(len(rows), -1)


def _block_rounding(exact: Tensor) -> Tensor:
    """Return by how much 8 bits may round: half a step, and what rounding the step adds."""
    largest = exact.abs().reshape(len(exact), -1, Q8_0_BLOCK_SIZE).amax(dim=2)
    step = largest / _LARGEST
    allowed = step / 2 + _LARGEST * torch.clamp(step * _HALF_ROUNDING, min=_HALF_SMALLEST)
    return allowed.repeat_interleave(Q8_0_BLOCK_SIZE, dim=1)


def _compare(
    name: str, stored: Tensor, exact: Tensor, size: Tensor, more: Tensor | None = None
) -> None:
    """Check that stored values are the exact ones, but for one rounding and float32's own."""
    info = torch.finfo(stored.dtype)
    allowed = exact.abs().mul_(info.eps / 2).add_(info.smallest_normal).add_(size, alpha=_SLACK)
    if more is not None:
        allowed += more
    error = stored.to(exact.dtype).sub_(exact).abs_()
    if not bool((error <= allowed).all()):
        worst = float((error - allowed).max())
        raise AssertionError(f"{name} is off by {worst:.3g} more than rounding explains")
