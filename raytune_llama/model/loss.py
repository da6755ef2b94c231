"""Cross-entropy over a large vocabulary without ever holding the logits of a batch.

Shapes: N positions, D hidden size, V vocabulary rows, C positions per chunk.

The output projection and the softmax run chunk by chunk, and each chunk's gradients are taken
while its logits are in memory, so that backward needs no second projection. This is the idea of
Liger Kernel's fused linear cross-entropy (arXiv:2410.10989), in plain PyTorch for any device.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Label of a position that is not a target."""

CHUNK_BYTES = 64 * 2**20
"""Bytes of float32 logits held at a time. Each chunk makes one pass over the full weight gradient:
smaller chunks were slower on a CPU, larger ones no faster."""


def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Return the summed negative log-likelihood, in nats, of the labels that are not IGNORE.

    A sum, not a mean: the stored gradients stay of order one, so half precision does not
    underflow before the caller divides by its number of target tokens.

    Args:
        hidden_ND: last hidden states; half or single precision.
        weight_VD: rows of the output projection, of the same dtype.
        labels_N: class of each position, or IGNORE.

    Returns:
        A float32 scalar; differentiable once with respect to `hidden_ND` and `weight_VD`.
    """
    return cast("Tensor", _SummedCrossEntropy.apply(hidden_ND, weight_VD, labels_N))


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # torch adds what forward stores
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
    ) -> Tensor:
        targets = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
        rows = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden_ND) if wants_hidden else None
        # Accumulated in float32: in half precision late chunks would be rounded away.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        buffer = weight_VD.new_empty(min(rows, len(targets)), weight_VD.shape[0])
        for chunk_C in targets.split(rows):
            hidden_CD = hidden_ND[chunk_C]
            logits_CV = torch.mm(hidden_CD, weight_VD.T, out=buffer[: len(chunk_C)]).float()
            label_C1 = labels_N[chunk_C].unsqueeze(1)
            label_logit_C1 = logits_CV.gather(1, label_C1)
            peak_C1 = logits_CV.amax(dim=1, keepdim=True)
            # From here on the logits' memory holds exponentials, then gradients.
            scaled_CV = logits_CV.sub_(peak_C1).exp_()
            sum_C1 = scaled_CV.sum(dim=1, keepdim=True)
            total += (sum_C1.log() + peak_C1 - label_logit_C1).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one_hot.
            grad_CV = scaled_CV.div_(sum_C1)
            grad_CV.scatter_add_(1, label_C1, grad_CV.new_full(label_C1.shape, -1.0))
            grad_CV = grad_CV.to(weight_VD.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk_C] = grad_CV @ weight_VD
            if grad_weight is not None:
                if grad_weight.dtype == grad_CV.dtype:
                    grad_weight.addmm_(grad_CV.T, hidden_CD)
                else:
                    grad_weight += grad_CV.T @ hidden_CD
        ctx.weight_dtype = weight_VD.dtype
        ctx.gradients = (grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one output, one gradient
        ctx: Any,  # noqa: ANN401  # torch adds what forward stored
        grad_total: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        # Removed from the context: they are scaled in place, which works only once.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the summed cross-entropy can be differentiated only once")
        grad_hidden, grad_weight = gradients
        if grad_hidden is not None:
            grad_hidden.mul_(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None
