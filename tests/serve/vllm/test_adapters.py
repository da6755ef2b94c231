"""Adapters on vLLM: as under PEFT, whatever else runs, comes and goes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serve.adapters.conftest import NUM_TOKENS, by_peft, write_adapter_directory
from tests.serve.vllm.conftest import ENGINES, MAX_RANK, NEEDS_VLLM, Served

pytestmark = NEEDS_VLLM

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": MAX_RANK,
        "rank_pattern": {"v_proj": 2, "up_proj": 3},
        "alpha_pattern": {"v_proj": 3},
    },
}
PROMPTS = ("the quick", "x", "人民 日报 over")


def ask(both: Served, name: str | None, prompt: str = "the quick") -> str:
    model = "vllm" if name is None else f"vllm:{name}"
    deadline = time.monotonic() + 10
    while True:
        try:
            answer = both.client.completions.create(
                model=model, prompt=prompt, temperature=0, max_tokens=NUM_TOKENS
            )
        except openai.NotFoundError:
            # The last listing of the directory may be a second old.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return answer.choices[0].text


def wanted(both: Served, name: str | None, prompt: str = "the quick") -> str:
    return by_peft(both.base, None if name is None else both.adapters / name, prompt)


def write(both: Served, name: str, *, seed: int, **fields: Any) -> None:  # noqa: ANN401
    write_adapter_directory(both.base, both.adapters / name, seed=seed, **fields)


def wait_for(both: Served, name: str, text: str) -> None:
    deadline = time.monotonic() + 120
    while ask(both, name) != text:
        assert time.monotonic() < deadline, f"{name} does not answer {text!r}"
        time.sleep(0.05)


def test_adapters_of_every_kind_answer_as_under_peft_more_than_fit_at_once(both: Served) -> None:
    for seed, (name, fields) in enumerate(KINDS.items()):
        write(both, name, seed=seed, **fields)
    cases = [(name, prompt) for name in (None, *KINDS) for prompt in PROMPTS]
    expected = [wanted(both, *case) for case in cases]
    assert len(set(expected)) == len(cases)
    # Three adapters where two fit: each leaves for another, and comes back.
    assert [ask(both, *case) for case in cases] == expected
    fitting = [case for case in cases if case[0] != "patterns"]
    with ThreadPoolExecutor(len(fitting)) as pool:
        together = list(pool.map(lambda case: ask(both, *case), fitting))
    assert together == [text for case, text in zip(cases, expected, strict=True) if case in fitting]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, "tables"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head"),
    ],
)
def test_adapter_that_vllm_can_not_run_is_refused_with_what_to_do(
    both: Served, fields: dict[str, Any], reason: str
) -> None:
    name = f"unfit-{reason.lower()}"
    write(both, name, seed=9, **fields)
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match=f"{reason}.*merge it into the base"):
            ask(both, name)
    assert ask(both, None) == wanted(both, None)


def test_adapter_of_a_larger_rank_is_refused_by_the_field_that_allows_it(both: Served) -> None:
    write(both, "large", seed=9, r=MAX_RANK + 1)
    with pytest.raises(openai.BadRequestError, match=r"rank 9.*set models\.N\.max_adapter_rank"):
        ask(both, "large")


def test_new_version_under_load_takes_over_without_a_mixed_answer(both: Served) -> None:
    write(both, "poet", seed=11)
    old = wanted(both, "poet")
    told: list[str] = []
    is_over = threading.Event()

    def load() -> None:
        while not is_over.is_set():
            told.append(ask(both, "poet"))

    assert ask(both, "poet") == old
    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        write(both, "poet", seed=12)
        new = wanted(both, "poet")
        assert new != old
        wait_for(both, "poet", new)
        first_new = len(told)
        deadline = time.monotonic() + 120
        while len(told) < first_new + 20:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert set(told) == {old, new}
    # Those that were running with the old version have ended.
    assert set(told[first_new + 6 :]) == {new}
    assert ask(both, None) == wanted(both, None)


def test_logprobs_with_adapters_are_equal_also_of_prompts_in_one_batch(both: Served) -> None:
    for seed, name in enumerate(("one", "two")):
        write(both, name, seed=20 + seed)
        ask(both, name)

    def score(model: str) -> tuple[list[str], list[float | None]]:
        answer = both.client.with_options(max_retries=5).completions.create(
            model=model,
            prompt="人民 日报 over the",
            echo=True,
            logprobs=1,
            max_tokens=4,
            temperature=0,
        )
        found = answer.choices[0].logprobs
        assert found is not None
        return found.tokens or [], list(found.token_logprobs or [])

    models = [f"{engine}{name}" for name in ("", ":one", ":two") for engine in ENGINES]
    # Loads the adapters, too.
    ask_again = {name: score(name) for name in models}
    with ThreadPoolExecutor(len(models)) as pool:
        told = dict(zip(models, pool.map(score, models), strict=True))
    for name in ("", ":one", ":two"):
        own, other = told[f"transformers{name}"], told[f"vllm{name}"]
        assert own[0] == other[0] == ask_again[f"vllm{name}"][0]
        assert own[1][1:] == pytest.approx(other[1][1:], abs=1e-3)
    assert len({tuple(tokens) for tokens, _ in told.values()}) == 3
