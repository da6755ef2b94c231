"""Scores of continuations equal those of a plain forward pass, however contexts are shared."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raytune_llama.config.errors import UserError
from raytune_llama.serve.engine.scoring import Candidates, ContinuationScorer, Score

VOCAB, CONTEXT = 50, 96


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def tiny_qwen() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


def tiny_bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    ).eval()


MODELS = {"llama": tiny_llama(), "qwen": tiny_qwen(), "bloom": tiny_bloom()}


def score_plainly(
    model: PreTrainedModel, context: tuple[int, ...], tokens: tuple[int, ...]
) -> Score:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*context, *tokens]])).logits[0].float()
    rows = logits[len(context) - 1 : -1].log_softmax(1)
    ids = torch.tensor(tokens)
    logprob = float(rows.gather(1, ids.unsqueeze(1)).sum())
    return Score(logprob, bool((rows.argmax(1) == ids).all()))


@st.composite
def batches(draw: st.DrawFn) -> list[Candidates]:
    """Contexts that branch off from each other at random places, some of them equal."""
    generator = random.Random(draw(st.integers(0, 2**32)))

    def some(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(VOCAB) for _ in range(length))

    contexts = [some(draw(st.integers(1, 60)))]
    for _ in range(draw(st.integers(0, 9))):
        parent = draw(st.sampled_from(contexts))
        kept = draw(st.integers(0, len(parent)))
        contexts.append((*parent[:kept], *some(draw(st.integers(0 if kept else 1, 30))))[:70])
    return [
        Candidates(
            context,
            tuple(some(generator.randint(1, 8)) for _ in range(draw(st.integers(1, 5)))),
        )
        for context in contexts
    ]


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=40, deadline=None)
@given(batch=batches(), pass_tokens=st.sampled_from([4, 16, 64, 1000]))
def test_scores_of_any_tree_of_contexts_equal_a_plain_forward_pass(
    model: str, batch: list[Candidates], pass_tokens: int
) -> None:
    scorer = ContinuationScorer(MODELS[model], max_context=CONTEXT, pass_tokens=pass_tokens)
    found = dict(scorer.score(batch))
    assert sorted(found) == list(range(len(batch)))
    for number, candidates in enumerate(batch):
        for score, continuation in zip(found[number], candidates.continuations, strict=True):
            wanted = score_plainly(MODELS[model], candidates.context, continuation)
            assert score.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert score.is_greedy == wanted.is_greedy


def test_shared_examples_are_computed_once() -> None:
    num_tokens = 0

    def count(_module: torch.nn.Module, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal num_tokens
        num_tokens += kwargs["input_ids"].numel()

    examples = tuple(range(40))
    batch = [Candidates((*examples, n, n), ((1,), (2,), (3, 4))) for n in range(10)]
    model = tiny_llama()
    model.register_forward_pre_hook(count, with_kwargs=True)
    list(ContinuationScorer(model, max_context=CONTEXT).score(batch))
    # The examples, and of each question two tokens and the first of the continuation of two.
    assert num_tokens == 40 + 10 * 3


def test_long_continuation_is_scored_in_several_passes() -> None:
    generator = random.Random(0)
    text = tuple(generator.randrange(VOCAB) for _ in range(90))
    scorer = ContinuationScorer(MODELS["llama"], max_context=CONTEXT, pass_tokens=16)
    ((_, (score,)),) = scorer.score([Candidates((5,), (text,))])
    assert score.logprob == pytest.approx(
        score_plainly(MODELS["llama"], (5,), text).logprob, abs=1e-3
    )


@pytest.mark.parametrize(
    "candidates",
    [
        Candidates((), ((1,),)),
        Candidates((1,), ()),
        Candidates((1,), ((2,), ())),
        Candidates((1,) * CONTEXT, ((2, 3),)),
    ],
)
def test_candidates_that_can_not_be_scored_are_refused(candidates: Candidates) -> None:
    scorer = ContinuationScorer(MODELS["llama"], max_context=CONTEXT)
    with pytest.raises(UserError):
        list(scorer.score([Candidates((1,), ((2,),)), candidates]))


def test_full_context_leaves_room_for_one_more_token() -> None:
    context = tuple(n % VOCAB for n in range(CONTEXT))
    scorer = ContinuationScorer(MODELS["llama"], max_context=CONTEXT)
    ((_, (score,)),) = scorer.score([Candidates(context, ((7,),))])
    assert score.logprob < 0
