"""What the endpoint measures, in Prometheus' terms, and the sum over several gateways.

Each gateway counts for itself; the counts of all are added where they are read, so that it does not
matter which gateway is asked.
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
"""Seconds."""

TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
"""Seconds a token."""

REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds."""

_MODEL = ("model", "adapter")
KNOWN_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/health",
    "/metrics",
)
"""Routes that are counted by name."""


class ServeMetrics:
    """The counts of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """What is counted."""

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
            "Requests to models by how they ended",
            (*_MODEL, "outcome"),
            registry=one,
        )
        self.prompt_tokens = Counter(
            name("prompt_tokens"), "Tokens of prompts", _MODEL, registry=one
        )
        self.completion_tokens = Counter(
            name("completion_tokens"), "Tokens generated", _MODEL, registry=one
        )
        self.running_requests = Gauge(
            name("requests_running"), "Requests whose answer has begun", _MODEL, registry=one
        )
        self.waiting_requests = Gauge(
            name("requests_waiting"), "Requests before their first token", _MODEL, registry=one
        )
        self.time_to_first_token = Histogram(
            name("time_to_first_token_seconds"),
            "From a request to its first token",
            _MODEL,
            buckets=FIRST_TOKEN_BUCKETS,
            registry=one,
        )
        self.time_per_output_token = Histogram(
            name("time_per_output_token_seconds"),
            "Between two tokens of an answer, its mean",
            _MODEL,
            buckets=TOKEN_BUCKETS,
            registry=one,
        )
        self.request_seconds = Histogram(
            name("request_seconds"),
            "From a request to its last token",
            _MODEL,
            buckets=REQUEST_BUCKETS,
            registry=one,
        )

    def families(self) -> list[Metric]:
        """Return what was counted until now; can be pickled."""
        return list(self.registry.collect())


@dataclass(frozen=True, eq=False)
class _Families(Collector):
    families: Sequence[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def sum_families(gateways: Iterable[Sequence[Metric]]) -> list[Metric]:
    """Return the sum of what several gateways have counted, sample by sample."""
    sums: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for families in gateways:
        for family in families:
            known = sums.setdefault(
                family.name, (Metric(family.name, family.documentation, family.type), {})
            )[1]
            for sample in family.samples:
                # When a counter was made says nothing about a sum.
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
    """Return what Prometheus reads, in its text format."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


class RequestMetricsRecorder:
    """Counts one request's answers as they pass."""

    def __init__(self, meter: ServeMetrics, model: str) -> None:
        """Begin.

        Args:
            meter: where it is counted.
            model: name of a model that there is, or `model:adapter`.
        """
        base, _, adapter = model.partition(":")
        self._meter, self._base = meter, base
        # The adapter's name is the caller's until the model has taken it: no label before.
        self._wanted, self._adapter = adapter, ""
        self._start = time.perf_counter()
        # First and last time and count of tokens, by answer.
        self._times: dict[int, tuple[float, float, int]] = {}

    async def record(
        self, items: AsyncGenerator[int | OutputDelta, None]
    ) -> AsyncGenerator[int | OutputDelta, None]:
        """Yield what a backend yields."""
        meter, outcome = self._meter, "gone"
        gauge = meter.waiting_requests.labels(self._base, "")
        gauge.inc()
        try:
            async with aclosing(items):
                async for item in items:
                    if isinstance(item, int):
                        self._adapter = self._wanted
                        meter.prompt_tokens.labels(self._base, self._adapter).inc(item)
                    elif self._take(item):
                        gauge.dec()
                        gauge = meter.running_requests.labels(self._base, self._adapter)
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

    def _take(self, part: OutputDelta) -> bool:
        """Count a part; return whether it is the first."""
        now = time.perf_counter()
        is_first = not self._times
        if is_first:
            self._meter.time_to_first_token.labels(self._base, self._adapter).observe(
                now - self._start
            )
        self._meter.completion_tokens.labels(self._base, self._adapter).inc(part.num_tokens)
        first, _, count = self._times.get(part.index, (now, now, 0))
        self._times[part.index] = (first, now, count + part.num_tokens)
        return is_first

    def _end(self, outcome: str) -> None:
        labels = (self._base, self._adapter)
        self._meter.finished_requests.labels(*labels, outcome).inc()
        for first, last, count in self._times.values():
            if count > 1:
                self._meter.time_per_output_token.labels(*labels).observe(
                    (last - first) / (count - 1)
                )
        if outcome == "ok":
            self._meter.request_seconds.labels(*labels).observe(time.perf_counter() - self._start)


class HttpMetricsMiddleware:
    """Counts what is asked over HTTP, by route and status, refusals too."""

    def __init__(self, app: ASGIApp, meter: ServeMetrics) -> None:
        self._app, self._meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note its answer's status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Only known routes become labels: what callers make up must not fill the memory.
        route = next((r for r in KNOWN_ROUTES if scope["path"].startswith(r)), "other")
        # 499: the client had gone before its answer began.
        status = 499

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._meter.http_requests.labels(route, str(status)).inc()
