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
def stepper(model: PreTrainedModel) -> BatchScheduler:
    return BatchScheduler(model, num_slots=4, max_context=20_000)


@pytest.fixture
def engine(stepper: BatchScheduler) -> Iterator[TransformersEngine]:
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


async def wait_until_idle(stepper: BatchScheduler) -> None:
    while stepper.num_running or stepper.num_waiting:
        await asyncio.sleep(0.01)


def test_engine_frees_the_slots_of_callers_that_go_away(
    engine: TransformersEngine, stepper: BatchScheduler
) -> None:
    async def main() -> None:
        for _ in range(5):
            tasks = [asyncio.create_task(collect(engine, LONG)) for _ in range(3)]
            async for step in engine.generate(LONG):
                assert step.finish_reason is None
                break
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.wait_for(wait_until_idle(stepper), timeout=60)
        assert len(await collect(engine, EngineRequest((5,), GREEDY, 4))) == 4

    asyncio.run(main())


def test_engine_refuses_more_than_may_wait(engine: TransformersEngine) -> None:
    async def main() -> None:
        # Four have slots and three wait; their iterators keep them there.
        running = [engine.generate(LONG) for _ in range(4)]
        for one in running:
            await anext(one)
        waiting = [asyncio.ensure_future(anext(engine.generate(LONG))) for _ in range(3)]
        await asyncio.sleep(0)  # They start, which queues them.
        with pytest.raises(BusyError, match="4 requests are running and 3 are waiting"):
            await anext(engine.generate(LONG))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        # The first of those that left is replaced.
        again = asyncio.ensure_future(anext(engine.generate(LONG)))
        await running[0].aclose()
        await asyncio.wait_for(again, timeout=60)

    asyncio.run(main())


@pytest.mark.parametrize(("num_requests", "num_refused"), [(4, 0), (6, 2)])
def test_engine_burst_on_free_slots_without_a_queue_is_accepted(
    model: PreTrainedModel, num_requests: int, num_refused: int
) -> None:
    stepper = BatchScheduler(model, num_slots=4, max_context=200)
    engine = TransformersEngine(stepper, max_waiting=0)
    wanted = by_transformers(model, (5,), 3)

    async def main() -> list[list[int] | BaseException]:
        tasks = [collect(engine, EngineRequest((5,), GREEDY, 3)) for _ in range(num_requests)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    try:
        results = asyncio.run(main())
    finally:
        engine.close()
    assert results[:4] == [wanted] * 4
    assert [type(one) for one in results[4:]] == [BusyError] * num_refused


def test_engine_request_too_long_is_refused_when_called(engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match="20000 tokens"):
        engine.generate(EngineRequest((1,) * 20_000, GREEDY, 1))


def test_engine_closed_between_check_and_start_raises(engine: TransformersEngine) -> None:
    steps = engine.generate(LONG)
    engine.close()

    async def main() -> None:
        # A request that nobody works on would wait forever.
        with pytest.raises(EngineError, match="was closed"):
            await asyncio.wait_for(anext(steps), timeout=60)

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
