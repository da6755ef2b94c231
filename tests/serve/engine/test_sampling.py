"""From logits to a token, at the edges of what a request may ask for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from raytune_llama.serve.engine.grammar import GrammarCompiler
from raytune_llama.serve.engine.protocol import SampledToken, SamplingOptions
from raytune_llama.serve.engine.sampling import Sampler, sample_batch
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.tokenizer.loader import encode_text

INTEGER = {"type": "integer"}


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


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        # Relative to the most likely token these have 1, 0.6, 0.3 and 0.1.
        ({"min_p": 0.0}, {0, 1, 2, 3}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        # At this temperature 1, 0.77, 0.55 and 0.32.
        ({"min_p": 0.5, "temperature": 2.0}, {0, 1, 2}),
        ({"min_p": 0.2, "top_k": 2}, {0, 1}),
        # The first of the three that are left has 0.526 of their probability, and 0.5 of all.
        ({"min_p": 0.2, "top_p": 0.52}, {0}),
        ({"top_p": 0.52}, {0, 1}),
    ],
)
def test_min_p_excludes_tokens_less_likely_than_a_share_of_the_likeliest(
    fields: dict[str, Any], wanted: set[int]
) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    chooser = Sampler(SamplingOptions(seed=1, **fields), set())
    assert {chooser.sample(logits).token for _ in range(300)} == wanted


def greedy_tokens(logits_V: Tensor, count: int, **fields: Any) -> list[int]:  # noqa: ANN401
    """Return the tokens of a greedy sequence whose logits stay the same, beside a plain one."""
    plain = Sampler(SamplingOptions(temperature=0), {0})
    chooser = Sampler(SamplingOptions(temperature=0, **fields), {0, 1, 2})
    tokens: list[int] = []
    for _ in range(count):
        beside, choice = sample_batch(torch.stack([logits_V, logits_V]), [plain, chooser])
        assert beside == SampledToken(int(logits_V.argmax()))
        tokens.append(choice.token)
    return tokens


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, [0, 0, 0, 0, 0, 0]),
        # 3 2.5, 2 2.5, 2 1.5, and as they are from then on.
        ({"presence_penalty": 1.0}, [0, 1, 0, 0, 0, 0]),
        # 3 2.5, 2.6 2.5, 2.2 2.5, 2.2 2.1, 1.8 2.1, 1.8 1.7
        ({"frequency_penalty": 0.4}, [0, 0, 1, 0, 1, 0]),
        # 3 2.5, 2.6 2.5, 2.4 2.5, 2.4 2.1, 2.2 2.1, 2 2.1
        ({"frequency_penalty": 0.2, "presence_penalty": 0.2}, [0, 0, 1, 0, 0, 1]),
        ({"logit_bias": ((1, 0.6),)}, [1, 1, 1, 1, 1, 1]),
        # 2 2.5, 2 1.5: the bias and a penalty add up.
        ({"logit_bias": ((0, -1.0),), "presence_penalty": 1.0}, [1, 0, 1, 1, 1, 1]),
        # 1.5 1.45: the prompt has all tokens, and the bias comes before the division.
        ({"logit_bias": ((1, 0.4),), "repetition_penalty": 2.0}, [0, 0, 0, 0, 0, 0]),
        ({"logit_bias": ((1, 0.6),), "repetition_penalty": 2.0}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_greedy_tokens_follow_penalties_on_what_was_generated(
    fields: dict[str, Any], wanted: list[int]
) -> None:
    assert greedy_tokens(torch.tensor([3.0, 2.5, -3.0]), 6, **fields) == wanted


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_negative_penalty_prefers_what_was_generated(name: str) -> None:
    fields: dict[str, Any] = {name: -2.0}
    chooser = Sampler(SamplingOptions(temperature=0, **fields), set())
    assert chooser.sample(torch.tensor([1.0, 0.0, 0.0])).token == 0
    assert chooser.sample(torch.tensor([0.0, 1.0, 0.9])).token == 0


@pytest.mark.parametrize(
    ("bias", "wanted"),
    [(((0, -100.0), (3, -100.0)), {2, 1}), (((1, 100.0), (4, 100.0)), {1})],
)
def test_bias_bans_and_forces_tokens_but_none_that_does_not_exist(
    bias: tuple[tuple[int, float], ...], wanted: set[int]
) -> None:
    logits_V = torch.tensor([8.0, -8.0, 0.0, 1.0, -torch.inf])
    chooser = Sampler(SamplingOptions(temperature=2.0, seed=2, logit_bias=bias), set())
    assert {chooser.sample(logits_V).token for _ in range(500)} == wanted
    assert greedy_tokens(logits_V, 2, logit_bias=bias)[0] in wanted


def test_logprobs_are_those_of_the_model_whatever_changes_the_choice() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -torch.inf])
    options = SamplingOptions(
        temperature=0.5,
        min_p=0.5,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        logit_bias=((2, 100.0),),
        num_logprobs=2,
    )
    chooser = Sampler(options, set())
    logprobs = logits_V.log_softmax(0).tolist()
    for _ in range(3):
        assert chooser.sample(logits_V) == SampledToken(
            2, logprobs[2], ((0, logprobs[0]), (1, logprobs[1]))
        )


def test_constraint_prevails_over_a_bias(served: ServedModel) -> None:
    grammar = GrammarCompiler(served.tokenizer, served.stop_ids).compile_schema(INTEGER)
    allowed = grammar.allowed_tokens().nonzero().squeeze(1).tolist()
    forbidden = encode_text(served.tokenizer, ["fox"])[0]
    assert len(allowed) > 1
    assert not set(forbidden) & set(allowed)
    bias = (*((token, -100.0) for token in allowed), *((token, 100.0) for token in forbidden))
    for temperature in (0, 1.0):
        options = SamplingOptions(temperature=temperature, logit_bias=bias)
        chooser = Sampler(options, set(), grammar.copy())
        assert chooser.sample(torch.zeros(len(served.tokenizer))).token in allowed
    # Among those that the constraint allows, the bias decides.
    chooser = Sampler(
        SamplingOptions(temperature=0, logit_bias=((allowed[-1], 1.0),)), set(), grammar.copy()
    )
    assert chooser.sample(torch.zeros(len(served.tokenizer))).token == allowed[-1]
