"""Loss spike detection: a loss far above the usual is reported; training is not affected.

A loss is a spike if it exceeds median + k sigma of the newest losses, sigma being 1.4826 times the
median absolute deviation: the standard deviation of normally distributed losses, which a few
spikes do not change. A lasting step up is reported until it fills half of the window.
"""

import statistics
from collections import deque
from collections.abc import Iterable

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""

MIN_RELATIVE_SIGMA = 1e-3
"""Minimum sigma relative to the median, so that rounding makes no spike where losses hardly vary,
as on one repeated text."""


class SpikeDetector:
    """Detects spikes in a sequence of losses."""

    def __init__(self, factor: float, window_steps: int, past: Iterable[float] = ()) -> None:
        """Start with the losses of earlier steps.

        Args:
            factor: k, in standard deviations.
            window_steps: number of newest losses to compare with; detection starts when half of
                them exist.
            past: finite losses of earlier steps, in order. A resumed run takes them from its
                metrics, so that it detects the same spikes as an uninterrupted one.
        """
        self._factor = factor
        self._losses = deque(past, maxlen=window_steps)
        self._least = max(2, window_steps // 2)

    def observe(self, loss: float) -> float | None:
        """Add a finite loss; return the threshold that it exceeds if it is a spike, else None."""
        bound = self._bound() if len(self._losses) >= self._least else None
        self._losses.append(loss)
        return bound if bound is not None and loss > bound else None

    def _bound(self) -> float:
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        sigma = max(MAD_TO_SIGMA * deviation, MIN_RELATIVE_SIGMA * abs(median))
        return median + self._factor * sigma
