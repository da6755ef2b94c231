"""Bloom's forward pass over packed documents, which its own code does not support.

Bloom takes no position ids: its attention is biased by distance (ALiBi, arXiv:2108.12409), and
only a mask isolates documents. Its own forward pass derives both from one token mask, so here they
are computed from the positions and passed to its own layers. The self-tests at the start of a run
compare the result with the model's own logits.

Shapes: B sequences, T tokens, D hidden size, H heads, S keys (T of them).
"""

import torch
from torch import Tensor
from transformers import BloomModel


def run_bloom(decoder: BloomModel, embedded_BTD: Tensor, positions_BT: Tensor) -> Tensor:
    """Return the last hidden states, (B, T, D).

    Args:
        decoder: the model without its head.
        embedded_BTD: the token embeddings.
        positions_BT: position of each token in its document; a token at position 0 starts a
            document, which does not attend to anything before it.
    """
    hidden_BTD = decoder.word_embeddings_layernorm(embedded_BTD)
    alibi = _alibi(decoder, positions_BT, hidden_BTD.dtype)
    mask_B1TS = _document_mask(positions_BT, hidden_BTD.dtype)
    for layer in decoder.h:
        hidden_BTD, _ = layer(hidden_BTD, alibi=alibi, attention_mask=mask_B1TS, use_cache=False)
    return decoder.ln_f(hidden_BTD)


def _alibi(decoder: BloomModel, positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the ALiBi bias of each key by its position in its document, (B x H, 1, S).

    Half precision rounds the bias of a late position: counted from the start of the sequence, it
    would differ from that of the unpacked document.
    """
    ones_BT = torch.ones_like(positions_BT)
    by_place = decoder.build_alibi_tensor(ones_BT, decoder.num_heads, dtype)
    places = positions_BT.repeat_interleave(decoder.num_heads, dim=0).unsqueeze(1)
    return by_place.gather(2, places)


def _document_mask(positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask, (B, 1, T, S): 0 for visible keys, else the dtype's minimum."""
    documents_BT = (positions_BT == 0).cumsum(dim=1)
    same_BTS = documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)
    length = positions_BT.shape[1]
    before_TS = torch.ones(length, length, dtype=torch.bool, device=positions_BT.device).tril()
    hidden_B1TS = ~(same_BTS & before_TS).unsqueeze(1)
    mask_B1TS = torch.zeros(hidden_B1TS.shape, dtype=dtype, device=positions_BT.device)
    return mask_B1TS.masked_fill(hidden_B1TS, torch.finfo(dtype).min)
