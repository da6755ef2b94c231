"""An in-memory stand-in for `ray.serve.metrics`, with the same checks."""

import re

from raytune_llama.serve.http.metrics import CounterMetric, GaugeMetric, HistogramMetric

Tags = dict[str, str] | None

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_PREFIX = "raytune_llama_"


class RecordedMetrics:
    """A `MetricsApi` that keeps what is recorded, by name and tag values.

    Names are without the package's prefix; tag values are in the order of the tag keys.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        """Values of counters and gauges."""

        self.observations: dict[tuple[str, ...], list[float]] = {}
        """Observed values of histograms, and all values that gauges have had."""

        self.exported: set[str] = set()
        """Names that Ray exports to Prometheus; of histograms, only the buckets."""

        self.problems: list[str] = []
        """Why Ray would have dropped or refused a value or a metric."""

    @property
    def tag_values(self) -> set[str]:
        """All values of all tags."""
        return {part for key in (*self.values, *self.observations) for part in key[1:]}

    def Counter(  # noqa: N802  # Ray's name
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> CounterMetric:
        return _Counter(self, name, description, tag_keys, "_total")

    def Gauge(  # noqa: N802
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> GaugeMetric:
        return _Gauge(self, name, description, tag_keys, "")

    def Histogram(  # noqa: N802
        self,
        name: str,
        description: str = "",
        boundaries: list[float] | None = None,
        tag_keys: tuple[str, ...] | None = None,
    ) -> HistogramMetric:
        bounds = boundaries or []
        self.check(bool(bounds) and bounds[0] > 0, f"{name}: no positive boundaries")
        self.check(bounds == sorted(set(bounds)), f"{name}: boundaries do not increase")
        return _Histogram(self, name, description, tag_keys, "_bucket")

    def check(self, condition: bool, problem: str) -> None:  # noqa: FBT001
        """Raise ValueError, as Ray does, and keep the problem: servers catch exceptions."""
        if not condition:
            self.problems.append(problem)
            raise ValueError(problem)


class _Metric:
    def __init__(
        self,
        api: RecordedMetrics,
        name: str,
        description: str,
        tag_keys: tuple[str, ...] | None,
        suffix: str,
    ) -> None:
        api.check(bool(description), f"{name}: no description")
        api.check(_NAME.fullmatch(name) is not None, f"{name}: not a metric name")
        api.check(name.startswith(_PREFIX), f"{name}: does not begin with {_PREFIX}")
        api.check(f"ray_{name}{suffix}" not in api.exported, f"{name}: created twice")
        api.exported.add(f"ray_{name}{suffix}")
        self._api, self._name, self._tag_keys = api, name, tag_keys or ()

    def key(self, tags: Tags) -> tuple[str, ...]:
        """Return the name and the tag values, whose keys must be exactly the declared ones."""
        given = tags or {}
        is_exact = set(given) == set(self._tag_keys)
        self._api.check(is_exact, f"{self._name}: tags {sorted(given)}, not {self._tag_keys}")
        are_texts = all(isinstance(value, str) for value in given.values())
        self._api.check(are_texts, f"{self._name}: tag values {list(given.values())}")
        return (self._name.removeprefix(_PREFIX), *(given[name] for name in self._tag_keys))


class _Counter(_Metric):
    def inc(self, value: float = 1.0, tags: Tags = None) -> None:
        self._api.check(value > 0, f"{self._name}: increment of {value}")
        key = self.key(tags)
        self._api.values[key] = self._api.values.get(key, 0.0) + value


class _Gauge(_Metric):
    def set(self, value: float, tags: Tags = None) -> None:
        key = self.key(tags)
        self._api.values[key] = value
        self._api.observations.setdefault(key, []).append(value)


class _Histogram(_Metric):
    def observe(self, value: float, tags: Tags = None) -> None:
        self._api.observations.setdefault(self.key(tags), []).append(value)
