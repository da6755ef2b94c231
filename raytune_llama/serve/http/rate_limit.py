"""Rate limits per API key, shared by all replicas.

    rate_limiter = RateLimiter(KeyLimits(requests_per_minute=60))

A replica requests admission for each request, and releases it after the response. The deployment of
the rate limiter and the replicas' client are in `raytune_llama.serve.rate_limiter`.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from raytune_llama.serve.config import KeyLimits

REPLICA_TIMEOUT_SECONDS = 15.0
"""Seconds without a message after which a replica counts as dead and its requests as ended."""

ANONYMOUS_KEY = "anybody"
"""Key name of requests without an accepted API key."""

KEY_NAME = "raytune_llama.key"
"""Entry of a request's ASGI scope with the name of its API key."""


@dataclass
class _Bucket:
    tokens: float
    filled: float


@dataclass
class _ReplicaState:
    last_seen: float
    running: Counter[str] = field(default_factory=Counter)


class RateLimiter:
    """Rate limiter over all replicas of an endpoint."""

    def __init__(self, limits: KeyLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Create a rate limiter without any requests.

        Args:
            limits: limits of every key.
            clock: returns the time in seconds.
        """
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, _Bucket] = {}
        self._replicas: dict[str, _ReplicaState] = defaultdict(lambda: _ReplicaState(clock()))

    def admit(self, replica: str, key: str) -> float | None:
        """Admit a request of a key and return None, or return the seconds to wait."""
        now = self._clock()
        here = self._mark_seen(replica, now)
        limits = self._limits
        if limits.concurrent is not None:
            running = sum(one.running[key] for one in self._replicas.values())
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

    def release(self, replica: str, key: str) -> None:
        """Record the end of an admitted request."""
        running = self._mark_seen(replica, self._clock()).running
        running[key] = max(0, running[key] - 1)

    def keep_alive(self, replica: str) -> None:
        """Record that a replica with running requests is alive."""
        self._mark_seen(replica, self._clock())

    def _mark_seen(self, replica: str, now: float) -> _ReplicaState:
        """Return a replica's state; forget all replicas that count as dead."""
        for name, one in list(self._replicas.items()):
            if now - one.last_seen >= REPLICA_TIMEOUT_SECONDS:
                del self._replicas[name]
        here = self._replicas[replica]
        here.last_seen = now
        return here


class RateLimitClient(Protocol):
    """A replica's interface to the rate limiter."""

    async def admit(self, key: str) -> float | None:
        """Admit a request of a key and return None, or return the seconds to wait."""
        ...

    def release(self, key: str) -> None:
        """Record the end of an admitted request."""
        ...


class RateLimitMiddleware:
    """Enforces the rate limits; plain ASGI, runs after the middleware that checks keys."""

    def __init__(
        self, app: ASGIApp, rate_limiter: RateLimitClient, reject: Callable[[float], ASGIApp]
    ) -> None:
        """Wrap an application.

        Args:
            app: the wrapped application.
            rate_limiter: admits or rejects requests.
            reject: returns the response to a request that has to wait so many seconds.
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
