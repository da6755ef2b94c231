"""Rate limits per key, over several replicas and over HTTP."""

import openai
import pytest

from raytune_llama.serve.config import KeyLimits
from raytune_llama.serve.http.keys import ApiKeys, make_key
from raytune_llama.serve.http.rate_limit import REPLICA_TIMEOUT_SECONDS, RateLimiter
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_hostile import until
from tests.serve.http.test_routes import FOX, Server


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_a_minute_are_counted_over_all_replicas() -> None:
    clock = Clock()
    limiter = RateLimiter(KeyLimits(requests_per_minute=4), clock=clock)
    for replica in ("a", "b", "a", "b"):
        assert limiter.admit(replica, "key") is None
    wait = limiter.admit("a", "key")
    assert wait == pytest.approx(15.0)
    assert limiter.admit("b", "other") is None
    clock.now += 15.1
    assert limiter.admit("b", "key") is None
    assert limiter.admit("b", "key") is not None


def test_what_was_not_asked_for_does_not_add_up_without_end() -> None:
    clock = Clock()
    limiter = RateLimiter(KeyLimits(requests_per_minute=3), clock=clock)
    clock.now += 3600
    assert [limiter.admit("a", "key") is None for _ in range(5)] == [True] * 3 + [False] * 2


def test_requests_at_a_time_are_free_again_when_they_end() -> None:
    limiter = RateLimiter(KeyLimits(concurrent=2), clock=Clock())
    assert limiter.admit("a", "key") is None
    assert limiter.admit("b", "key") is None
    assert limiter.admit("a", "key") == 1.0
    limiter.release("b", "key")
    assert limiter.admit("a", "key") is None
    assert limiter.admit("a", "key") is not None


def test_requests_of_a_dead_replica_are_released() -> None:
    clock = Clock()
    limiter = RateLimiter(KeyLimits(concurrent=1), clock=clock)
    assert limiter.admit("dead", "key") is None
    clock.now += REPLICA_TIMEOUT_SECONDS - 1
    assert limiter.admit("b", "key") is not None
    clock.now += 2
    assert limiter.admit("b", "key") is None


def test_requests_of_a_replica_that_is_kept_alive_stay_counted() -> None:
    clock = Clock()
    limiter = RateLimiter(KeyLimits(concurrent=1), clock=clock)
    assert limiter.admit("slow", "key") is None
    for _ in range(5):
        clock.now += REPLICA_TIMEOUT_SECONDS - 1
        limiter.keep_alive("slow")
    assert limiter.admit("b", "key") is not None
    limiter.release("slow", "key")
    assert limiter.admit("b", "key") is None


class LocalRateLimits:
    """The `RateLimitClient` of a replica in the same process."""

    def __init__(self, limits: KeyLimits) -> None:
        self._limiter = RateLimiter(limits)

    async def admit(self, key: str) -> float | None:
        return self._limiter.admit("here", key)

    def release(self, key: str) -> None:
        self._limiter.release("here", key)


def test_a_key_that_asks_too_much_must_wait_and_others_need_not() -> None:
    (key, line), (other, other_line) = make_key(), make_key()
    server = Server(
        {"tiny": Scripted("one")},
        ApiKeys((bytes.fromhex(line), bytes.fromhex(other_line))),
        rate_limiter=LocalRateLimits(KeyLimits(requests_per_minute=2)),
    )
    try:
        for _ in range(2):
            server.client(key).completions.create(model="tiny", prompt="a", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client(key).completions.create(model="tiny", prompt="a", max_tokens=1)
        assert 0 < int(caught.value.response.headers["Retry-After"]) <= 30
        assert caught.value.code == "rate_limit_exceeded"
        server.client(other).completions.create(model="tiny", prompt="a", max_tokens=1)
        # Reading costs nothing.
        assert server.client(key).models.list().data
    finally:
        server.close()


def test_request_whose_client_left_is_released() -> None:
    held = Scripted("one", "two", held=True)
    limits = LocalRateLimits(KeyLimits(concurrent=1))
    server = Server({"held": held, "free": Scripted("one")}, rate_limiter=limits)
    client = server.client()

    def is_admitted() -> bool:
        try:
            client.completions.create(model="free", prompt="a")
        except openai.RateLimitError:
            return False
        return True

    try:
        stream = client.chat.completions.create(model="held", messages=FOX, stream=True)
        next(iter(stream))
        assert not is_admitted()
        stream.close()
        until(is_admitted)
    finally:
        server.close()
