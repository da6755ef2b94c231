"""Verify a merge: read the written files back and compare them with an independent computation.

    num_changed = verify_weights(written, plan, names)

Changed weights are compared with a computation in float32, or in float64 if they are stored as
float32; replaced and unchanged ones with their sources, bit for bit. In weights quantized to 8-bit
blocks, each value must be within half a quantization step of the exact value.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from raytune_llama.merge.plan import MergePlan, row_slices
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.tensors import Weights, release_free_memory

Q8_0_BLOCK_SIZE = 32
"""Consecutive values of a row that share one scale, in GGUF's Q8_0."""

_SLACK = 1e-5
"""Rounding error of float32, relative to the sum of the terms' magnitudes."""
_LARGEST = 127
"""Quantized value of the largest value of a block."""
_HALF_ROUNDING, _HALF_SMALLEST = 2.0**-11, 2.0**-25
"""Rounding error of float16, in which a scale is stored: relative, and near zero."""


def verify_weights(
    written: Weights, plan: MergePlan, names: Iterable[str], *, blocks: frozenset[str] = frozenset()
) -> int:
    """Compare the written weights with base and adapters.

    Args:
        written: Weights in the files, by the names of the plan.
        plan: Plan of the merge.
        names: Names of the weights to compare.
        blocks: Names of the weights that were written as 8-bit blocks; they are read as rows of
            bytes.

    Returns:
        The number of weights that differ from the base.

    Raises:
        AssertionError: A weight differs from its expected value.
    """
    changed = 0
    for name in names:
        release_free_memory()
        stored, differs = written.read(name), False
        for rows in row_slices(plan.recipes[name].spec.shape):
            source = plan.read_source_rows(name, rows)
            differs |= verify_rows(
                plan, name, rows, stored=stored[rows], source=source, is_blocks=name in blocks
            )
        changed += differs
    return changed


def verify_rows(
    plan: MergePlan,
    name: str,
    rows: slice,
    *,
    stored: Tensor,
    source: Tensor,
    is_blocks: bool = False,
) -> bool:
    """Compare some written rows of a weight with base and adapters.

    Args:
        plan: Plan of the merge.
        name: Name of the weight.
        rows: Rows to compare.
        stored: These rows, as they are in the file.
        source: These rows of the weight to which low-rank updates were added.
        is_blocks: Whether they were written as 8-bit blocks, and are read as bytes.

    Returns:
        Whether they differ from the base's.

    Raises:
        AssertionError: A value differs from its expected value.
    """
    updates = plan.recipes[name].updates
    if not updates and not is_blocks:
        if not torch.equal(stored, source.to(stored.dtype)):
            raise AssertionError(f"{name} was not written as it is in its source file")
        return _replaces_base(name, plan, rows, source)
    # Half precision rounds by 2**-9 or 2**-12; float32's rounding is negligible to that.
    is_half = stored.dtype in (torch.bfloat16, torch.float16)
    before = source.to(torch.float32 if is_half else torch.float64)
    exact, size = _compute_exactly(updates, name, rows, before)
    if is_blocks:
        _compare(name, _decode_blocks(stored), exact, size, _block_rounding(exact))
        # A change that 8 bits round away still counts.
        differs = not torch.equal(exact, before)
    else:
        _compare(name, stored, exact, size)
        differs = not torch.equal(stored, source.to(stored.dtype))
    return differs if updates else _replaces_base(name, plan, rows, source)


def _compute_exactly(
    updates: Iterable[Adapter], name: str, rows: slice, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Return merged rows in the type of `before`, and the magnitudes to which errors are relative.

    The order of the sums is not that of the merge.
    """
    exact, size = before.clone(), before.abs()
    for adapter in updates:
        if name in adapter.token_rows:
            exact = adapter.replace_token_rows(name, exact, rows)
            continue
        size += adapter.absolute_delta(name, rows, before.dtype)
        added = adapter.delta(name, rows, before.dtype).add_(exact)
        exact = adapter.apply_dora_magnitudes(name, added, rows)
        if exact is not added:
            size *= _lengths(exact) / _lengths(added)  # DoRA scales errors too
    return exact, size


def _replaces_base(name: str, plan: MergePlan, rows: slice, source: Tensor) -> bool:
    """Whether rows of a weight without low-rank updates differ from the base's."""
    recipe = plan.recipes[name]
    if recipe.source is None or name not in plan.base.specs:
        return recipe.source is not None
    if plan.base.specs[name].shape != recipe.spec.shape:
        return True
    dtype = recipe.spec.dtype
    return not torch.equal(plan.base.read_rows(name, rows).to(dtype), source.to(dtype))


def _lengths(rows: Tensor) -> Tensor:
    least = torch.finfo(rows.dtype).tiny
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(least)


def _decode_blocks(rows: Tensor) -> Tensor:
    """Dequantize rows of blocks: per block, a float16 scale, then 8-bit integers."""
    parts = rows.reshape(len(rows), -1, Q8_0_BLOCK_SIZE + 2)
    scale = parts[:, :, :2].contiguous().view(torch.float16).float()
    quantized = parts[:, :, 2:].contiguous().view(torch.int8).float()
    return (scale * quantized).reshape(len(rows), -1)


def _block_rounding(exact: Tensor) -> Tensor:
    """Return the allowed error of 8-bit blocks: half a step, plus the rounding of the scale."""
    largest = exact.abs().reshape(len(exact), -1, Q8_0_BLOCK_SIZE).amax(dim=2)
    step = largest / _LARGEST
    allowed = step / 2 + _LARGEST * torch.clamp(step * _HALF_ROUNDING, min=_HALF_SMALLEST)
    return allowed.repeat_interleave(Q8_0_BLOCK_SIZE, dim=1)


def _compare(
    name: str, stored: Tensor, exact: Tensor, size: Tensor, more: Tensor | None = None
) -> None:
    """Check that stored values are exact up to one rounding and the error of float32."""
    info = torch.finfo(stored.dtype)
    allowed = exact.abs().mul_(info.eps / 2).add_(info.smallest_normal).add_(size, alpha=_SLACK)
    if more is not None:
        allowed += more
    error = stored.to(exact.dtype).sub_(exact).abs_()
    if not bool((error <= allowed).all()):
        worst = float((error - allowed).max())
        raise AssertionError(f"{name} is off by {worst:.3g} more than rounding explains")
