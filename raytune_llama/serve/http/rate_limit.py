"""How much each key may ask for, over all gateways together.

    books = LocalBooks(KeyLimits(requests_per_minute=60), meter)

A gateway asks before it passes a request on, and tells when the answer has ended. What stands in
for several gateways is in `raytune_llama.serve.gateway`.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp, Receive, Scope, Send

from raytune_llama.serve.config import KeyLimits
from raytune_llama.serve.http.metrics import ServeMetrics, sum_families

GATEWAY_TIMEOUT_SECONDS = 15.0
"""A gateway that was not heard of for so long has ended, and what it held is free."""

ANONYMOUS_KEY = "anybody"
"""Stands for the key where none is asked for."""

KEY_NAME = "raytune_llama.key"
"""Entry of a request's ASGI scope: the name of the key it came with."""


@dataclass
class _Bucket:
    tokens: float
    filled: float


@dataclass
class _GatewayState:
    last_seen: float
    running: Counter[str] = field(default_factory=Counter)
    families: Sequence[Metric] = ()


class RateLimiter:
    """What every key has asked for, and what all gateways have counted."""

    def __init__(self, limits: KeyLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing asked.

        Args:
            limits: of every key.
            clock: seconds.
        """
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, _Bucket] = {}
        self._gateways: dict[str, _GatewayState] = defaultdict(lambda: _GatewayState(clock()))

    def admit(self, gateway: str, key: str) -> float | None:
        """Take a request of a key in; return seconds to wait where it may not be yet, or None."""
        now = self._clock()
        here = self._mark_seen(gateway, now)
        limits = self._limits
        if limits.concurrent is not None:
            running = sum(
                one.running[key] for one in self._gateways.values() if self._is_alive(one, now)
            )
            if running >= limits.concurrent:
                return 1.0
        if limits.requests_per_minute is not None:
            rate = limits.requests_per_minute / 60
            most = max(1.0, limits.requests_per_minute)
            bucket = self._buckets.setdefault(key, _Bucket(most, now))
            bucket.tokens = min(most, bucket.tokens + (now - bucket.filled) * rate)
            bucket.filled = now
            if bucket.tokens < 1:
                return (1 - bucket.tokens) / rate
            bucket.tokens -= 1
        here.running[key] += 1
        return None

    def release(self, gateway: str, key: str) -> None:
        """Note that a request which was taken in has ended."""
        running = self._mark_seen(gateway, self._clock()).running
        running[key] = max(0, running[key] - 1)

    def push(self, gateway: str, families: Sequence[Metric]) -> None:
        """Take what a gateway has counted since it began."""
        self._mark_seen(gateway, self._clock()).families = families

    def families(self) -> list[Metric]:
        """Return what all gateways have counted, those that have ended too."""
        now = self._clock()
        counted: list[Sequence[Metric]] = []
        for one in self._gateways.values():
            # What a gateway holds at the moment is gone with it; what it has counted is not.
            lives = self._is_alive(one, now)
            counted.append([f for f in one.families if lives or f.type != "gauge"])
        return sum_families(counted)

    def _mark_seen(self, gateway: str, now: float) -> _GatewayState:
        one = self._gateways[gateway]
        if not self._is_alive(one, now):
            one.running.clear()
        one.last_seen = now
        return one

    def _is_alive(self, one: _GatewayState, now: float) -> bool:
        return now - one.last_seen < GATEWAY_TIMEOUT_SECONDS


class RateLimitClient(Protocol):
    """The ledger as a gateway sees it."""

    async def admit(self, key: str) -> float | None:
        """Take a request of a key in; return seconds to wait where it may not be yet, or None."""
        ...

    def release(self, key: str) -> None:
        """Note that a request which was taken in has ended."""
        ...

    async def families(self) -> list[Metric]:
        """Return what all gateways have counted."""
        ...


class LocalRateLimitClient:
    """The ledger of one gateway that stands alone."""

    def __init__(self, limits: KeyLimits, meter: ServeMetrics) -> None:
        self._ledger, self._meter = RateLimiter(limits), meter

    async def admit(self, key: str) -> float | None:
        """Take a request in; see `RateLimitClient`."""
        return self._ledger.admit("", key)

    def release(self, key: str) -> None:
        """Note a request's end."""
        self._ledger.release("", key)

    async def families(self) -> list[Metric]:
        """Return what was counted."""
        return self._meter.families()


class RateLimitMiddleware:
    """Asks the ledger before a request is passed on; plain ASGI, inside of what checks keys."""

    def __init__(
        self, app: ASGIApp, books: RateLimitClient, refuse: Callable[[float], ASGIApp]
    ) -> None:
        """Stand before an application.

        Args:
            app: what is passed on to.
            books: the ledger.
            refuse: makes the answer to one who must wait so many seconds.
        """
        self._app, self._books, self._refuse = app, books, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        # What only reads costs nothing.
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = scope.get(KEY_NAME, ANONYMOUS_KEY)
        wait = await self._books.admit(key)
        if wait is not None:
            await self._refuse(wait)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._books.release(key)
