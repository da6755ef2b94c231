"""From logits to a token, at the edges of what a request may ask for."""

import pytest
import torch

from raytune_llama.serve.engine.protocol import SamplingOptions
from raytune_llama.serve.engine.sampling import Sampler


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-3])
def test_tiny_temperature_chooses_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([-40.0, 3.0, 80.0, -torch.inf, 79.0])
    for top_p in (5e-324, 0.5, 1.0):
        chooser = Sampler(SamplingOptions(temperature=temperature, top_p=top_p, seed=1), set())
        assert chooser.sample(logits).token == 2


@pytest.mark.parametrize("penalty", [0.01, 10.0])
def test_any_penalty_leaves_tokens_to_choose(penalty: float) -> None:
    logits = torch.tensor([-100.0, 0.0, 100.0, -torch.inf])
    chooser = Sampler(
        SamplingOptions(temperature=2.0, repetition_penalty=penalty, seed=1), {0, 1, 2, 3}
    )
    assert {chooser.sample(logits).token for _ in range(20)} <= {0, 1, 2}
