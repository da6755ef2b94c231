"""Noise on the input embeddings while training (NEFTune, arXiv:2310.05914).

Shapes: B sequences, T tokens of a sequence, D hidden size.
"""

import torch
from torch import Tensor


def add_noise(embedded_BTD: Tensor, positions_BT: Tensor, alpha: float) -> Tensor:
    """Add uniform noise within alpha / sqrt(L x D) to the embeddings of documents of L tokens.

    L is a document's own length, so that it gets the noise that it would have in a batch of its
    own, whatever it is packed or padded with. Padding is a stretch of its own that nothing sees.

    Args:
        embedded_BTD: rows of the input embedding.
        positions_BT: position of each token in its document; a document starts where they do.
        alpha: the paper's; 5 to 15 there.
    """
    documents_BT = (positions_BT == 0).cumsum(dim=1)
    # A sequence that starts within a document has one more number than documents: number 0.
    counts = documents_BT.new_zeros(len(documents_BT), documents_BT.shape[1] + 1)
    counts.scatter_add_(1, documents_BT, torch.ones_like(documents_BT))
    numel_BT = counts.gather(1, documents_BT) * embedded_BTD.shape[-1]
    bound_BT1 = (alpha / numel_BT.float().sqrt()).unsqueeze(-1)
    # Drawn in float32 from the generator that dropout uses, which is seeded for each micro-batch.
    noise_BTD = torch.rand(embedded_BTD.shape, device=embedded_BTD.device) * 2 - 1
    return embedded_BTD + (noise_BTD * bound_BT1).to(embedded_BTD.dtype)
