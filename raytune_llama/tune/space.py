"""Distributions over dotted config fields, and samples of them.

    space:
      optim.learning_rate: {loguniform: [1e-5, 1e-3]}
      lora.rank: {choice: [8, 16, 64]}
      lora.alpha: {multiple_of: lora.rank, factor: 2}

A sample maps each field to a plain value; `override(base, sample)` is a trial's config.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, JsonValue, model_validator

from raytune_llama.config.settings import ConfigError, settings

TrialSample = dict[str, Any]
"""Plain values by dotted field, in the order of the space."""

Side = Literal["lower", "upper"]
"""One of the two ends of a range."""

EDGE_FRACTION = 0.05
"""Fraction of a range, at each end, whose values count as being at its edge. For log-uniform
distributions it is a fraction of the logarithm's range."""

_MIN_EDGE_VALUES = 3
"""Fewest values of an integer range or of ordered choices that have an inner value."""


@settings
class Distribution:
    """Distribution of a field's values: exactly one kind, and `factor` with `multiple_of`."""

    choice: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = None
    """Uniform choice among these values; the only kind that `search.kind: grid` accepts."""

    uniform: tuple[float, float] | None = None
    """Lower and upper bound of a uniform float."""

    loguniform: tuple[float, float] | None = None
    """Lower and upper bound, both above 0, of a log-uniform float."""

    randint: tuple[int, int] | None = None
    """Lower and upper bound, both inclusive, of a uniform integer."""

    multiple_of: str | None = None
    """Another field of the space whose value is multiplied by `factor`; nothing is drawn."""

    factor: float = 1.0
    """Factor by which the value of `multiple_of` is multiplied."""

    @model_validator(mode="after")
    def _check(self) -> "Distribution":
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                [f"got {' and '.join(given) or 'no kind'}, wanted one of {', '.join(_KINDS)}"]
            )
        problems: list[str] = []
        for name in ("uniform", "loguniform", "randint"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] < bounds[1]:
                problems.append(f"{name}: got {list(bounds)}, wanted a lower and a higher bound")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            problems.append(f"loguniform: got {list(self.loguniform)}, wanted bounds above 0")
        if self.factor != 1.0 and self.multiple_of is None:
            problems.append(f"factor: got {self.factor}, but multiple_of is not set")
        if self.choice is not None and len({repr(value) for value in self.choice}) < len(
            self.choice
        ):
            problems.append(f"choice: got {list(self.choice)}, which has a duplicate value")
        if problems:
            raise ConfigError(problems)
        return self

    def choice_index(self, value: Any) -> int:  # noqa: ANN401  # of any field
        """Return the index of a value among the choices."""
        # By repr, since True is equal to 1.
        return [repr(choice) for choice in self.choice or ()].index(repr(value))

    def position(self, value: Any) -> float:  # noqa: ANN401  # of any field
        """Return where a value lies between the lowest, 0, and the highest, 1; choices by index."""
        if self.choice is not None:
            return self.choice_index(value) / max(len(self.choice) - 1, 1)
        if self.loguniform is not None:
            low, high = map(math.log, self.loguniform)
            return (math.log(value) - low) / (high - low)
        low, high = self.uniform or self.randint or (0.0, 1.0)
        return (value - low) / (high - low)

    def find_edge(self, value: Any) -> Side | None:  # noqa: ANN401  # of any field
        """Return the edge of the range that a value is at, or None.

        Choices have edges if all of them are numbers. Two values have no edge: each would be at
        one.
        """
        numbers = self.numeric_choices
        if numbers:
            edges: dict[float, Side] = {min(numbers): "lower", max(numbers): "upper"}
            return edges.get(value) if len(numbers) >= _MIN_EDGE_VALUES else None
        if self.choice is not None or self.multiple_of is not None:
            return None
        if self.randint is not None and self.randint[1] - self.randint[0] + 1 < _MIN_EDGE_VALUES:
            return None
        position = self.position(value)
        if position <= EDGE_FRACTION:
            return "lower"
        return "upper" if position >= 1 - EDGE_FRACTION else None

    @property
    def numeric_choices(self) -> list[float | int]:
        """The choices in ascending order if all are numbers; otherwise empty."""
        numbers = [
            value
            for value in self.choice or ()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        return sorted(numbers) if len(numbers) == len(self.choice or ()) else []

    def scaled(self, value: Any) -> float | int:  # noqa: ANN401  # of any field
        """Return `factor` times another field's value; int if the value and the product are.

        Raises:
            ConfigError: the other value is not a number.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError([f"multiple_of: {self.multiple_of} is {value!r}, wanted a number"])
        product = value * self.factor
        return int(product) if isinstance(value, int) and product.is_integer() else product


_KINDS = ("choice", "uniform", "loguniform", "randint", "multiple_of")

SearchSpace = Mapping[str, Distribution]
"""Distributions by dotted field."""


def widen(kind: Distribution, side: Side) -> Iterator[tuple[float | int, Distribution]]:
    """Yield wider ranges, each with its new outermost value, the widest first.

    Which of them a config accepts is unknown here: many fields have limits of their own.
    """
    outward = -1 if side == "lower" else 1
    old = kind.numeric_choices or kind.loguniform or kind.uniform or kind.randint or (0, 1)
    bound = old[0] if side == "lower" else old[-1]
    found = {_rounded(value, kind) for value in _outer_values(kind, old, side)}
    for value in sorted(found, reverse=side == "upper"):
        if (value - bound) * outward > 0:
            yield value, _with_bound(kind, value, side)


def _outer_values(kind: Distribution, old: Sequence[float], side: Side) -> list[float]:
    """Return candidates for the outermost value of a wider range; some may lie inside."""
    low, high = old[0], old[-1]
    bound = low if side == "lower" else high
    outward = -1 if side == "lower" else 1
    if kind.choice is not None:
        # The next in the series, by difference or by ratio.
        inner, third = old[1:3] if side == "lower" else old[-2:-4:-1]
        is_arithmetic = math.isclose(bound - inner, inner - third) or low <= 0
        return [2 * bound - inner if is_arithmetic else bound * bound / inner]
    parts = [1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    if kind.loguniform is not None:
        decade = min(10.0, high / low)
        return [bound * decade ** (outward * part) for part in parts]
    # Usual limits of fields, and for positive ones a step down that stays positive.
    limits = [0.0, 1.0, bound / 10] if bound > 0 else [0.0]
    width = high - low
    near = [limit for limit in limits if abs(limit - bound) <= width]
    return [bound + outward * width * part for part in parts] + near


def _rounded(value: float, kind: Distribution) -> float | int:
    is_whole = kind.randint is not None or all(
        isinstance(number, int) for number in kind.numeric_choices or [0.5]
    )
    return round(value) if is_whole else float(f"{value:.3g}")


def _with_bound(kind: Distribution, value: float, side: Side) -> Distribution:
    """Return the distribution with another lowest or highest value."""
    if kind.choice is not None:
        more = (value, *kind.choice) if side == "lower" else (*kind.choice, value)
        return Distribution(choice=more)
    low, high = kind.loguniform or kind.uniform or kind.randint or (0, 1)
    ends: Any = (value, high) if side == "lower" else (low, value)
    if kind.randint is not None:
        return Distribution(randint=ends)
    return Distribution(loguniform=ends) if kind.loguniform else Distribution(uniform=ends)


class ValueSuggester(Protocol):
    """Picks a value from each distribution: an Optuna trial, or a random generator."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:  # noqa: ANN401
        """Return one of the choices."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a float between the bounds, uniform or, if `log`, log-uniform."""
        ...

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Return an integer between the bounds, both inclusive."""
        ...


class RandomSuggester:
    """Draws at random; equal seeds give equal values."""

    def __init__(self, seed: str) -> None:
        # A string seed is hashed identically in every process.
        self._random = random.Random(seed)  # no secret

    def suggest_categorical(self, name: str, choices: Any) -> Any:  # noqa: ANN401, ARG002
        """Return one of the choices."""
        return self._random.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:  # noqa: ARG002
        """Return a float between the bounds, uniform or, if `log`, log-uniform."""
        if not log:
            return self._random.uniform(low, high)
        # Rounding may exceed the bounds.
        drawn = math.exp(self._random.uniform(math.log(low), math.log(high)))
        return min(max(drawn, low), high)

    def suggest_int(self, name: str, low: int, high: int) -> int:  # noqa: ARG002
        """Return an integer between the bounds, both inclusive."""
        return self._random.randint(low, high)


def check_space(space: SearchSpace) -> list[str]:
    """Return the problems between the fields of a space, such as multiples of unknown ones."""
    problems: list[str] = []
    if not space:
        problems.append("space: got no field, wanted at least one to search over")
    for field, distribution in space.items():
        other = distribution.multiple_of
        if other is None:
            continue
        if other not in space:
            problems.append(
                f"space.{field}.multiple_of: got {other}, wanted another field of the space: "
                f"{', '.join(name for name in space if name != field) or 'it has none'}"
            )
        elif space[other].multiple_of is not None:
            problems.append(
                f"space.{field}.multiple_of: {other} is a multiple itself; name the field that is "
                "drawn"
            )
    return problems


def draw_sample(space: SearchSpace, chooser: ValueSuggester) -> TrialSample:
    """Draw a value for every field; multiples are computed from the drawn values."""
    drawn = {
        field: _pick(field, distribution, chooser)
        for field, distribution in space.items()
        if distribution.multiple_of is None
    }
    return complete_sample(space, drawn)


def build_grid(space: SearchSpace) -> list[TrialSample]:
    """Return every combination of a space of choices; the last field changes fastest.

    Raises:
        ConfigError: names each field whose distribution is not `choice`.
    """
    free = {name: kind for name, kind in space.items() if kind.multiple_of is None}
    problems = [
        f"space.{field}: a grid takes choices only; write choice: [...], or set search.kind=random"
        for field, distribution in free.items()
        if distribution.choice is None
    ]
    if problems:
        raise ConfigError(problems)
    values = [distribution.choice or () for distribution in free.values()]
    return [
        complete_sample(space, dict(zip(free, point, strict=True)))
        for point in itertools.product(*values)
    ]


def _pick(field: str, distribution: Distribution, chooser: ValueSuggester) -> Any:  # noqa: ANN401
    if distribution.choice is not None:
        # By index: Optuna supports scalar choices only, no lists.
        positions = list(range(len(distribution.choice)))
        return distribution.choice[chooser.suggest_categorical(field, positions)]
    if distribution.randint is not None:
        return chooser.suggest_int(field, *distribution.randint)
    if distribution.uniform is not None:
        return chooser.suggest_float(field, *distribution.uniform)
    assert distribution.loguniform is not None
    return chooser.suggest_float(field, *distribution.loguniform, log=True)


def drawn_parameters(space: SearchSpace, sample: TrialSample) -> dict[str, Any]:
    """Return a sample as its suggester returned it: choices by index, without multiples."""
    return {
        field: distribution.choice_index(sample[field])
        if distribution.choice is not None
        else sample[field]
        for field, distribution in space.items()
        if distribution.multiple_of is None
    }


def format_sample(sample: TrialSample) -> str:
    """Return a sample formatted for messages."""
    return ", ".join(
        f"{field}={value:.4g}" if isinstance(value, float) else f"{field}={value}"
        for field, value in sample.items()
    )


def complete_sample(space: SearchSpace, drawn: TrialSample) -> TrialSample:
    """Return a sample with its multiples computed from the drawn values."""
    return {
        field: drawn[field]
        if distribution.multiple_of is None
        else distribution.scaled(drawn[distribution.multiple_of])
        for field, distribution in space.items()
    }
