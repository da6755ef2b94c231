"""Log-probabilities of a prompt's tokens, against one forward pass of the model over it.

In float64, so that the order of sums, which differs between passes, does not matter at 1e-5.
"""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.serve.engine.protocol import (
    EngineRequest,
    SampledToken,
    SamplingOptions,
    TokenOutput,
)
from raytune_llama.serve.engine.scheduler import BatchScheduler
from tests.serve.engine.test_lora import merged, updates_of
from tests.serve.engine.test_scheduler import (
    GREEDY,
    ROWS,
    make_bloom,
    make_llama,
    make_qwen,
    run,
)

NUM_TOP = 5


def prompt_of(length: int, *, num_tokens: int = ROWS) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(0, num_tokens, (length,), generator=generator).tolist())


def outputs_of(
    stepper: BatchScheduler, asked: Mapping[Hashable, EngineRequest]
) -> dict[Hashable, list[TokenOutput]]:
    for key, generation in asked.items():
        stepper.add(key, generation)
    told: dict[Hashable, list[TokenOutput]] = {key: [] for key in asked}
    while stepper.num_running or stepper.num_waiting:
        for step in stepper.step():
            told[step.key].append(step)
    return told


def assert_scored(
    found: Sequence[SampledToken],
    model: PreTrainedModel,
    prompt: tuple[int, ...],
    *,
    num_tokens: int = ROWS,
    num_top: int = NUM_TOP,
) -> None:
    """Compare with a plain forward pass over the prompt."""
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt])).logits[0, :, :num_tokens]
    logprobs_TV = logits_TV.log_softmax(1)
    assert [one.token for one in found] == list(prompt[1:])
    for place, one in enumerate(found):
        top = logprobs_TV[place].topk(num_top)
        assert one.logprob == pytest.approx(float(logprobs_TV[place, one.token]), rel=0, abs=1e-5)
        assert [token for token, _ in one.top_logprobs] == top.indices.tolist()
        # Exactly the same number where the token is among the most likely.
        assert dict(one.top_logprobs).get(one.token, one.logprob) == one.logprob
        values = [value for _, value in one.top_logprobs]
        assert values == pytest.approx(top.values.tolist(), rel=0, abs=1e-5)


@pytest.mark.parametrize("make", [make_llama, make_qwen, make_bloom])
def test_prompt_logprobs_equal_a_plain_forward_pass(make: Callable[[], PreTrainedModel]) -> None:
    model = make().double()
    # The first six are read in one padded pass; the others in chunks, 205 with one token at last.
    lengths = (1, 2, 17, 5, 9, 16, 230, 205, 30)
    stepper = BatchScheduler(model, num_slots=8, max_context=250, prefill_tokens=102)
    plain = {n: EngineRequest(prompt_of(n), GREEDY, 4) for n in lengths}
    told = outputs_of(
        stepper,
        {
            n: EngineRequest(
                prompt_of(n), GREEDY, 4, num_prompt_logprobs=None if n in (5, 9, 30) else NUM_TOP
            )
            for n in lengths
        },
    )
    for length in lengths:
        first, *later = told[length]
        if length in (5, 9, 30):
            assert first.prompt == ()
        else:
            assert_scored(first.prompt, model, prompt_of(length))
        assert all(step.prompt == () for step in later)
    # What is generated is the same with and without.
    tokens = {n: [step.sampled.token for step in told[n]] for n in lengths}
    alone = run(BatchScheduler(model, num_slots=1, max_context=250), plain.items())
    assert tokens == {n: found for n, (found, _) in alone.items()}


def test_prompt_logprobs_count_only_rows_that_can_be_generated() -> None:
    model, num_tokens = make_llama().double(), ROWS - 20
    stepper = BatchScheduler(
        model, num_slots=2, max_context=250, num_tokens=num_tokens, prefill_tokens=10
    )
    prompt = prompt_of(25, num_tokens=num_tokens)
    ((first,),) = outputs_of(
        stepper, {"a": EngineRequest(prompt, GREEDY, 1, num_prompt_logprobs=NUM_TOP)}
    ).values()
    assert_scored(first.prompt, model, prompt, num_tokens=num_tokens)


def test_prompt_logprobs_without_likely_tokens_are_the_prompts_own() -> None:
    model = make_llama().double()
    stepper = BatchScheduler(model, num_slots=2, max_context=250)
    sampling = SamplingOptions(temperature=0, num_logprobs=2, logit_bias=((3, 100.0),))
    ((first,),) = outputs_of(
        stepper, {"a": EngineRequest(prompt_of(12), sampling, 1, num_prompt_logprobs=0)}
    ).values()
    # The bias concerns what is sampled only.
    assert_scored(first.prompt, model, prompt_of(12), num_top=0)
    assert first.sampled.token == 3


def test_prompt_logprobs_are_those_of_the_rows_own_adapter() -> None:
    adapters = {
        key: {
            name: LoraLayerWeights(update.a_RI.double(), update.b_RO.double())
            for name, update in updates_of(rank=rank, seed=seed).items()
        }
        for key, rank, seed in (("a", 3, 2), ("b", 5, 1))
    }
    model = make_llama().double()
    stepper = BatchScheduler(model, num_slots=6, max_context=200, prefill_tokens=60)
    for key, updates in adapters.items():
        stepper.attach(key, updates)
    asked: dict[Hashable, EngineRequest] = {
        (adapter, length): EngineRequest(
            prompt_of(length), GREEDY, 2, adapter=adapter, num_prompt_logprobs=NUM_TOP
        )
        for length in (7, 12, 130)
        for adapter in (None, *adapters)
    }
    told = outputs_of(stepper, asked)
    for adapter, length in itertools.product((None, *adapters), (7, 12, 130)):
        alone = merged(adapters[adapter] if adapter else {}, make_llama().double())
        assert_scored(told[adapter, length][0].prompt, alone, prompt_of(length))


def test_sequence_that_is_removed_while_its_prompt_is_scored_leaves_nothing() -> None:
    model = make_llama().double()
    stepper = BatchScheduler(model, num_slots=2, max_context=250, prefill_tokens=50)
    generation = EngineRequest(prompt_of(120), GREEDY, 2, num_prompt_logprobs=NUM_TOP)
    stepper.add("gone", generation)
    assert stepper.step() == []
    stepper.remove("gone")
    told = outputs_of(stepper, {"next": generation})
    assert_scored(told["next"][0].prompt, model, prompt_of(120))


def test_only_passes_over_such_a_prompt_compute_logits_at_all_positions() -> None:
    model = make_llama()
    widths: list[int] = []

    def record(_: torch.nn.Module, __: object, logits_NUV: torch.Tensor) -> None:
        widths.append(logits_NUV.shape[1])

    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(record)
    stepper = BatchScheduler(model, num_slots=2, max_context=250, prefill_tokens=50)
    outputs_of(stepper, {"a": EngineRequest(prompt_of(60), GREEDY, 3)})
    assert widths == [1] * 4
    widths.clear()
    outputs_of(stepper, {"a": EngineRequest(prompt_of(60), GREEDY, 3, num_prompt_logprobs=0)})
    assert widths == [50, 10, 1, 1]
