"""Which losses are far above what was usual: told, with the text that was read, and nothing more.

A loss is a spike where it exceeds median + k sigma of the newest losses, sigma being 1.4826 times
the median absolute deviation: the standard deviation of normal losses, which spikes themselves,
being few, do not move. A step up that stays is told until it fills half of the window.
"""

import statistics
from collections import deque
from collections.abc import Iterable

MAD_TO_SIGMA = 1.4826
"""Standard deviation of normal numbers in units of their median absolute deviation."""

MIN_RELATIVE_SIGMA = 1e-3
"""Of the median: losses that hardly vary, as of one text again and again, make no spike of
rounding."""


class SpikeDetector:
    """Looks at one loss after the other."""

    def __init__(self, factor: float, window_steps: int, past: Iterable[float] = ()) -> None:
        """Begin, with losses that were there before.

        Args:
            factor: k, in standard deviations.
            window_steps: newest losses that say what is usual; none is judged before half of them
                are there.
            past: finite losses of earlier steps, in order. A run that goes on takes them from its
                metrics, so that it judges as one that was never stopped.
        """
        self._factor = factor
        self._losses = deque(past, maxlen=window_steps)
        self._least = max(2, window_steps // 2)

    def observe(self, loss: float) -> float | None:
        """Take a finite loss in; return the bound that it exceeds, where it is a spike."""
        bound = self._bound() if len(self._losses) >= self._least else None
        self._losses.append(loss)
        return bound if bound is not None and loss > bound else None

    def _bound(self) -> float:
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        sigma = max(MAD_TO_SIGMA * deviation, MIN_RELATIVE_SIGMA * abs(median))
        return median + self._factor * sigma
