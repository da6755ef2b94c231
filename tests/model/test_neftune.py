"""Promise: noise on embeddings has the paper's size by document, and is there in training only."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from raytune_llama.model.config import LoraConfig
from raytune_llama.model.llama import SummedLoss, add_noise
from raytune_llama.model.lora import attach_adapter
from tests.model.conftest import MakeModel

HIDDEN = 64


def positions_of(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize(
    ("lengths", "bounds"),
    [
        # alpha / sqrt(L D), by hand.
        ((100,), (5 / 80,)),
        ((4, 25, 100), (5 / 16, 5 / 40, 5 / 80)),
    ],
)
def test_add_noise_is_uniform_within_the_bound_of_each_document(
    lengths: tuple[int, ...], bounds: tuple[float, ...]
) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    noise = add_noise(torch.zeros(8, tokens, HIDDEN), positions_of(*lengths).expand(8, tokens), 5.0)
    for part, bound in zip(noise.split(lengths, dim=1), bounds, strict=True):
        assert part.abs().max() <= bound
        # The mean, the mean square and the largest of thousands of uniform numbers.
        assert abs(float(part.mean())) < 0.1 * bound
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert float(part.abs().max()) > 0.99 * bound


def test_add_noise_in_a_sequence_that_starts_within_a_document_counts_its_tokens_there() -> None:
    torch.manual_seed(0)
    positions_BT = torch.cat([torch.arange(7, 16), torch.arange(100)])[None]
    noise = add_noise(torch.zeros(1, 109, HIDDEN), positions_BT, 5.0)
    assert float(noise[:, :9].abs().max()) == pytest.approx(5 / 24, rel=0.05)
    assert float(noise[:, 9:].abs().max()) == pytest.approx(5 / 80, rel=0.05)


@pytest.fixture(params=["llama", "bloom"])
def model(request: pytest.FixtureRequest, make_llama: MakeModel) -> PreTrainedModel:
    if request.param == "llama":
        return make_llama()
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=64,
            hidden_size=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
    )


def own_loss(model: PreTrainedModel, embedded_BTD: Tensor, labels_BT: Tensor) -> float:
    """Return the loss of the model's own logits for embeddings."""
    logits = model(inputs_embeds=embedded_BTD, use_cache=False).logits
    return nn.functional.cross_entropy(logits[0], labels_BT[0], reduction="sum").item()


@pytest.mark.parametrize("alpha", [None, 5.0, 50.0])
@pytest.mark.parametrize("training", [True, False])
def test_summed_loss_adds_the_noise_in_training_only(
    model: PreTrainedModel, alpha: float | None, *, training: bool
) -> None:
    ids_BT = torch.arange(5, 25)[None]
    module = SummedLoss(model, neftune_alpha=alpha).train(training)
    for seed in (1, 2):
        with torch.no_grad():
            torch.manual_seed(seed)
            embedded_BTD = model.get_input_embeddings()(ids_BT)
            if alpha is not None and training:
                noisy_BTD = add_noise(embedded_BTD, positions_of(20), alpha)
                assert not torch.equal(noisy_BTD, embedded_BTD)
                embedded_BTD = noisy_BTD
            torch.manual_seed(seed)
            got = module(ids_BT, positions_of(20), ids_BT + 1).item()
            assert got == pytest.approx(own_loss(model, embedded_BTD, ids_BT + 1), rel=1e-5)


def test_summed_loss_with_noise_trains_through_a_saved_embedding(make_llama: MakeModel) -> None:
    config = LoraConfig(modules_to_save=("embed_tokens",), dropout=0.0)
    attached = attach_adapter(make_llama(), config, seed=0)
    ids_BT = torch.arange(5, 25)[None]
    SummedLoss(attached, neftune_alpha=5.0)(ids_BT, positions_of(20), ids_BT + 1).backward()
    missing = [n for n, p in attached.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
