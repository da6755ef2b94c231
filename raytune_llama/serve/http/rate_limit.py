"""Rate limits per API key, shared by all gateways.

    rate_limiter = LocalRateLimitClient(KeyLimits(requests_per_minute=60), metrics)

A gateway requests admission before it forwards a request, and releases it after the response. The
client for several gateways is in `raytune_llama.serve.gateway`.
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
"""Seconds without a message after which a gateway counts as dead and its requests as ended."""

ANONYMOUS_KEY = "anybody"
"""Key name of requests without an accepted API key."""

KEY_NAME = "raytune_llama.key"
"""Entry of a request's ASGI scope with the name of its API key."""


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
    """Rate limiter over all gateways; it also holds their metrics."""

    def __init__(self, limits: KeyLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Create a rate limiter without any requests.

        Args:
            limits: limits of every key.
            clock: returns the time in seconds.
        """
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, _Bucket] = {}
        self._gateways: dict[str, _GatewayState] = defaultdict(lambda: _GatewayState(clock()))

    def admit(self, gateway: str, key: str) -> float | None:
        """Admit a request of a key and return None, or return the seconds to wait."""
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
        """Record the end of an admitted request."""
        running = self._mark_seen(gateway, self._clock()).running
        running[key] = max(0, running[key] - 1)

    def push(self, gateway: str, families: Sequence[Metric]) -> None:
        """Store a gateway's metrics, counted since it started."""
        self._mark_seen(gateway, self._clock()).families = families

    def families(self) -> list[Metric]:
        """Return the sum of all gateways' metrics, dead gateways included."""
        now = self._clock()
        counted: list[Sequence[Metric]] = []
        for one in self._gateways.values():
            # A dead gateway's gauges are void; its counters and histograms are not.
            is_alive = self._is_alive(one, now)
            counted.append([f for f in one.families if is_alive or f.type != "gauge"])
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
    """A gateway's interface to the rate limiter."""

    async def admit(self, key: str) -> float | None:
        """Admit a request of a key and return None, or return the seconds to wait."""
        ...

    def release(self, key: str) -> None:
        """Record the end of an admitted request."""
        ...

    async def families(self) -> list[Metric]:
        """Return the sum of all gateways' metrics."""
        ...


class LocalRateLimitClient:
    """Rate limiter of a single gateway, in its own process."""

    def __init__(self, limits: KeyLimits, metrics: ServeMetrics) -> None:
        self._rate_limiter, self._metrics = RateLimiter(limits), metrics

    async def admit(self, key: str) -> float | None:
        """Admit a request; see `RateLimitClient`."""
        return self._rate_limiter.admit("", key)

    def release(self, key: str) -> None:
        """Record the end of a request."""
        self._rate_limiter.release("", key)

    async def families(self) -> list[Metric]:
        """Return this gateway's metrics."""
        return self._metrics.families()


class RateLimitMiddleware:
    """Enforces the rate limits; plain ASGI, runs after the middleware that checks keys."""

    def __init__(
        self, app: ASGIApp, rate_limiter: RateLimitClient, reject: Callable[[float], ASGIApp]
    ) -> None:
        """Wrap an application.

        Args:
            app: the wrapped application.
            rate_limiter: admits or rejects requests.
            reject: builds the response to a rejected request from the seconds to wait.
        """
        self._app, self._rate_limiter, self._reject = app, rate_limiter, reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it with 429."""
        # Only POST requests count.
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = scope.get(KEY_NAME, ANONYMOUS_KEY)
        wait = await self._rate_limiter.admit(key)
        if wait is not None:
            await self._reject(wait)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._rate_limiter.release(key)
