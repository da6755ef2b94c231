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
from collections.abc import Mapping
from typing import Annotated, Any, Protocol

from pydantic import Field, JsonValue, model_validator

from raytune_llama.config.settings import ConfigError, settings

TrialSample = dict[str, Any]
"""Plain values by dotted field, in the order of the space."""


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
    return _complete(space, drawn)


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
        _complete(space, dict(zip(free, point, strict=True)))
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


def _complete(space: SearchSpace, drawn: TrialSample) -> TrialSample:
    return {
        field: drawn[field]
        if distribution.multiple_of is None
        else distribution.scaled(drawn[distribution.multiple_of])
        for field, distribution in space.items()
    }
