"""How much a key may ask for, over several gateways; and the sum of what they have counted."""

import pytest

from raytune_llama.serve.config import KeyLimits
from raytune_llama.serve.http.metrics import ServeMetrics
from raytune_llama.serve.http.rate_limit import GATEWAY_TIMEOUT_SECONDS, RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_a_minute_are_counted_over_all_gateways() -> None:
    clock = Clock()
    ledger = RateLimiter(KeyLimits(requests_per_minute=4), clock=clock)
    for gateway in ("a", "b", "a", "b"):
        assert ledger.admit(gateway, "key") is None
    wait = ledger.admit("a", "key")
    assert wait == pytest.approx(15.0)
    assert ledger.admit("b", "other") is None
    clock.now += 15.1
    assert ledger.admit("b", "key") is None
    assert ledger.admit("b", "key") is not None


def test_what_was_not_asked_for_does_not_add_up_without_end() -> None:
    clock = Clock()
    ledger = RateLimiter(KeyLimits(requests_per_minute=3), clock=clock)
    clock.now += 3600
    assert [ledger.admit("a", "key") is None for _ in range(5)] == [True] * 3 + [False] * 2


def test_requests_at_a_time_are_free_again_when_they_end() -> None:
    ledger = RateLimiter(KeyLimits(concurrent=2), clock=Clock())
    assert ledger.admit("a", "key") is None
    assert ledger.admit("b", "key") is None
    assert ledger.admit("a", "key") == 1.0
    ledger.release("b", "key")
    assert ledger.admit("a", "key") is None
    assert ledger.admit("a", "key") is not None


def test_what_a_dead_gateway_held_is_free() -> None:
    clock = Clock()
    ledger = RateLimiter(KeyLimits(concurrent=1), clock=clock)
    assert ledger.admit("dead", "key") is None
    clock.now += GATEWAY_TIMEOUT_SECONDS - 1
    assert ledger.admit("b", "key") is not None
    clock.now += 2
    assert ledger.admit("b", "key") is None


def value(ledger: RateLimiter, name: str, **labels: str) -> float | None:
    return next(
        (
            sample.value
            for family in ledger.families()
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        ),
        None,
    )


def test_counts_of_gateways_add_up_and_outlive_them() -> None:
    clock = Clock()
    ledger = RateLimiter(KeyLimits(), clock=clock)
    meters = {"a": ServeMetrics(), "b": ServeMetrics()}
    labels = {"model": "m", "adapter": ""}
    for number, (gateway, meter) in enumerate(meters.items(), start=1):
        meter.completion_tokens.labels("m", "").inc(10 * number)
        meter.running_requests.labels("m", "").inc(number)
        meter.time_to_first_token.labels("m", "").observe(0.03)
        ledger.push(gateway, meter.families())
    name = "raytune_llama_completion_tokens_total"
    running = "raytune_llama_requests_running"
    bucket = "raytune_llama_time_to_first_token_seconds_bucket"
    assert value(ledger, name, **labels) == 30
    assert value(ledger, running, **labels) == 3
    assert value(ledger, bucket, **labels, le="0.05") == 2
    assert value(ledger, bucket, **labels, le="0.025") == 0
    clock.now += GATEWAY_TIMEOUT_SECONDS + 1
    ledger.push("b", meters["b"].families())
    assert value(ledger, name, **labels) == 30
    assert value(ledger, running, **labels) == 2
    # The same counts told again are not added again.
    ledger.push("b", meters["b"].families())
    assert value(ledger, name, **labels) == 30
