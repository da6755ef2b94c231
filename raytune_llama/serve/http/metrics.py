"""Prometheus metrics of the endpoint, and their sum over all gateways.

Each gateway counts for itself; the sum is computed when it is read, so that every gateway returns
the same.
"""

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_llama.serve.errors import BusyError, EngineError, InvalidRequestError
from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.http.timeouts import QueueTimeoutError, RequestTimeoutError

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bucket bounds of the time to first token, in seconds."""

TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
"""Bucket bounds of the time per output token, in seconds."""

REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bucket bounds of the request duration, in seconds."""

_MODEL = ("model", "adapter")
KNOWN_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/health",
    "/metrics",
)
"""Routes with their own value of the label `route`; all others count as `other`."""


class ServeMetrics:
    """Metrics of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """Prometheus registry of all these metrics."""

        def name(text: str) -> str:
            return f"raytune_llama_{text}"

        one = self.registry
        self.http_requests = Counter(
            name("http_requests"),
            "HTTP requests by route and status",
            ("route", "status"),
            registry=one,
        )
        self.finished_requests = Counter(
            name("answers"),
            "Model requests by outcome",
            (*_MODEL, "outcome"),
            registry=one,
        )
        self.prompt_tokens = Counter(
            name("prompt_tokens"), "Prompt tokens processed", _MODEL, registry=one
        )
        self.completion_tokens = Counter(
            name("completion_tokens"), "Tokens generated", _MODEL, registry=one
        )
        self.running_requests = Gauge(
            name("requests_running"), "Requests that are generating tokens", _MODEL, registry=one
        )
        self.waiting_requests = Gauge(
            name("requests_waiting"), "Requests waiting for their first token", _MODEL, registry=one
        )
        self.time_to_first_token = Histogram(
            name("time_to_first_token_seconds"),
            "Time from a request to its first token",
            _MODEL,
            buckets=FIRST_TOKEN_BUCKETS,
            registry=one,
        )
        self.time_per_output_token = Histogram(
            name("time_per_output_token_seconds"),
            "Mean time per output token of a choice, after the first token",
            _MODEL,
            buckets=TOKEN_BUCKETS,
            registry=one,
        )
        self.request_seconds = Histogram(
            name("request_seconds"),
            "Time from a request to its last token",
            _MODEL,
            buckets=REQUEST_BUCKETS,
            registry=one,
        )

    def families(self) -> list[Metric]:
        """Return a picklable snapshot of all metrics."""
        return list(self.registry.collect())


@dataclass(frozen=True, eq=False)
class _Families(Collector):
    families: Sequence[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def sum_families(gateways: Iterable[Sequence[Metric]]) -> list[Metric]:
    """Return the sum of several gateways' metrics, sample by sample."""
    sums: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for families in gateways:
        for family in families:
            known = sums.setdefault(
                family.name, (Metric(family.name, family.documentation, family.type), {})
            )[1]
            for sample in family.samples:
                # Creation times of counters have no sum.
                if sample.name.endswith("_created"):
                    continue
                key = (sample.name, tuple(sorted(sample.labels.items())))
                known[key] = known.get(key, 0.0) + sample.value
    for total, known in sums.values():
        total.samples = [
            Sample(name, dict(labels), value) for (name, labels), value in known.items()
        ]
    return [total for total, _ in sums.values()]


def render_exposition(families: Sequence[Metric]) -> bytes:
    """Return metrics in Prometheus' text exposition format."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


class RequestMetricsRecorder:
    """Records the metrics of one request while its output passes through."""

    def __init__(self, metrics: ServeMetrics, model: str) -> None:
        """Start the request's timer.

        Args:
            metrics: metrics to update.
            model: name of a served model, or `model:adapter`.
        """
        base, _, adapter = model.partition(":")
        self._metrics, self._base = metrics, base
        # The adapter's name is client input until the model has accepted it: no label before that.
        self._wanted, self._adapter = adapter, ""
        self._start = time.perf_counter()
        # Times of the first and the last delta and number of tokens, by choice index.
        self._times: dict[int, tuple[float, float, int]] = {}

    async def record(
        self, items: AsyncGenerator[int | OutputDelta, None]
    ) -> AsyncGenerator[int | OutputDelta, None]:
        """Yield the backend's items unchanged, and record them."""
        metrics, outcome = self._metrics, "gone"
        gauge = metrics.waiting_requests.labels(self._base, "")
        gauge.inc()
        try:
            async with aclosing(items):
                async for item in items:
                    if isinstance(item, int):
                        self._adapter = self._wanted
                        metrics.prompt_tokens.labels(self._base, self._adapter).inc(item)
                    elif self._record_delta(item):
                        gauge.dec()
                        gauge = metrics.running_requests.labels(self._base, self._adapter)
                        gauge.inc()
                    yield item
            outcome = "ok"
        except InvalidRequestError:
            outcome = "refused"
            raise
        except BusyError:
            outcome = "busy"
            raise
        except EngineError:
            outcome = "failed"
            raise
        except (QueueTimeoutError, RequestTimeoutError):
            outcome = "late"
            raise
        finally:
            gauge.dec()
            self._end(outcome)

    def _record_delta(self, delta: OutputDelta) -> bool:
        """Record a delta; return whether it is the request's first."""
        now = time.perf_counter()
        is_first = not self._times
        if is_first:
            self._metrics.time_to_first_token.labels(self._base, self._adapter).observe(
                now - self._start
            )
        self._metrics.completion_tokens.labels(self._base, self._adapter).inc(delta.num_tokens)
        first, _, count = self._times.get(delta.index, (now, now, 0))
        self._times[delta.index] = (first, now, count + delta.num_tokens)
        return is_first

    def _end(self, outcome: str) -> None:
        labels = (self._base, self._adapter)
        self._metrics.finished_requests.labels(*labels, outcome).inc()
        for first, last, count in self._times.values():
            if count > 1:
                self._metrics.time_per_output_token.labels(*labels).observe(
                    (last - first) / (count - 1)
                )
        if outcome == "ok":
            self._metrics.request_seconds.labels(*labels).observe(time.perf_counter() - self._start)


class HttpMetricsMiddleware:
    """Counts HTTP requests by route and status, rejected ones included."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and count the status of its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Only known routes become labels: paths that clients make up must not grow memory.
        route = next((r for r in KNOWN_ROUTES if scope["path"].startswith(r)), "other")
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
            self._metrics.http_requests.labels(route, str(status)).inc()
