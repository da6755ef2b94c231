"""Promise: the learning rate follows its shape at every step, and is never negative."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.train.schedule import ScheduleConfig, learning_rate_factor

KINDS = st.sampled_from(["cosine", "linear", "constant"])
STEPS = st.integers(1, 300)
RATIOS = st.floats(0, 0.99)


def curve(config: ScheduleConfig, num_steps: int) -> list[float]:
    return [learning_rate_factor(step, num_steps, config) for step in range(num_steps)]


@given(kind=KINDS, num_steps=STEPS, ratio=RATIOS)
def test_rate_factor_any_run_stays_above_0_and_reaches_1(
    kind: str, num_steps: int, ratio: float
) -> None:
    config = ScheduleConfig(kind=kind, warmup_ratio=ratio)  # pyright: ignore[reportArgumentType]
    factors = curve(config, num_steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1


@given(kind=KINDS, num_steps=STEPS, ratio=RATIOS)
def test_rate_factor_rises_in_equal_steps_then_never_again(
    kind: str, num_steps: int, ratio: float
) -> None:
    config = ScheduleConfig(kind=kind, warmup_ratio=ratio)  # pyright: ignore[reportArgumentType]
    factors = curve(config, num_steps)
    top = factors.index(1)
    rise = [0.0, *factors[: top + 1]]
    gaps = [b - a for a, b in itertools.pairwise(rise)]
    assert gaps == pytest.approx([1 / (top + 1)] * (top + 1))
    assert all(b <= a for a, b in itertools.pairwise(factors[top:]))
    # The share is rounded up to whole steps; without a warm-up the first step is the top.
    assert top + 1 == pytest.approx(max(1, math.ceil(ratio * num_steps)), abs=1e-6)


@given(num_steps=st.integers(2, 300))
def test_rate_factor_without_warm_up_falls_to_what_the_shapes_say(num_steps: int) -> None:
    linear = curve(ScheduleConfig(kind="linear", warmup_ratio=0.0), num_steps)
    cosine = curve(ScheduleConfig(kind="cosine", warmup_ratio=0.0), num_steps)
    constant = curve(ScheduleConfig(kind="constant", warmup_ratio=0.0), num_steps)
    # Zero is what the step after the last would have.
    assert linear[-1] == pytest.approx(1 / num_steps)
    assert cosine[-1] == pytest.approx(math.sin(math.pi / 2 / num_steps) ** 2)
    assert cosine[num_steps // 2] == pytest.approx(0.5, abs=math.pi / 2 / num_steps)
    assert linear[num_steps // 2] == pytest.approx(0.5, abs=1 / num_steps)
    assert constant == [1.0] * num_steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.99])
def test_rate_factor_one_step_run_takes_it_at_the_peak(kind: str, ratio: float) -> None:
    config = ScheduleConfig(kind=kind, warmup_ratio=ratio)  # pyright: ignore[reportArgumentType]
    assert curve(config, 1) == [1.0]


@pytest.mark.parametrize(("ratio", "num_steps", "warmup"), [(0.07, 100, 7), (0.071, 100, 8)])
def test_rate_factor_warm_up_is_the_share_rounded_up(
    ratio: float, num_steps: int, warmup: int
) -> None:
    factors = curve(ScheduleConfig(warmup_ratio=ratio), num_steps)
    assert factors.index(1.0) == warmup - 1
