"""Constraints of a sweep: bounds of metrics that a trial must keep to be the best."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import model_validator

from raytune_llama.config.settings import ConfigError, settings

_VIOLATED = 1e15
"""Objective of a trial that barely violates a constraint: worse than any metric, and better than
that of a non-finite evaluation."""
_MAX_VIOLATION = 1e9


@settings
class Constraint:
    """Bounds of a metric, both inclusive."""

    max: float | None = None
    """Highest value that is allowed; null: no limit."""

    min: float | None = None
    """Lowest value that is allowed; null: no limit."""

    @model_validator(mode="after")
    def _check(self) -> "Constraint":
        if self.max is None and self.min is None:
            raise ConfigError(["max: set max, min or both"])
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ConfigError([f"min: got {self.min:g}, which is above max, {self.max:g}"])
        return self

    def violation(self, value: float | None) -> float:
        """Return by how much a value violates the bounds, as a share of the bound; 0: it does not.

        None, a value that is not finite or not known, violates them by the most.
        """
        if value is None:
            return _MAX_VIOLATION
        excesses = [value - self.max] if self.max is not None else []
        excesses += [self.min - value] if self.min is not None else []
        excess = max(0.0, *excesses)
        bound = self.max if self.max is not None and value > self.max else self.min
        return min(excess / (abs(bound) if bound else 1.0), _MAX_VIOLATION)

    def __str__(self) -> str:
        bounds = [
            f"{name} {bound:g}"
            for name in ("min", "max")
            if (bound := getattr(self, name)) is not None
        ]
        return ", ".join(bounds)


Constraints = Mapping[str, Constraint]
"""Constraints by the name of their metric."""


@dataclass(frozen=True)
class Violation:
    """A constraint that a trial violates."""

    metric: str
    """Name of the metric."""

    value: float | None
    """Its value; None if it is not finite or not known."""

    constraint: Constraint
    """Bounds of the metric."""

    def __str__(self) -> str:
        value = "is not finite" if self.value is None else f"{self.value:.4f}"
        return f"{self.metric} {value} ({self.constraint})"


def find_violations(
    constraints: Constraints, values: Mapping[str, float | None]
) -> tuple[Violation, ...]:
    """Return the constraints that metrics violate; one that is missing counts as violated."""
    return tuple(
        Violation(name, values.get(name), constraint)
        for name, constraint in constraints.items()
        if constraint.violation(values.get(name))
    )


def sum_violations(violations: tuple[Violation, ...]) -> float:
    """Return by how much constraints are violated together, each as a share of its bound."""
    return sum(each.constraint.violation(each.value) for each in violations)


def constrained_objective(objective: float, violations: tuple[Violation, ...]) -> float:
    """Return the objective to minimize for a scheduler, which knows nothing of constraints.

    Whatever violates one is worse than all that does not, and the worse the more it does.
    """
    return _VIOLATED * (1 + sum_violations(violations)) if violations else objective
