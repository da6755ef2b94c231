"""Rows with different adapters in one pass, and rows of the base beside them."""

import torch
from transformers import PreTrainedModel

from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.serve.engine.protocol import EngineRequest, SampledToken, SamplingOptions
from raytune_llama.serve.engine.scheduler import BatchScheduler
from tests.serve.engine.test_scheduler import GREEDY, make_llama, prompts, run

ENDS = ("q_proj", "v_proj", "down_proj")


def updates_of(*, rank: int, seed: int) -> dict[str, LoraLayerWeights]:
    generator = torch.Generator().manual_seed(seed)
    updates: dict[str, LoraLayerWeights] = {}
    for name, module in make_llama().named_modules():
        if name.endswith(ENDS[: 1 + seed % 3]) and isinstance(module, torch.nn.Linear):
            a_RI = torch.randn(rank, module.in_features, generator=generator) * 0.3
            b_RO = torch.randn(rank, module.out_features, generator=generator) * 0.3
            updates[name] = LoraLayerWeights(a_RI, b_RO)
    return updates


def merged(
    updates: dict[str, LoraLayerWeights], model: PreTrainedModel | None = None
) -> PreTrainedModel:
    model = model or make_llama()
    with torch.no_grad():
        for name, update in updates.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight += update.b_RO.T @ update.a_RI
    return model


def test_rows_with_different_adapters_generate_as_each_merged_model_alone() -> None:
    model = make_llama()
    stepper = BatchScheduler(model, num_slots=5, max_context=200, prefill_tokens=7)
    adapters = {n: updates_of(rank=2 + 3 * n, seed=n) for n in range(3)}
    for key, updates in adapters.items():
        stepper.attach(key, updates)
    keys = [None, *adapters]
    # Of different lengths, so that rows become free in the middle and move.
    asked = {
        n: EngineRequest(p, GREEDY, 3 + 5 * (n % 3), adapter=keys[n % 4])
        for n, p in enumerate(prompts(16))
    }
    told = run(stepper, asked.items(), joining_every=2)
    for key in keys:
        alone = merged(adapters[key] if key is not None else {})
        own = {n: g for n, g in asked.items() if g.adapter == key}
        plain = {n: EngineRequest(g.prompt, GREEDY, g.max_tokens) for n, g in own.items()}
        wanted = run(BatchScheduler(alone, num_slots=1, max_context=200), plain.items())
        assert {n: told[n] for n in own} == wanted


def choices(stepper: BatchScheduler, adapters: list[str | None]) -> list[list[SampledToken]]:
    """Return the choices of rows that all run from the first step to the last."""
    sampling = SamplingOptions(temperature=0, num_logprobs=5)
    for key, adapter in enumerate(adapters):
        stepper.add(key, EngineRequest((5, 6, 7 + key), sampling, 20, adapter=adapter))
    told: list[list[SampledToken]] = [[] for _ in adapters]
    while stepper.num_running or stepper.num_waiting:
        for step in stepper.step():
            assert isinstance(step.key, int)
            told[step.key].append(step.sampled)
    return told


def test_rows_of_the_base_are_bit_for_bit_those_of_a_model_without_adapters() -> None:
    wanted = choices(BatchScheduler(make_llama(), num_slots=6, max_context=200), [None] * 6)
    model = make_llama()
    stepper = BatchScheduler(model, num_slots=6, max_context=200)
    stepper.attach("a", updates_of(rank=3, seed=2))
    stepper.attach("b", updates_of(rank=5, seed=1))
    assert choices(stepper, [None] * 6) == wanted
    mixed = choices(stepper, [None, "a", None, "b", "a", None])
    for row, adapter in enumerate((None, "a", None, "b", "a", None)):
        assert (mixed[row] == wanted[row]) == (adapter is None)


def test_model_without_its_adapters_is_the_one_before() -> None:
    model = make_llama()
    before = dict(model.named_modules())
    stepper = BatchScheduler(model, num_slots=2, max_context=200)
    for n in range(3):
        stepper.attach(n, updates_of(rank=3, seed=n))
    stepper.detach(1)
    asked = [("x", EngineRequest((5, 6), GREEDY, 8, adapter=2))]
    told = run(stepper, asked)
    alone = merged(updates_of(rank=3, seed=2))
    wanted = run(
        BatchScheduler(alone, num_slots=1, max_context=200),
        [("x", EngineRequest((5, 6), GREEDY, 8))],
    )
    assert told == wanted
    stepper.detach(0)
    stepper.detach(2)
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())
