"""What the step loop generates, whatever else runs beside it."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raytune_llama.serve.engine.protocol import EngineFinishReason, EngineRequest, SamplingOptions
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.errors import InvalidRequestError

GREEDY = SamplingOptions(temperature=0)
ROWS = 97
SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA_SHAPE = {
    **SHAPE,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
}


def make_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA_SHAPE)).eval()


def make_qwen() -> PreTrainedModel:
    torch.manual_seed(1)
    return Qwen3ForCausalLM(Qwen3Config(**LLAMA_SHAPE, head_dim=16)).eval()


def make_bloom() -> PreTrainedModel:
    torch.manual_seed(2)
    config = BloomConfig(
        vocab_size=ROWS, hidden_size=48, n_layer=3, n_head=4, initializer_range=0.4
    )
    return BloomForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_llama()


def prompts(count: int, *, longest: int = 40) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [tuple(torch.randint(0, ROWS, (n,), generator=generator).tolist()) for n in lengths]


def run(
    stepper: BatchScheduler,
    generations: Iterable[tuple[Hashable, EngineRequest]],
    *,
    joining_every: int = 0,
) -> dict[Hashable, tuple[list[int], EngineFinishReason | None]]:
    """Run until all have ended; with `joining_every`, one joins after so many steps."""
    waiting = list(generations)
    told: dict[Hashable, tuple[list[int], EngineFinishReason | None]] = {
        key: ([], None) for key, _ in waiting
    }
    count = 0
    while waiting or stepper.num_running or stepper.num_waiting:
        while waiting and (not joining_every or count % joining_every == 0):
            stepper.add(*waiting.pop(0))
            if joining_every:
                break
        for step in stepper.step():
            tokens, finish = told[step.key]
            assert finish is None, "a token behind the last"
            told[step.key] = ([*tokens, step.sampled.token], step.finish_reason)
        count += 1
    return told


def by_transformers(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """Generate without any cache: the whole sequence anew for each token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("make", [make_llama, make_qwen, make_bloom])
@pytest.mark.parametrize("joining_every", [0, 3])
def test_stepper_generates_what_the_model_says_alone(
    make: Callable[[], PreTrainedModel], joining_every: int
) -> None:
    model = make()
    stepper = BatchScheduler(model, num_slots=4, max_context=200, prefill_tokens=7)
    # Of different lengths, so that rows become free in the middle and move.
    asked = {n: EngineRequest(p, GREEDY, 3 + 5 * (n % 4)) for n, p in enumerate(prompts(11))}
    told = run(stepper, asked.items(), joining_every=joining_every)
    for n, generation in asked.items():
        wanted = by_transformers(model, generation.prompt, generation.max_tokens)
        assert told[n] == (wanted, "length")


def test_stepper_on_16_at_a_time_equals_one_after_another(llama: PreTrainedModel) -> None:
    asked = {n: EngineRequest(p, GREEDY, 24) for n, p in enumerate(prompts(16))}
    together = run(BatchScheduler(llama, num_slots=16, max_context=200), asked.items())
    alone = run(BatchScheduler(llama, num_slots=1, max_context=200), asked.items())
    assert together == alone


def test_stepper_with_seeds_draws_the_same_whatever_runs_beside(llama: PreTrainedModel) -> None:
    asked = {
        n: EngineRequest(p, SamplingOptions(temperature=0.9, top_p=0.95, seed=n), 12)
        for n, p in enumerate(prompts(6))
    }
    together = run(BatchScheduler(llama, num_slots=6, max_context=200), asked.items())
    alone = run(BatchScheduler(llama, num_slots=1, max_context=200), asked.items())
    assert together == alone
    prompt = asked[0].prompt
    others = [EngineRequest(prompt, SamplingOptions(temperature=0.9, seed=n), 12) for n in range(5)]
    drawn = run(BatchScheduler(llama, num_slots=5, max_context=200), enumerate(others))
    assert len({tuple(tokens) for tokens, _ in drawn.values()}) == 5


def test_stepper_ends_at_a_stop_token_and_tells_it(llama: PreTrainedModel) -> None:
    prompt = prompts(1)[0]
    whole = by_transformers(llama, prompt, 12)
    stop = whole[5]
    end = whole.index(stop) + 1
    generation = EngineRequest(prompt, GREEDY, 12, frozenset({stop}))
    told = run(BatchScheduler(llama, num_slots=2, max_context=200), [("a", generation)])
    assert told["a"] == (whole[:end], "stop")


def test_stepper_ends_where_the_context_is_full(llama: PreTrainedModel) -> None:
    prompt = prompts(1)[0][:5]
    told = run(
        BatchScheduler(llama, num_slots=1, max_context=9),
        [("a", EngineRequest(prompt, GREEDY, 99))],
    )
    tokens, finish = told["a"]
    assert (len(prompt) + len(tokens), finish) == (9, "length")


@pytest.mark.parametrize("length", [0, 9, 12])
def test_stepper_refuses_a_prompt_without_room_for_an_answer(
    llama: PreTrainedModel, length: int
) -> None:
    stepper = BatchScheduler(llama, num_slots=1, max_context=9)
    with pytest.raises(ValueError, match=f"{length} tokens, wanted 1 to 8"):
        stepper.add("a", EngineRequest((1,) * length, GREEDY, 1))


def test_stepper_never_generates_surplus_rows() -> None:
    model = make_llama()
    favourite = by_transformers(model, (5,), 1)[0]
    stepper = BatchScheduler(model, num_slots=1, max_context=50, num_tokens=favourite)
    drawn = EngineRequest((5,), SamplingOptions(temperature=1.5, seed=1), 30)
    told = run(stepper, [("greedy", EngineRequest((5,), GREEDY, 5)), ("drawn", drawn)])
    assert all(token < favourite for tokens, _ in told.values() for token in tokens)


@pytest.mark.parametrize("after", [*range(8), 14, 20])
def test_stepper_that_lets_one_go_answers_the_others_alike(
    llama: PreTrainedModel, after: int
) -> None:
    asked = {n: EngineRequest(p, GREEDY, 10) for n, p in enumerate(prompts(5))}
    stepper = BatchScheduler(llama, num_slots=3, max_context=200, prefill_tokens=6)
    for key, generation in asked.items():
        stepper.add(key, generation)
    told: dict[Hashable, list[int]] = {n: [] for n in asked}
    for count in range(200):
        if count == after:
            stepper.remove(1)
            stepper.remove(4)
            stepper.remove("never there")
        for step in stepper.step():
            assert count < after or step.key not in (1, 4)
            told[step.key].append(step.sampled.token)
    assert (stepper.num_running, stepper.num_waiting) == (0, 0)
    for n in (0, 2, 3):
        assert told[n] == by_transformers(llama, asked[n].prompt, 10)


def test_stepper_lets_the_first_of_several_go_while_they_are_answered(
    llama: PreTrainedModel,
) -> None:
    asked = {n: EngineRequest(p, GREEDY, 10) for n, p in enumerate(prompts(3))}
    stepper = BatchScheduler(llama, num_slots=3, max_context=200, prefill_tokens=100)
    told: dict[Hashable, list[int]] = {n: [] for n in asked}
    for key, generation in asked.items():
        stepper.add(key, generation)
    while len(told[2]) < 2:
        for step in stepper.step():
            told[step.key].append(step.sampled.token)
    stepper.remove(0)  # the last row takes its place, outside of a step
    assert stepper.num_running == 2
    while stepper.num_running:
        for step in stepper.step():
            told[step.key].append(step.sampled.token)
    for n in (1, 2):
        assert told[n] == by_transformers(llama, asked[n].prompt, 10)


def test_stepper_reads_short_prompts_together_up_to_the_bound(llama: PreTrainedModel) -> None:
    stepper = BatchScheduler(llama, num_slots=8, max_context=200, prefill_tokens=20)
    lengths = {"a": 5, "b": 9, "c": 9, "d": 45, "e": 3}
    for key, length in lengths.items():
        stepper.add(key, EngineRequest((5,) * length, GREEDY, 100))
    began: list[set[Hashable]] = []
    for _ in range(6):
        known = set().union(*began)
        began.append({step.key for step in stepper.step()} - known)
    # Padded to 9 tokens two fit; the long one takes three passes alone.
    assert began == [{"a", "b"}, {"c"}, set(), set(), {"d"}, {"e"}]


def test_prompts_come_before_the_next_token_where_more_join_than_run(
    llama: PreTrainedModel,
) -> None:
    stepper = BatchScheduler(llama, num_slots=8, max_context=64)
    asked = EngineRequest((5, 6, 7), GREEDY, 8)

    def step_with(*new: str) -> list[Hashable]:
        for key in new:
            stepper.add(key, asked)
        return [output.key for output in stepper.step()]

    assert step_with("a") == ["a"]
    assert step_with("b", "c") == ["b", "c"]
    # As many as run, or fewer, delay nobody.
    assert step_with("d", "e", "f") == ["a", "b", "c", "d", "e", "f"]
    # Of many that wait, those that get a slot count.
    assert step_with(*"ghijklmnopqrst") == [*"abcdef", "g", "h"]
    assert step_with() == [*"abcdefgh"]


def test_stepper_with_penalties_and_bias_generates_as_one_sequence_alone(
    llama: PreTrainedModel,
) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"frequency_penalty": -1.5},
        {"presence_penalty": 2.0, "frequency_penalty": 0.5},
        {"logit_bias": tuple((token, -6.0) for token in range(0, ROWS, 2))},
        {"logit_bias": ((8, 4.0), (9, -4.0)), "presence_penalty": 1.0},
    ]
    asked = {
        n: EngineRequest(prompt, SamplingOptions(temperature=0, **settings[n % 5]), 20)
        for n, prompt in enumerate(prompts(10))
    }
    told = run(BatchScheduler(llama, num_slots=4, max_context=200), asked.items(), joining_every=2)
    changed: set[int] = set()
    for n, generation in asked.items():
        fields = settings[n % 5]
        ids: list[int] = []
        for _ in range(20):
            with torch.no_grad():
                whole = torch.tensor([[*generation.prompt, *ids]])
                logits_V = llama(input_ids=whole).logits[0, -1].clone()
            for token, bias in fields.get("logit_bias", ()):
                logits_V[token] += bias
            for token in set(ids):
                logits_V[token] -= ids.count(token) * fields.get("frequency_penalty", 0.0)
                logits_V[token] -= fields.get("presence_penalty", 0.0)
            ids.append(int(logits_V.argmax()))
        assert told[n] == (ids, "length")
        if ids != by_transformers(llama, generation.prompt, 20):
            changed.add(n % 5)
    assert changed == {1, 2, 3, 4}


@pytest.mark.parametrize("token", [-1, ROWS])
def test_stepper_refuses_a_bias_of_a_token_that_does_not_exist(
    llama: PreTrainedModel, token: int
) -> None:
    stepper = BatchScheduler(llama, num_slots=1, max_context=9)
    sampling = SamplingOptions(logit_bias=((token, 1.0),))
    with pytest.raises(
        InvalidRequestError, match=f"got token id {token}, wanted 0 to 96"
    ) as caught:
        stepper.add("a", EngineRequest((1,), sampling, 1))
    assert caught.value.param == "logit_bias"


def test_stepper_gives_slots_in_the_order_of_arrival(llama: PreTrainedModel) -> None:
    stepper = BatchScheduler(llama, num_slots=3, max_context=200, prefill_tokens=16)
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 60, (40,), generator=generator).tolist()
    limits = torch.randint(1, 9, (40,), generator=generator).tolist()
    waiting = [
        (key, EngineRequest((5,) * length, GREEDY, limit))
        for key, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]
    began: list[Hashable] = []
    while waiting or stepper.num_running or stepper.num_waiting:
        # Twice as many as have slots and wait at any time.
        while waiting and stepper.num_running + stepper.num_waiting < 6:
            stepper.add(*waiting.pop(0))
        began += [step.key for step in stepper.step() if step.key not in began]
    assert began == list(range(40))
