"""Promise: Bloom's documents are kept apart in a packed sequence, and each is as it is alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from raytune_llama.model.config import LoraConfig
from raytune_llama.model.llama import SummedLoss
from raytune_llama.model.lora import attach_adapter
from raytune_llama.model.loss import IGNORE_INDEX
from raytune_llama.model.vocab import is_tied

ROWS = 64


def make_bloom(num_heads: int = 2) -> BloomForCausalLM:
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=ROWS,
        hidden_size=24,
        n_layer=2,
        n_head=num_heads,
        initializer_range=0.3,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return BloomForCausalLM(config).eval()


def document(num_tokens: int, *, seed: int) -> Tensor:
    return torch.randint(ROWS, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def packed_of(*documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, positions and labels of one sequence."""
    labels = [torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])]) for ids in documents]
    positions = [torch.arange(len(ids)) for ids in documents]
    return torch.cat(documents)[None], torch.cat(positions)[None], torch.cat(labels)[None]


def own_loss(model: BloomForCausalLM, ids_T: Tensor) -> Tensor:
    """Return the loss of a document from the model's own code."""
    logits = model(input_ids=ids_T[None], use_cache=False).logits[0]
    assert logits is not None
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids_T[1:], reduction="sum")


@pytest.mark.parametrize("num_heads", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)]
)
def test_bloom_packed_documents_have_the_losses_of_its_own_code(
    dtype: torch.dtype, num_heads: int, tolerance: float
) -> None:
    model: Any = make_bloom(num_heads)
    model.to(dtype)
    documents = [document(length, seed=length) for length in (40, 1, 300, 7)]
    ids, positions, labels = packed_of(*documents)
    stop = 0
    for document_T in documents:
        # Its labels alone. In half precision ALiBi is rounded more the later a key stands.
        start, stop = stop, stop + len(document_T)
        own = torch.full_like(labels, IGNORE_INDEX)
        own[:, start:stop] = labels[:, start:stop]
        with torch.no_grad():
            packed = SummedLoss(model)(ids, positions, own).item()
            alone = own_loss(model, document_T).item() if len(document_T) > 1 else 0.0
        assert packed == pytest.approx(alone, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bloom_document_behind_another_does_not_depend_on_one_bit_of_it(dtype: torch.dtype) -> None:
    model: Any = make_bloom()
    model.to(dtype)
    second = document(8, seed=3)
    losses: list[float] = []
    for first in (document(30, seed=1), document(30, seed=2)):
        ids, positions, labels = packed_of(first, second)
        labels[:, :30] = IGNORE_INDEX
        with torch.no_grad():
            losses.append(SummedLoss(model)(ids, positions, labels).item())
    assert losses[0] == losses[1]
    with torch.no_grad():
        assert losses[0] == pytest.approx(float(own_loss(model, second)), rel=5e-3)


def test_bloom_checkpointing_keeps_every_gradient() -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = make_bloom()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = LoraConfig(targets=("query_key_value",), dropout=0.0)
        attached = attach_adapter(model, config, seed=0).train()
        documents = [document(9, seed=1), document(14, seed=2)]
        SummedLoss(attached)(*packed_of(*documents)).backward()
        found.append({n: p.grad for n, p in attached.named_parameters() if p.grad is not None})
    assert len(found[0]) == 4
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize(
    "saved", [("word_embeddings",), ("lm_head",), ("word_embeddings", "lm_head")]
)
def test_bloom_tied_table_that_is_trained_stays_one(saved: tuple[str, ...]) -> None:
    model = make_bloom()
    config = LoraConfig(targets=("query_key_value",), modules_to_save=saved)
    attached = attach_adapter(model, config, seed=0)
    assert is_tied(model)
    tables = [p for p in attached.parameters() if p.requires_grad and p.shape == (ROWS, 24)]
    assert len(tables) == 1
