"""Vectors against means computed by hand, and what runs beside them."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from raytune_llama.serve.engine.embed import Embedder
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.protocol import EngineRequest, Vectors
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.errors import BusyError
from tests.serve.conftest import ObservedScheduler
from tests.serve.engine.test_scheduler import (
    GREEDY,
    by_transformers,
    make_bloom,
    make_llama,
    make_qwen,
    prompts,
)

MAKERS = [make_llama, make_qwen, make_bloom]


def by_hand(model: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
    mean = output.hidden_states[-1][0].double().mean(0)
    return (mean / mean.norm()).numpy()


def run(embedder: Embedder) -> dict[object, list[Vectors]]:
    """Make all passes; return each job's vectors, checked for being told in one go."""
    told: dict[object, list[Vectors]] = {}
    done: set[object] = set()
    while embedder.jobs:
        for made in embedder.step():
            assert made.key not in done, "vectors behind the last"
            told.setdefault(made.key, []).append(made.vectors)
            done |= {made.key} if made.is_last else set()
    assert done == set(told)
    return told


@pytest.mark.parametrize("make", MAKERS)
# All together, some together and the longer ones in pieces, and each in pieces or alone.
@pytest.mark.parametrize("pass_tokens", [2000, 24, 5])
def test_vectors_are_normed_means_of_the_last_hidden_states(
    make: Callable[[], PreTrainedModel], pass_tokens: int
) -> None:
    model, texts = make(), prompts(12)
    assert max(map(len, texts)) > 24
    embedder = Embedder(model, max_context=100, pass_tokens=pass_tokens)
    embedder.add("a", texts)
    vectors = np.concatenate(run(embedder)["a"])
    assert vectors.dtype == np.float32
    wanted = np.stack([by_hand(model, ids) for ids in texts])
    np.testing.assert_allclose(vectors, wanted, atol=2e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_no_pass_has_more_tokens_than_asked_for(make: Callable[[], PreTrainedModel]) -> None:
    model, sizes = make(), []
    handle = model.base_model.register_forward_pre_hook(
        lambda _, __, options: sizes.append(options["input_ids"].numel()), with_kwargs=True
    )
    embedder = Embedder(model, max_context=100, pass_tokens=16)
    embedder.add("a", prompts(12))
    run(embedder)
    handle.remove()
    assert 8 < max(sizes) <= 16


def test_small_job_does_not_wait_for_a_large_one() -> None:
    embedder = Embedder(make_llama(), max_context=100, pass_tokens=16)
    embedder.add("large", [(1, 2, 3, 4, 5, 6, 7, 8, 9)] * 50)
    embedder.add("small", [(1, 2), (3,)])
    first = [made for _ in range(2) for made in embedder.step()]
    assert [(made.key, made.is_last) for made in first] == [("large", False), ("small", True)]
    embedder.remove("large")
    assert not embedder.jobs


@pytest.mark.parametrize(
    ("texts", "problem"), [([], "no text"), ([(1,), ()], "text 1 has 0"), ([(1,) * 101], "101")]
)
def test_texts_that_cannot_be_read_are_refused(texts: list[tuple[int, ...]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Embedder(make_llama(), max_context=100).add("a", texts)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_llama()


def test_answers_go_on_and_are_the_same_while_many_texts_are_read(llama: PreTrainedModel) -> None:
    stepper = BatchScheduler(llama, num_slots=2, max_context=20_000, prefill_tokens=16)
    engine = TransformersEngine(stepper, max_waiting=3)
    prompt, texts = prompts(1)[0], prompts(12) * 8

    async def main() -> None:
        generation = engine.generate(EngineRequest(prompt, GREEDY, 10_000))
        tokens: list[int] = []
        batches: list[Vectors] = []

        async def embed() -> None:
            batches.extend([vectors async for vectors in engine.embed(texts)])

        task = asyncio.ensure_future(embed())
        async for step in generation:
            tokens.append(step.sampled.token)
            if task.done():
                break
        await task
        await generation.aclose()
        # A token with every pass over texts, but for those before the answer's first.
        assert len(tokens) >= len(batches) - 5 > 30
        assert tokens[:60] == by_transformers(llama, prompt, 60)
        wanted = np.stack([by_hand(llama, ids) for ids in texts])
        np.testing.assert_allclose(np.concatenate(batches), wanted, atol=2e-6)

    asyncio.run(main())
    engine.close()


def test_texts_of_callers_that_go_away_are_read_no_further(llama: PreTrainedModel) -> None:
    stepper = ObservedScheduler(llama, num_slots=2, max_context=200, prefill_tokens=16)
    engine = TransformersEngine(stepper, max_waiting=3)

    async def main() -> None:
        # One runs and three wait; they take turns.
        running = [engine.embed([(1, 2, 3)] * 100_000) for _ in range(4)]
        for one in running:
            await anext(one)
        with pytest.raises(BusyError, match="3 are waiting"):
            await anext(engine.embed([(1,)]))
        for one in running:
            await one.aclose()
        while stepper.embedder.jobs:
            await asyncio.sleep(0.01)
        # Free again.
        assert [len(vectors) async for vectors in engine.embed([(1, 2), (3,)])] == [2]

    asyncio.run(asyncio.wait_for(main(), timeout=60))
    engine.close()
