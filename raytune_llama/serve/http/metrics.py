"""Metrics of a replica, recorded with Ray's metrics API.

Each node of a Ray cluster exports the metrics of its processes to Prometheus, with the prefix
`ray_`; sums over replicas are Prometheus's to compute.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Literal, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_llama.serve.generation.output import OutputDelta

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bucket bounds of the time to first token, in seconds."""

TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
"""Bucket bounds of the time per output token, in seconds."""

REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bucket bounds of the request duration, in seconds."""

KNOWN_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models",
    "/health",
)
"""Routes with their own value of the tag `route`; all others count as `other`."""

RequestOutcome = Literal["ok", "refused", "busy", "failed", "late", "gone"]
"""How a model request ended: answered; invalid; refused for load; the engine failed; timed out; or
the client disconnected."""

logger = logging.getLogger(__name__)

_MODEL = ("model", "adapter")


class CounterMetric(Protocol):
    """A number that only grows."""

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        """Add a positive number."""
        ...


class GaugeMetric(Protocol):
    """A number that is set."""

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Set the number."""
        ...


class HistogramMetric(Protocol):
    """A distribution."""

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Record a value."""
        ...


class MetricsApi(Protocol):
    """The part of `ray.serve.metrics` that is used; a module is one."""

    def Counter(  # noqa: N802  # Ray's name
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> CounterMetric:
        """Create a counter."""
        ...

    def Gauge(  # noqa: N802
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> GaugeMetric:
        """Create a gauge."""
        ...

    def Histogram(  # noqa: N802
        self,
        name: str,
        description: str = "",
        boundaries: list[float] | None = None,
        tag_keys: tuple[str, ...] | None = None,
    ) -> HistogramMetric:
        """Create a histogram."""
        ...


class ServeMetrics:
    """Metrics of one replica."""

    def __init__(self, api: MetricsApi) -> None:
        """Create all metrics, without values.

        Args:
            api: `ray.serve.metrics`, which adds tags of replica, deployment and application.
        """

        def counter(text: str, what: str, tags: tuple[str, ...]) -> CounterMetric:
            return api.Counter(f"raytune_llama_{text}", description=what, tag_keys=tags)

        def gauge(text: str, what: str) -> GaugeMetric:
            return api.Gauge(f"raytune_llama_{text}", description=what, tag_keys=_MODEL)

        def histogram(text: str, what: str, bounds: Sequence[float]) -> HistogramMetric:
            name = f"raytune_llama_{text}"
            return api.Histogram(name, description=what, boundaries=list(bounds), tag_keys=_MODEL)

        self.http_requests = counter(
            "http_requests", "HTTP requests by route and status", ("route", "status")
        )
        self.finished_requests = counter(
            "answers", "Model requests by outcome", (*_MODEL, "outcome")
        )
        self.ignored_fields = counter(
            "ignored_fields", "Fields of requests that nobody documents and that were ignored", ()
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens processed", _MODEL)
        self.completion_tokens = counter("completion_tokens", "Tokens generated", _MODEL)
        self.running_requests: Final = OpenRequests(
            gauge("requests_running", "Requests that are generating tokens")
        )
        self.waiting_requests: Final = OpenRequests(
            gauge("requests_waiting", "Requests waiting for their first token")
        )
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds",
            "Time from a request to its first token",
            FIRST_TOKEN_BUCKETS,
        )
        self.time_per_output_token = histogram(
            "time_per_output_token_seconds",
            "Mean time per output token of a choice, after the first token",
            TOKEN_BUCKETS,
        )
        self.request_seconds = histogram(
            "request_seconds", "Time from a request to its last token", REQUEST_BUCKETS
        )


class OpenRequests:
    """The number of requests in some state, by the tags of the model."""

    def __init__(self, gauge: GaugeMetric) -> None:
        self._gauge = gauge
        self._counts: Counter[tuple[tuple[str, str], ...]] = Counter()

    def add(self, tags: Mapping[str, str], number: int) -> None:
        """Add a number, possibly negative."""
        key = tuple(tags.items())
        self._counts[key] += number
        self._gauge.set(self._counts[key], tags=dict(tags))


class RequestRecorder:
    """Records the metrics of one request to a model."""

    def __init__(self, metrics: ServeMetrics, model: str) -> None:
        """Start the request's timer.

        Args:
            metrics: metrics to update.
            model: name of a served model, or `model:adapter`.
        """
        base, _, self._adapter = model.partition(":")
        self._metrics = metrics
        # The adapter's name is client input until the model has accepted it: no tag before that.
        self._tags = {"model": base, "adapter": ""}
        self._start = time.perf_counter()
        # Times of the first and the last delta and number of tokens, by choice index.
        self._times: dict[int, tuple[float, float, int]] = {}
        self._open = metrics.waiting_requests
        self._open_tags = self._tags
        self._open.add(self._open_tags, 1)

    def record_prompt(self, num_tokens: int) -> None:
        """Record that the model has accepted the request."""
        self._tags = {**self._tags, "adapter": self._adapter}
        self._metrics.prompt_tokens.inc(num_tokens, tags=self._tags)

    def record_delta(self, delta: object) -> None:
        """Record a part of the response; of embeddings, only the first."""
        now = time.perf_counter()
        if self._open is self._metrics.waiting_requests:
            self._open.add(self._open_tags, -1)
            self._open, self._open_tags = self._metrics.running_requests, self._tags
            self._open.add(self._open_tags, 1)
            if isinstance(delta, OutputDelta):
                self._metrics.time_to_first_token.observe(now - self._start, tags=self._tags)
        if isinstance(delta, OutputDelta):
            if delta.num_tokens:
                self._metrics.completion_tokens.inc(delta.num_tokens, tags=self._tags)
            first, _, count = self._times.get(delta.index, (now, now, 0))
            self._times[delta.index] = (first, now, count + delta.num_tokens)

    def end(self, outcome: RequestOutcome) -> None:
        """Record how the request has ended."""
        self._open.add(self._open_tags, -1)
        self._metrics.finished_requests.inc(1, tags={**self._tags, "outcome": outcome})
        for first, last, count in self._times.values():
            if count > 1:
                seconds = (last - first) / (count - 1)
                self._metrics.time_per_output_token.observe(seconds, tags=self._tags)
        if outcome == "ok" and self._times:
            seconds = time.perf_counter() - self._start
            self._metrics.request_seconds.observe(seconds, tags=self._tags)


class HttpMetricsMiddleware:
    """Counts HTTP requests by route and status, rejected ones included, and logs the rejected."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and count the status of its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Only known routes become tags: paths that clients make up must not grow memory.
        path = route_path(scope)
        route = next((r for r in KNOWN_ROUTES if path.startswith(r)), "other")
        # 499: the client disconnected before the response began.
        status = 499

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._metrics.http_requests.inc(1, tags={"route": route, "status": str(status)})
            if status >= 400:
                logger.info("%s %s: status %d", scope["method"], route, status)


def route_path(scope: Scope) -> str:
    """Return the path of a request within the application, which may have a prefix of its own."""
    return scope["path"].removeprefix(scope.get("root_path", "")) or "/"
