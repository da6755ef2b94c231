"""The engine's thread: many callers at a time, callers that go away, and failures."""

import asyncio
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.protocol import EngineRequest, SamplingOptions
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.errors import BusyError, EngineError
from tests.serve.engine.test_scheduler import GREEDY, by_transformers, make_llama, prompts

LONG = EngineRequest((1, 2, 3), GREEDY, 10_000)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_llama()


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[TransformersEngine]:
    stepper = BatchScheduler(model, num_slots=4, max_context=20_000)
    engine = TransformersEngine(stepper, max_waiting=3)
    yield engine
    engine.close()


async def collect(engine: TransformersEngine, generation: EngineRequest) -> list[int]:
    return [step.sampled.token async for step in engine.generate(generation)]


def test_engine_answers_many_callers_as_the_model_would_each(
    engine: TransformersEngine, model: PreTrainedModel
) -> None:
    asked = [EngineRequest(prompt, GREEDY, 12) for prompt in prompts(3)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(collect(engine, generation) for generation in asked))

    for generation, tokens in zip(asked, asyncio.run(main()), strict=True):
        assert tokens == by_transformers(model, generation.prompt, 12)


async def wait_until_idle(engine: TransformersEngine) -> None:
    stepper = engine._stepper  # the slots are what this is about
    while stepper.num_running or stepper.num_waiting:
        await asyncio.sleep(0.01)


def test_engine_frees_the_slots_of_callers_that_go_away(engine: TransformersEngine) -> None:
    async def main() -> None:
        for _ in range(5):
            tasks = [asyncio.create_task(collect(engine, LONG)) for _ in range(3)]
            async for step in engine.generate(LONG):
                assert step.finish_reason is None
                break
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.wait_for(wait_until_idle(engine), timeout=60)
        assert len(await collect(engine, EngineRequest((5,), GREEDY, 4))) == 4

    asyncio.run(main())


def test_engine_refuses_more_than_may_wait(engine: TransformersEngine) -> None:
    async def main() -> None:
        # Four have slots and three wait; their iterators keep them there.
        running = [engine.generate(LONG) for _ in range(4)]
        for one in running:
            await anext(one)
        waiting = [asyncio.ensure_future(anext(engine.generate(LONG))) for _ in range(3)]
        await asyncio.sleep(0.1)
        with pytest.raises(BusyError, match="3 requests are waiting"):
            await anext(engine.generate(LONG))
        for task in waiting:
            task.cancel()

    asyncio.run(main())


def test_engine_refuses_a_prompt_that_is_too_long_before_it_waits(
    engine: TransformersEngine,
) -> None:
    async def main() -> None:
        await anext(engine.generate(EngineRequest((1,) * 20_000, GREEDY, 1)))

    with pytest.raises(ValueError, match="20000 tokens"):
        asyncio.run(main())


def test_engine_that_fails_tells_every_caller_and_answers_nothing_more(
    model: PreTrainedModel,
) -> None:
    engine = TransformersEngine(BatchScheduler(model, num_slots=2, max_context=90), max_waiting=9)
    # An id beyond the table, which no tokenizer that fits makes.
    bad = EngineRequest((10_000,), SamplingOptions(temperature=0), 5)

    async def main() -> None:
        tasks = [collect(engine, LONG), collect(engine, bad)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineError] * 2
        with pytest.raises(EngineError, match="has failed"):
            await collect(engine, LONG)

    asyncio.run(main())
    with pytest.raises(EngineError):
        engine.check_health()


def test_engine_that_is_closed_ends_what_runs(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    engine = TransformersEngine(
        BatchScheduler(model, num_slots=2, max_context=20_000), max_waiting=9
    )

    async def main() -> None:
        running = engine.generate(LONG)
        await anext(running)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            async for _ in running:
                pass

    asyncio.run(main())
